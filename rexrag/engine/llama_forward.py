"""Forward pass of a Llama-like model over packed tokens of many sequences, with a static key-value cache.

Legend: N tokens of all sequences of the pass; D width; H query heads, K key-value heads, G = H / K; E head_dim;
S slots.

Linear layers see all tokens at once, padded by nothing. Attention on a CPU goes sequence by sequence where several
tokens are new, and over runs of neighbouring slots where one is: then keys and values are read where they lie. On a
GPU, where a call costs more than what it reads for nothing, it takes one call for each of the two kinds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rexrag.engine.kv_cache import KvCache, attention_runs
from rexrag.engine.llama_weights import LayerWeights, LlamaWeights
from rexrag.engine.padded_attention import PaddedRows


@dataclass(frozen=True, kw_only=True)
class Span:
    """New tokens of one sequence: they take positions start .. start + len - 1 of its slot."""

    slot: int
    start: int
    token_ids: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class LlamaForward:
    """Runs spans through the model and the cache.

    Example:
        >>> hidden = forward([Span(slot=0, start=0, token_ids=[5, 3, 8])])   # [3, D]
    """

    def __init__(self, weights: LlamaWeights, *, cache: KvCache) -> None:
        self._weights = weights
        self._cache = cache
        shape = weights.shape
        self._queries = torch.zeros(
            cache.keys[0].shape[0], shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.head_dim,
            dtype=weights.dtype, device=weights.device,
        )  # fmt: skip
        self._attended = torch.zeros_like(self._queries)

    @torch.inference_mode()
    def __call__(self, spans: Sequence[Span]) -> Tensor:
        """[N, D] hidden states before the last norm, of the spans' tokens one after the other.

        Spans of one token must come first, by ascending slot.
        """
        batch = _Batch(spans, weights=self._weights, cache=self._cache)
        hidden = self._weights.embedding[batch.token_ids]
        for index, layer in enumerate(self._weights.layers):
            hidden = self._layer(index, layer, hidden, batch)
        return hidden

    @torch.inference_mode()
    def last_norm(self, hidden: Tensor) -> Tensor:
        """[M, D] What the output matrix is applied to."""
        return _rms_norm(hidden, self._weights.final_norm, self._weights.shape.norm_eps)

    def _layer(self, index: int, layer: LayerWeights, hidden: Tensor, batch: _Batch) -> Tensor:
        eps = self._weights.shape.norm_eps
        queries = self._project(index, layer, _rms_norm(hidden, layer.attention_norm, eps), batch)
        hidden = hidden + layer.output(self._attend(index, queries, batch))
        gate, up = layer.gate_up(_rms_norm(hidden, layer.mlp_norm, eps)).chunk(2, dim=-1)
        return hidden.add_(layer.down(F.silu(gate).mul_(up)))

    def _project(self, index: int, layer: LayerWeights, normed: Tensor, batch: _Batch) -> Tensor:
        """[N, H, E] queries; keys and values go into the cache."""
        shape = self._weights.shape
        projected = layer.qkv(normed).view(len(normed), -1, shape.head_dim)
        num_rotated = shape.num_heads + shape.num_kv_heads
        rotated, values = projected[:, :num_rotated], projected[:, num_rotated:]
        if layer.q_norm is not None and layer.k_norm is not None:
            queries = _rms_norm(rotated[:, : shape.num_heads], layer.q_norm, shape.norm_eps)
            keys = _rms_norm(rotated[:, shape.num_heads :], layer.k_norm, shape.norm_eps)
            rotated = torch.cat([queries, keys], dim=1)
        rotated = _rotate(rotated, batch.cos, batch.sin)
        self._cache.write(
            index, slots=batch.slots, positions=batch.positions, keys=rotated[:, shape.num_heads :], values=values
        )
        return rotated[:, : shape.num_heads]

    def _attend(self, index: int, queries: Tensor, batch: _Batch) -> Tensor:
        """[N, H E] attention over the cache, each token over the positions up to its own."""
        shape = self._weights.shape
        attended = queries.new_empty(len(queries), shape.num_heads * shape.head_dim)
        for part in batch.padded:
            attended[part.tokens] = part.attend(
                queries[part.tokens], keys=self._cache.keys[index], values=self._cache.values[index]
            )
        if batch.runs:
            attended[: batch.num_single] = self._attend_single(index, queries[: batch.num_single], batch)
        for span, mask, rows in batch.chunks:
            attended[rows] = self._attend_chunk(index, queries[rows], span, mask)
        return attended

    def _attend_single(self, index: int, queries: Tensor, batch: _Batch) -> Tensor:
        """[n, H E] for sequences with one new token each, run by run of neighbouring slots."""
        shape = self._weights.shape
        slots = batch.slots[: batch.num_single]
        scaled = queries * shape.head_dim**-0.5
        self._queries[slots] = scaled.reshape(-1, *self._queries.shape[1:])
        for (first, end, length), mask in zip(batch.runs, batch.run_masks, strict=True):
            keys = self._cache.keys[index][first:end, :, :length]
            values = self._cache.values[index][first:end, :, :length]
            scores = torch.matmul(self._queries[first:end], keys.transpose(-1, -2)).float().add_(mask)
            self._attended[first:end] = torch.matmul(scores.softmax(-1).to(values.dtype), values)
        return self._attended[slots].view(len(slots), -1)

    def _attend_chunk(self, index: int, queries: Tensor, span: Span, mask: Tensor) -> Tensor:
        """[n, H E] for the n new tokens of one sequence; query heads of a key-value head are rows of one product."""
        shape = self._weights.shape
        num_tokens = len(queries)
        rows = queries.transpose(0, 1).reshape(1, shape.num_kv_heads, -1, shape.head_dim)
        keys = self._cache.keys[index][span.slot : span.slot + 1, :, : span.end]
        values = self._cache.values[index][span.slot : span.slot + 1, :, : span.end]
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
        return attended.view(shape.num_heads, num_tokens, shape.head_dim).transpose(0, 1).reshape(num_tokens, -1)


class _Batch:
    """What all layers of one pass share."""

    def __init__(self, spans: Sequence[Span], *, weights: LlamaWeights, cache: KvCache) -> None:
        device = weights.device
        self.token_ids = torch.tensor([token for span in spans for token in span.token_ids], device=device)
        self.positions = torch.tensor([p for span in spans for p in range(span.start, span.end)], device=device)
        self.slots = torch.tensor([span.slot for span in spans for _ in span.token_ids], device=device)
        self.cos, self.sin = weights.cos[self.positions, None], weights.sin[self.positions, None]
        single = [span for span in spans if len(span.token_ids) == 1]
        assert all(len(span.token_ids) == 1 for span in spans[: len(single)]), "single tokens come first"
        self.num_single = len(single)
        self.padded: list[PaddedRows] = []
        self.runs: list[tuple[int, int, int]] = []
        self.chunks: list[tuple[Span, Tensor, slice]] = []
        if device.type == "cpu":
            self._cut(spans, single, weights=weights, cache=cache)
        else:
            self._pad(spans, single, weights=weights)

    def _cut(self, spans: Sequence[Span], single: Sequence[Span], *, weights: LlamaWeights, cache: KvCache) -> None:
        runs = attention_runs([s.slot for s in single], [s.end for s in single]) if single else []
        self.runs = [(first, end, cache.reading_length(length)) for first, end, length in runs]
        ends = {span.slot: span.end for span in single}
        self.run_masks = [_length_mask(ends, first=first, end=end, length=length) for first, end, length in self.runs]
        group = weights.shape.num_heads // weights.shape.num_kv_heads
        first = self.num_single
        for span in spans[self.num_single :]:
            rows = slice(first, first + len(span.token_ids))
            self.chunks.append((span, _causal_mask(span, group=group, dtype=weights.dtype), rows))
            first = rows.stop

    def _pad(self, spans: Sequence[Span], single: Sequence[Span], *, weights: LlamaWeights) -> None:
        first = 0
        for part in (single, spans[self.num_single :]):
            if part:
                rows = PaddedRows(
                    [(span.slot, span.start, span.end) for span in part], first=first, shape=weights.shape,
                    dtype=weights.dtype, device=weights.device,
                )  # fmt: skip
                self.padded.append(rows)
                first = rows.tokens.stop


def _length_mask(ends: dict[int, int], *, first: int, end: int, length: int) -> Tensor:
    """[slots of the run, 1, 1, length] 0 where a slot's sequence has a token, -inf behind; idle slots see all."""
    visible = torch.tensor([ends.get(slot, length) for slot in range(first, end)])
    return torch.where(torch.arange(length) < visible[:, None], 0.0, -math.inf)[:, None, None]


def _causal_mask(span: Span, *, group: int, dtype: torch.dtype) -> Tensor:
    """[G n, end] 0 for positions up to a token's own, -inf behind, once for each query head of a group."""
    visible = torch.arange(span.end) <= torch.arange(span.start, span.end)[:, None]
    return torch.where(visible, 0.0, -math.inf).to(dtype).repeat(group, 1)


def _rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last dimension, in float32."""
    if inputs.device.type != "cpu":
        return F.rms_norm(inputs, (inputs.shape[-1],), weight, eps)
    wide = inputs.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(inputs.dtype).mul_(weight)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [N, heads, E] by angles [N, 1, E / 2]."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
