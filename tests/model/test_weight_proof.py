"""Buckets in which weights travel, and the sum of their bits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rexrag.model.weight_proof import MODULUS, bit_sum, in_buckets


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 60))
def test_each_weight_is_in_one_bucket_in_order_and_only_a_single_one_is_larger(sizes: list[int], most: int) -> None:
    named = {f"w{i}": size for i, size in enumerate(sizes)}
    buckets = in_buckets(named, most_bytes=most)
    assert [name for bucket in buckets for name in bucket] == list(named)
    for bucket in buckets:
        assert len(bucket) == 1 or sum(named[name] for name in bucket) <= most
    for first, second in pairwise(buckets):
        assert sum(named[name] for name in first) + named[second[0]] > most, "none is smaller than it could be"


def test_the_sum_of_the_bits_of_all_is_that_of_the_buckets() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=n).astype(np.float32) for n in (3, 1000, 17)]
    assert sum(bit_sum([array]) for array in arrays) % MODULUS == bit_sum(arrays)
