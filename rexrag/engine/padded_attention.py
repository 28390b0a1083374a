"""Attention of several sequences over the key-value cache as one product, for a GPU.

Legend: n sequences of the product, N most new tokens of one of them, T new tokens of all; H query heads, K key-value
heads, G = H / K; E head_dim; L positions read; S slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from rexrag.engine.llama_weights import LlamaShape

_LENGTH_STEP: Final = 8
"""Fused kernels want masks whose rows are aligned."""


class PaddedRows:
    """The new tokens of n sequences as a rectangle [n, N], their last token repeated where they have fewer.

    Attributes:
        tokens: which tokens of the pass these are.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int, int]],
        *,
        first: int,
        shape: LlamaShape,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            spans: slot, first new position and end of each sequence. first: token of the pass that they begin with.
            dtype: of the queries.
        """
        self._shape = shape
        counts = [end - start for _, start, end in spans]
        width = max(counts)
        self.tokens = slice(first, first + sum(counts))
        self._slots = torch.tensor([slot for slot, _, _ in spans], device=device)
        longest = max(end for _, _, end in spans)
        self._length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
        rows: list[list[int]] = []
        lasts: list[list[int]] = []
        places: list[int] = []
        row = 0
        for number, ((_, start, _), count) in enumerate(zip(spans, counts, strict=True)):
            columns = [min(column, count - 1) for column in range(width)]
            rows.append([row + column for column in columns])
            lasts.append([start + column for column in columns])
            places += range(number * width, number * width + count)
            row += count
        self._rows = torch.tensor(rows, device=device)
        self._places = torch.tensor(places, device=device)
        visible = torch.arange(self._length, device=device) <= torch.tensor(lasts, device=device)[:, :, None]
        mask = torch.where(visible, 0.0, -math.inf).to(dtype)
        group = shape.num_heads // shape.num_kv_heads
        self._mask = mask.repeat(1, group, 1)[:, None]  # [n, 1, G N, L]

    def attend(self, queries: Tensor, *, keys: Tensor, values: Tensor) -> Tensor:
        """[T, H E] from queries [T, H, E] over a layer's keys and values [S, K, positions, E].

        The query heads of a key-value head are rows of one product.
        """
        shape = self._shape
        num, width = self._rows.shape
        rows = queries[self._rows].view(num, width, shape.num_kv_heads, -1, shape.head_dim).permute(0, 2, 3, 1, 4)
        read = keys[:, :, : self._length][self._slots], values[:, :, : self._length][self._slots]
        mask = self._mask[..., : read[0].shape[2]]  # a slot may end before the rounded length
        attended = F.scaled_dot_product_attention(rows.flatten(2, 3), *read, attn_mask=mask)
        heads = attended.view(num, shape.num_kv_heads, -1, width, shape.head_dim).permute(0, 3, 1, 2, 4)
        return heads.reshape(num * width, -1)[self._places]
