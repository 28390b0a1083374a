"""How much of a slot a product reads."""

from __future__ import annotations

import pytest
import torch

from rexrag.engine.kv_cache import KvCache


@pytest.mark.parametrize("max_length", [1, 31, 40, 576])
def test_reading_length_covers_what_counts_in_few_sizes(max_length: int) -> None:
    def lengths(dtype: torch.dtype) -> list[int]:
        cache = KvCache(
            num_layers=1,
            num_slots=1,
            num_kv_heads=1,
            max_length=max_length,
            head_dim=2,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        return [cache.reading_length(length) for length in range(1, max_length + 1)]

    needed = list(range(1, max_length + 1))
    assert lengths(torch.float32) == needed
    narrow = lengths(torch.bfloat16)
    assert all(length <= read <= max_length for length, read in zip(needed, narrow, strict=True))
    assert len(set(narrow)) <= max_length // 64 + 2
