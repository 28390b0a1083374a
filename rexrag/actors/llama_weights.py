"""Weights of a Llama-like model, fused for inference, and filled by the names of the transformers model.

Query, key and value projections are one matrix, gate and up projections another. `load` copies straight into their
slices, so that a weight update is one copy and needs no second model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rexrag.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MODEL_TYPES: Final = ("llama", "qwen2", "qwen3")
_FIXED_ROPE: Final = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the sequence."""


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """What the forward pass needs to know besides the weights."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward: int
    vocab_size: int
    norm_eps: float
    tied_head: bool


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer, linear weights as [out, in]; biases and the norms of query and key where the model has them."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class LlamaWeights:
    """All weights of a Llama, Qwen2 or Qwen3 causal language model, in one precision.

    Attributes:
        cos, sin: [head_dim / 2, max_length] rotary embedding.

    Example:
        >>> weights = LlamaWeights(model, dtype=torch.float32, max_length=512)
        >>> weights.load({name: p.detach().numpy() for name, p in model.named_parameters()})
    """

    def __init__(self, model: PreTrainedModel, *, dtype: torch.dtype, max_length: int) -> None:
        """
        Raises:
            ModelError: another architecture, or a context shorter than `max_length`.
        """
        _check_supported(model.config, max_length=max_length)
        self.dtype = dtype
        self.shape = _shape(model.config)
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._sizes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._targets: dict[str, Tensor] = {}
        self.embedding = self._new("model.embed_tokens.weight")
        self.layers = [self._new_layer(f"model.layers.{i}.") for i in range(self.shape.num_layers)]
        self.final_norm = self._new("model.norm.weight")
        self.head = self.embedding if self.shape.tied_head else self._new("lm_head.weight")
        if unknown := self._sizes.keys() - self._targets.keys():
            raise ModelError(
                f"parameter {min(unknown)} is none of a {model.config.model_type} model's; merge adapters first"
            )
        for name, parameter in parameters.items():
            self._targets[name].copy_(parameter)
        self.cos, self.sin = _rotary(model, dtype=dtype, max_length=max_length, head_dim=self.shape.head_dim)

    def check(self, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Refuse what `load` could not load.

        Raises:
            ValueError: a name is missing or unknown, or an array has another shape or type.
        """
        if missing := self._sizes.keys() - weights.keys():
            raise ValueError(f"{len(missing)} of {len(self._sizes)} weights are missing, such as {min(missing)}")
        if unknown := weights.keys() - self._sizes.keys():
            raise ValueError(f"{len(unknown)} weights are unknown, such as {min(unknown)}")
        for name, array in weights.items():
            if array.shape != self._sizes[name]:
                raise ValueError(f"weight {name} has shape {array.shape}, the model has {self._sizes[name]}")
            if array.dtype not in (np.float32, np.uint16):
                raise ValueError(
                    f"weight {name} is {array.dtype}, expected float32, or uint16 with the bits of bfloat16"
                )

    @torch.inference_mode()
    def load(self, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Overwrite all weights with arrays that `check` accepts; they may be read-only."""
        for name, array in weights.items():
            target = self._targets[name]
            if array.dtype == np.float32 and self.dtype is torch.float32:
                np.copyto(target.numpy(), array)
                continue
            staged = torch.empty(array.shape, dtype=torch.float32 if array.dtype == np.float32 else torch.uint16)
            np.copyto(staged.numpy(), array)
            target.copy_(staged if array.dtype == np.float32 else staged.view(torch.bfloat16))

    def _new_layer(self, prefix: str) -> LayerWeights:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        heads = [f"{attention}{name}_proj." for name in "qkv"]
        gate_up = [f"{mlp}gate_proj.", f"{mlp}up_proj."]
        return LayerWeights(
            attention_norm=self._new(f"{prefix}input_layernorm.weight"),
            qkv=self._new(*(f"{name}weight" for name in heads)),
            qkv_bias=self._maybe(*(f"{name}bias" for name in heads)),
            q_norm=self._maybe(f"{attention}q_norm.weight"),
            k_norm=self._maybe(f"{attention}k_norm.weight"),
            output=self._new(f"{attention}o_proj.weight"),
            output_bias=self._maybe(f"{attention}o_proj.bias"),
            mlp_norm=self._new(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._new(*(f"{name}weight" for name in gate_up)),
            gate_up_bias=self._maybe(*(f"{name}bias" for name in gate_up)),
            down=self._new(f"{mlp}down_proj.weight"),
            down_bias=self._maybe(f"{mlp}down_proj.bias"),
        )

    def _new(self, *names: str) -> Tensor:
        """One tensor that holds the named parameters one below the other, and the target of each within it."""
        rows = [self._sizes[name][0] for name in names]
        fused = torch.empty(sum(rows), *self._sizes[names[0]][1:], dtype=self.dtype)
        self._targets.update(zip(names, torch.split(fused, rows), strict=True))
        return fused

    def _maybe(self, *names: str) -> Tensor | None:
        return self._new(*names) if names[0] in self._sizes else None


def _check_supported(config: PreTrainedConfig, *, max_length: int) -> None:
    if config.model_type not in _MODEL_TYPES:
        raise ModelError(
            f"model type {config.model_type!r} is not supported by the torch engine, only {', '.join(_MODEL_TYPES)}"
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
    if max_length > config.max_position_embeddings:
        raise ModelError(
            f"trajectories of {max_length} tokens do not fit the model's context of {config.max_position_embeddings}; "
            "lower env.max_trajectory_tokens"
        )


def _shape(config: PreTrainedConfig) -> LlamaShape:
    num_heads = config.num_attention_heads
    return LlamaShape(
        width=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        feed_forward=config.intermediate_size,
        vocab_size=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        tied_head=config.tie_word_embeddings,
    )


def _rotary(model: PreTrainedModel, *, dtype: torch.dtype, max_length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    # Made anew from the config: the model's own was rounded if the model was cast.
    embedding = type(model.get_submodule("model.rotary_emb"))(model.config)
    frequencies, scaling = embedding.inv_freq, embedding.attention_scaling
    assert isinstance(frequencies, Tensor)
    assert isinstance(scaling, float)
    if len(frequencies) * 2 != head_dim:
        raise ModelError(f"rotary embedding of {len(frequencies) * 2} of {head_dim} dimensions is not supported")
    angles = torch.outer(frequencies.float(), torch.arange(max_length).float())
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)
