"""Causal attention from matrix products, for a CPU that multiplies bfloat16 in hardware.

There the fused kernel's backward pass takes three times as long as its products do (torch 2.13, rows of 150 to 600
tokens). Scores exist for one block of queries at a time and are computed again in the backward pass.

Legend: H heads, G key/value heads, N queries, M keys, D head width.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_BLOCK: Final = 256
"""Queries whose scores exist at once; keys behind a block are not read."""


def block_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """[H, N, D] Attention of query [H, N, D], the last N positions, over key and value [G, M, D], causal.

    Products are in the inputs' precision, softmax and its gradient at least in float32.
    """
    num_queries, num_keys = query.shape[1], key.shape[1]
    parts = []
    for start in range(0, num_queries, _BLOCK):
        end = min(start + _BLOCK, num_queries)
        visible = num_keys - num_queries + end
        parts.append(_BlockAttention.apply(query[:, start:end], key[:, :visible], value[:, :visible], scale))  # type: ignore[no-untyped-call]
    return torch.cat(parts, dim=1)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor, Tensor]
    scale: float


class _BlockAttention(torch.autograd.Function):
    """softmax(q kᵀ · scale + causal mask) v of the last positions."""

    @staticmethod
    def forward(ctx: _Context, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        rows, probs = _probabilities(query, key, scale)
        return torch.bmm(probs.to(rows.dtype), value).view_as(query)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        rows, probs = _probabilities(query, key, ctx.scale)
        grad_rows = _rows_of(grad, len(key))
        grad_value = torch.bmm(probs.to(rows.dtype).transpose(1, 2), grad_rows)
        grad_probs = torch.bmm(grad_rows, value.transpose(1, 2)).to(probs.dtype)
        # d softmax: p (g - Σ p g), in the memory of g.
        weighted = (grad_probs * probs).sum(-1, keepdim=True)
        grad_scores = grad_probs.sub_(weighted).mul_(probs).to(rows.dtype)
        grad_query = torch.bmm(grad_scores, key).mul_(ctx.scale)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), rows).mul_(ctx.scale)
        return grad_query.view_as(query), grad_key, grad_value, None


def _rows_of(heads: Tensor, num_groups: int) -> Tensor:
    """[G, H / G · N, D]: the query heads of a key/value head are rows of one product."""
    return heads.reshape(num_groups, -1, heads.shape[-1])


def _probabilities(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The rows of `query`, and their attention [G, H / G · N, M], at least float32."""
    rows = _rows_of(query, len(key))
    scores = torch.bmm(rows, key.transpose(1, 2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale)
    num_queries, num_keys = query.shape[1], key.shape[1]
    own = scores.view(len(key), -1, num_queries, num_keys)[..., num_keys - num_queries :]
    own.masked_fill_(torch.ones(num_queries, num_queries, dtype=torch.bool).triu(1), -math.inf)
    return rows, scores.softmax(-1)
