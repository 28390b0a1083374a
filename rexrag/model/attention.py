"""Causal attention over a packed micro-batch, registered with transformers.

The packed tokens are one sequence of which each row owns a contiguous stretch of queries. Its keys are all tokens
of the row, wherever they stand: a prefix that it shares with another row is read from there. No token is padding
and no score between rows is computed.

Legend: P packed tokens, K key positions of all rows, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from rexrag.errors import ModelError, counted
from rexrag.model.block_attention import block_attention

PACKED_ATTENTION: Final = "rexrag_packed"


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLayout:
    """Which keys each row's queries read.

    Attributes:
        query_lengths: tokens that each row brings, in packed order; they add up to P.
        key_lengths: tokens of each row, shared ones included; they add up to K.
        query_starts, key_starts: [rows + 1] where each row begins among P and K, and their ends; int32.
        key_index: [K] packed positions of the rows' tokens; None where no row shares (K = P, in order).
    """

    query_lengths: list[int]
    key_lengths: list[int]
    query_starts: Tensor
    key_starts: Tensor
    key_index: Tensor | None

    @cached_property
    def masks(self) -> tuple[Tensor | None, ...]:
        """Per row the [queries, keys] causal mask, True where read; None where a row brings all its tokens.

        Made when asked for, since not every kernel needs them.
        """
        device = self.query_starts.device
        return tuple(
            torch.ones(new, keys, dtype=torch.bool, device=device).tril(keys - new) if new < keys else None
            for new, keys in zip(self.query_lengths, self.key_lengths, strict=True)
        )

    @classmethod
    def build(
        cls, *, num_new: Sequence[int], key_places: Sequence[npt.NDArray[np.int64]], device: torch.device | None = None
    ) -> PackedLayout:
        """From the number of tokens that each row brings and the packed places of all its tokens."""
        key_lengths = [len(places) for places in key_places]
        shares = any(new < keys for new, keys in zip(num_new, key_lengths, strict=True))
        key_index = torch.from_numpy(np.concatenate(key_places)).to(device) if shares else None
        return cls(
            query_lengths=list(num_new),
            key_lengths=key_lengths,
            query_starts=_starts(num_new, device),
            key_starts=_starts(key_lengths, device),
            key_index=key_index,
        )


def _starts(lengths: Sequence[int], device: torch.device | None) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make `model` attend by the `packed_layout` that its forward pass is given."""
    model.set_attn_implementation(PACKED_ATTENTION)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: PackedLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of each row over its own tokens: query [1, H, P, D], key and value [1, G, P, D] → [1, P, H, D].

    Raises:
        ModelError: a row is longer than the layer's sliding window, which packed rows do not have.
    """
    if sliding_window is not None and max(packed_layout.key_lengths) > sliding_window:
        raise ModelError(
            f"a row has {counted(max(packed_layout.key_lengths), 'token')}, the model's sliding window is "
            f"{sliding_window}: "
            f"lower env.max_trajectory_tokens to at most {sliding_window}, or take a model with full attention"
        )
    if packed_layout.key_index is not None:
        key = key.index_select(2, packed_layout.key_index)
        value = value.index_select(2, packed_layout.key_index)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if device == "cuda" and torch.is_autocast_enabled("cuda"):
        return _varlen(query[0], key[0], value[0], packed_layout, scale)[None].to(query.dtype), None
    rows = zip(
        torch.split(query, packed_layout.query_lengths, dim=2),
        torch.split(key, packed_layout.key_lengths, dim=2),
        torch.split(value, packed_layout.key_lengths, dim=2),
        strict=True,
    )
    if device == "cpu" and torch.is_autocast_enabled("cpu"):
        parts = [_blockwise(q, k, v, scale) for q, k, v in rows if q.shape[2]]
    else:
        masked = zip(rows, packed_layout.masks, strict=True)
        parts = [_fused(q, k, v, mask, scale) for (q, k, v), mask in masked if q.shape[2]]
    return torch.cat(parts, dim=2).transpose(1, 2).to(query.dtype), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """[P, H, D] from [H, P, D] and [G, K, D]: all rows in one call, each row's queries being the last of its keys."""
    narrow = torch.get_autocast_dtype("cuda")
    attended = varlen_attn(
        query.transpose(0, 1).to(narrow),
        key.transpose(0, 1).to(narrow),
        value.transpose(0, 1).to(narrow),
        layout.query_starts,
        layout.key_starts,
        max(layout.query_lengths),
        max(layout.key_lengths),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=len(query) != len(key),
    )
    assert isinstance(attended, Tensor)
    return attended


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and query.device.type == "cuda":
        # There grouped heads and float32 together have the kernel alone that keeps all scores for the backward pass.
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        repeats = 1
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=repeats > 1
    )


def _blockwise(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal, of the last positions, as all masks of a layout are."""
    narrow = torch.get_autocast_dtype("cpu")
    return block_attention(query[0].to(narrow), key[0].to(narrow), value[0].to(narrow), scale=scale)[None]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
