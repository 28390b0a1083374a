"""Buckets in which weights travel, and the sum of their bits."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.model.weight_proof import MODULUS, Precision, WeightProof, bit_sum, in_buckets, problem_of


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


@pytest.mark.parametrize(
    ("logprob", "off", "precision", "holds"),
    [
        (-25.0, 0.5, "bfloat16", True),  # an unlikely prompt: rounding grows with the log-prob
        (-25.0, 5.0, "bfloat16", False),
        (-0.5, 0.05, "bfloat16", True),
        (-0.5, 0.3, "bfloat16", False),
        (-25.0, 0.001, "float32", True),
        (-25.0, 0.5, "float32", False),
        (-0.5, math.nan, "bfloat16", False),
    ],
)
def test_how_far_an_engine_may_be_off_grows_with_the_log_prob(
    logprob: float, off: float, precision: Precision, holds: bool
) -> None:
    ours = (np.full(3, logprob, np.float32),)
    proof = WeightProof(
        canary=((1, 2, 3, 4),), logprobs=ours, moved=math.inf, bits=None, dtype=precision, precision=precision
    )
    problem = problem_of(proof, scores=[ours[0] + np.float32(off)], bits=None)
    assert (problem is None) is holds, problem
