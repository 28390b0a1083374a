"""Block attention against torch's own, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import rexrag.model.block_attention as module
from rexrag.model.block_attention import block_attention


def inputs(*, queries: int, keys: int, dtype: torch.dtype, heads: int = 6, groups: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = (heads, queries, 8), (groups, keys, 8), (groups, keys, 8)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def reference(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    queries, keys = query.shape[1], key.shape[1]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=scale, enable_gqa=True
    )[0]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (4, 9), (10, 10), (9, 20)])
def test_equals_the_fused_kernel_in_values_and_gradients(
    queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4)
    ours, theirs = (inputs(queries=queries, keys=keys, dtype=torch.float64) for _ in range(2))
    out, expected = block_attention(*ours, scale=0.3), reference(*theirs, scale=0.3)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, ours, upstream), torch.autograd.grad(expected, theirs, upstream)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_bfloat16_is_within_its_precision() -> None:
    narrow = inputs(queries=300, keys=310, dtype=torch.bfloat16)
    wide = tuple(one.detach().float().requires_grad_() for one in narrow)
    out, expected = block_attention(*narrow, scale=0.35), reference(*wide, scale=0.35)
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(out, narrow, upstream.bfloat16()), torch.autograd.grad(expected, wide, upstream)
    for mine, other in zip(*gradients, strict=True):
        assert float((mine.float() - other).norm() / other.norm()) < 0.02
