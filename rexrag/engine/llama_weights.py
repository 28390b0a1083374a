"""Weights of a Llama-like model, fused for inference, and filled by the names of the transformers model.

Query, key and value projections are one matrix, gate and up projections another. `load` fills and packs one of them
after the other, so that a weight update needs no second model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rexrag.engine.packed_linear import PackedLinear
from rexrag.engine.weight_arrays import as_tensor, check_arrays
from rexrag.errors import ModelError
from rexrag.model.supported import check_context, check_supported
from rexrag.model.weight_proof import bit_sum

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
    """One layer; the norms of query and key where the model has them."""

    attention_norm: Tensor
    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: PackedLinear
    mlp_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear


class LlamaWeights:
    """All weights of a Llama, Qwen2 or Qwen3 causal language model, in one precision.

    Attributes:
        cos, sin: [max_length, head_dim / 2] rotary embedding.

    Example:
        >>> weights = LlamaWeights(model, dtype=torch.float32, max_length=512, device=torch.device("cpu"))
        >>> weights.load({name: p.detach().numpy() for name, p in model.named_parameters()})
    """

    def __init__(self, model: PreTrainedModel, *, dtype: torch.dtype, max_length: int, device: torch.device) -> None:
        """
        Raises:
            ModelError: another architecture, or a context shorter than `max_length`.
        """
        check_supported(model.config)
        check_context(model.config, max_length)
        self.dtype = dtype
        self.device = device
        self.shape = _shape(model.config)
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._sizes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._targets: dict[str, Tensor] = {}
        self._fused: dict[tuple[str, ...], PackedLinear] = {}
        self.embedding = self._plain("model.embed_tokens.weight")
        self.layers = [self._new_layer(f"model.layers.{i}.") for i in range(self.shape.num_layers)]
        self.final_norm = self._plain("model.norm.weight")
        self.head = self._linear("model.embed_tokens." if self.shape.tied_head else "lm_head.")
        known = self._targets.keys() | {name for names in self._fused for name in names}
        if unknown := self._sizes.keys() - known:
            raise ModelError(
                f"parameter {min(unknown)} is none of a {model.config.model_type} model's; merge adapters first"
            )
        self._fill(parameters)
        cos, sin = _rotary(model, dtype=dtype, max_length=max_length, head_dim=self.shape.head_dim)
        self.cos, self.sin = cos.to(device), sin.to(device)

    def check(self, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Refuse what `load` could not load.

        Raises:
            ValueError: a name is missing or unknown, or an array has another shape or type.
        """
        check_arrays(weights, sizes=self._sizes)

    def load(self, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Overwrite all weights with arrays that `check` accepts; they may be read-only."""
        self._fill(weights)

    @torch.inference_mode()
    def bit_sum(self) -> int:
        """Of all weights as they lie here; a tied head counts once."""
        linears = (linear.weight() for names, linear in self._fused.items() if names[0] not in self._targets)
        return bit_sum(itertools.chain(self._targets.values(), linears))

    @torch.inference_mode()
    def _fill(self, weights: Mapping[str, npt.NDArray[np.generic]] | Mapping[str, Tensor]) -> None:
        for name, target in self._targets.items():
            _copy(target, weights[name])
        for names, linear in self._fused.items():
            linear.load(self._stack(names, weights))

    def _new_layer(self, prefix: str) -> LayerWeights:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        norms = {name: f"{attention}{name}.weight" for name in ("q_norm", "k_norm")}
        return LayerWeights(
            attention_norm=self._plain(f"{prefix}input_layernorm.weight"),
            qkv=self._linear(*(f"{attention}{name}_proj." for name in "qkv")),
            q_norm=self._plain(norms["q_norm"]) if norms["q_norm"] in self._sizes else None,
            k_norm=self._plain(norms["k_norm"]) if norms["k_norm"] in self._sizes else None,
            output=self._linear(f"{attention}o_proj."),
            mlp_norm=self._plain(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._linear(f"{mlp}gate_proj.", f"{mlp}up_proj."),
            down=self._linear(f"{mlp}down_proj."),
        )

    def _plain(self, *names: str) -> Tensor:
        """One tensor that holds the named parameters one below the other; `_fill` writes into it."""
        rows = [self._sizes[name][0] for name in names]
        whole = torch.empty(sum(rows), *self._sizes[names[0]][1:], dtype=self.dtype, device=self.device)
        self._targets.update(zip(names, torch.split(whole, rows), strict=True))
        return whole

    def _linear(self, *prefixes: str) -> PackedLinear:
        """The named layers as one."""
        names = tuple(f"{prefix}weight" for prefix in prefixes)
        biases = [f"{prefix}bias" for prefix in prefixes]
        bias = self._plain(*biases) if biases[0] in self._sizes else None
        linear = self._fused[names] = PackedLinear(self.dtype, device=self.device, bias=bias)
        return linear

    def _stack(
        self, names: Sequence[str], weights: Mapping[str, npt.NDArray[np.generic]] | Mapping[str, Tensor]
    ) -> Tensor:
        rows = [self._sizes[name][0] for name in names]
        stacked = torch.empty(sum(rows), self._sizes[names[0]][1], dtype=self.dtype, device=self.device)
        for name, target in zip(names, torch.split(stacked, rows), strict=True):
            _copy(target, weights[name])
        return stacked


def _copy(target: Tensor, source: npt.NDArray[np.generic] | Tensor) -> None:
    """Copy a parameter, a float32 array, or one of uint16 that hold the bits of bfloat16."""
    if isinstance(source, Tensor):
        target.copy_(source)
    elif source.dtype == np.float32 and target.dtype is torch.float32 and target.device.type == "cpu":
        np.copyto(target.numpy(), source)
    else:
        target.copy_(as_tensor(source))


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
    assert isinstance(scaling, int | float)  # an int where config.json has one
    if len(frequencies) * 2 != head_dim:
        raise ModelError(f"rotary embedding of {len(frequencies) * 2} of {head_dim} dimensions is not supported")
    angles = torch.outer(torch.arange(max_length).float(), frequencies.float())
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)
