"""Which models can be trained: those that the packed passes and the embedded engine compute exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rexrag.errors import ModelError, counted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODEL_TYPES: Final = ("llama", "qwen2", "qwen3")
_FIXED_ROPE: Final = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the sequence."""


def refuse_quantized(config: PreTrainedConfig, *, where: object) -> None:
    """Refuse weights that are no plain numbers, by what config.json says of them.

    Raises:
        ModelError: the model is quantised.
    """
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return
    settings = quantized if isinstance(quantized, dict) else vars(quantized)
    method = settings.get("quant_method") or "unknown"
    raise ModelError(
        f"{where} is quantised (quantization_config of config.json: {getattr(method, 'value', method)}); its weights "
        "cannot be trained: name the model in bfloat16, float16 or float32 that it was made from"
    )


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse another architecture than those that the embedded engine computes.

    Raises:
        ModelError: the type, the activation, the attention or the rotary embedding is another one.
    """
    if config.model_type not in MODEL_TYPES:
        raise ModelError(
            f"model type {config.model_type!r} is not supported by the torch engine, only {', '.join(MODEL_TYPES)}: "
            "take a dense Llama- or Qwen-like model"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"activation {config.hidden_act!r} is not supported by the torch engine, only 'silu'")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ModelError(
            "sliding-window attention is not supported by the torch engine; set use_sliding_window to false"
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in _FIXED_ROPE:
        raise ModelError(
            f"rotary embedding {rope_type!r} is not supported by the torch engine, only {', '.join(_FIXED_ROPE)}"
        )


def check_context(config: PreTrainedConfig, needed: int, *, what: str = "the run", remedy: str | None = None) -> None:
    """Refuse a model whose context is shorter than `needed` tokens.

    Args:
        what: needs them; remedy: what to do about it, where it is not the limit of a trajectory.

    Raises:
        ModelError: it is shorter.
    """
    have = getattr(config, "max_position_embeddings", None)
    if have is not None and have < needed:
        remedy = remedy or f"lower env.max_trajectory_tokens by at least {needed - have}"
        raise ModelError(f"the model's context is {counted(have, 'token')}, {what} needs {needed}; {remedy}")
