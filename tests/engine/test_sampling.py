from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.engine.packed_linear import PackedLinear
from rexrag.engine.sampling import Sampler, counter_uniforms


def sampler_of(logits: torch.Tensor) -> tuple[Sampler, torch.Tensor]:
    """A sampler and hidden states [M, D] that give the logits [M, V] exactly."""
    return sampler_with(logits.t().contiguous()), torch.eye(len(logits))


def sampler_with(head: torch.Tensor) -> Sampler:
    """A sampler with the output matrix [V, D]."""
    linear = PackedLinear(head.dtype, device=head.device)
    linear.load(head)
    return Sampler(linear, vocab_size=len(head), device=head.device)


def sample(logits: torch.Tensor, uniforms: list[float], *, greedy: bool = False) -> tuple[list[int], list[float]]:
    sampler, hidden = sampler_of(logits)
    return sampler.sample(hidden, uniforms=np.array(uniforms), greedy=np.full(len(uniforms), greedy))


def test_uniforms_depend_on_seed_and_counter_alone() -> None:
    together = counter_uniforms([5, 5, -1, 2**70 + 3], [0, 1, 0, 9])
    alone = [counter_uniforms([seed], [counter])[0] for seed, counter in [(5, 0), (5, 1), (-1, 0), (3 + 2**70, 9)]]
    assert together.tolist() == alone
    assert len(set(alone)) == 4


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    seeds, counters = np.meshgrid(np.arange(400), np.arange(100), indexing="ij")
    uniforms = counter_uniforms(seeds.ravel().tolist(), counters.ravel().tolist()).reshape(400, 100)
    assert 0 < uniforms.min() < uniforms.max() < 1
    counts = np.histogram(uniforms, bins=50, range=(0, 1))[0]
    assert ((counts - 800) ** 2 / 800).sum() < 100  # chi-square, 49 degrees of freedom
    for shifted, base in [(uniforms[:, 1:], uniforms[:, :-1]), (uniforms[1:], uniforms[:-1])]:
        assert abs(np.corrcoef(shifted.ravel(), base.ravel())[0, 1]) < 0.02


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 3.0, 30.0]))
@settings(max_examples=60, deadline=None)
def test_the_draw_is_the_inverse_cumulative_distribution(vocab_size: int, seed: int, scale: float) -> None:
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    probabilities = logits[0].double().softmax(0)
    cdf = probabilities.cumsum(0)
    grid = np.linspace(2**-53, 1 - 2**-53, 101)
    tokens, logprobs = sample(logits.expand(101, -1).contiguous(), grid.tolist())
    for uniform, token, logprob in zip(grid, tokens, logprobs, strict=True):
        assert cdf[token] - probabilities[token] - 1e-6 <= uniform <= cdf[token] + 1e-6
        assert logprob == pytest.approx(probabilities[token].log().item(), abs=2e-5)


@given(st.integers(2, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_impossible_tokens_are_never_drawn(vocab_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    possible = torch.rand(vocab_size, generator=generator) < 0.2
    possible[seed % vocab_size] = True
    logits = torch.where(possible, torch.randn(vocab_size, generator=generator), -math.inf)
    sampler = sampler_with(logits[:, None].clone())
    uniforms = np.array([2**-53, 2**-52, 0.5, 1 - 2**-53])
    tokens, logprobs = sampler.sample(torch.ones(4, 1), uniforms=uniforms, greedy=np.zeros(4, bool))
    assert possible[tokens].all()
    assert np.isfinite(logprobs).all()


def test_frequencies_match_a_large_vocabulary() -> None:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)) * 2
    sampler = sampler_with(logits.t().contiguous())
    uniforms = counter_uniforms([11] * 20000, list(range(20000)))
    tokens, logprobs = sampler.sample(torch.ones(20000, 1), uniforms=uniforms, greedy=np.zeros(20000, bool))
    probabilities = logits[0].double().softmax(0).numpy()
    order = probabilities.argsort()[::-1]
    rank = np.empty_like(order)
    rank[order] = np.arange(5000)
    bins = [0, 1, 3, 10, 30, 100, 300, 1000, 5000]
    observed = np.histogram(rank[tokens], bins=bins)[0]
    expected = [20000 * probabilities[order[a:b]].sum() for a, b in pairwise(bins)]
    assert ((observed - expected) ** 2 / expected).sum() < 24  # chi-square, 7 degrees of freedom, p = 0.001
    np.testing.assert_allclose(logprobs, np.log(probabilities[tokens]), atol=2e-6)


def test_greedy_and_drawn_columns_mix() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    sampler, hidden = sampler_of(logits)
    tokens, logprobs = sampler.sample(hidden, uniforms=np.array([0.0, 0.0]), greedy=np.array([True, False]))
    assert tokens == [1, 0]
    np.testing.assert_allclose(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]], atol=1e-6)


def test_scores_are_log_softmax_in_blocks_too() -> None:
    logits = torch.randn(300, 37, generator=torch.Generator().manual_seed(2)) * 4
    sampler, hidden = sampler_of(logits)
    targets = torch.randint(37, (300,)).tolist()
    np.testing.assert_allclose(sampler.score(hidden, targets), logits.log_softmax(-1)[range(300), targets], atol=1e-5)


def test_bfloat16_heads_give_float32_logprobs_of_their_own_logits() -> None:
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(37, 8, generator=generator).to(torch.bfloat16)
    hidden = torch.randn(5, 8, generator=generator).to(torch.bfloat16)
    tokens, logprobs = sampler_with(head).sample(hidden, uniforms=np.full(5, 0.4), greedy=np.zeros(5, bool))
    expected = (hidden @ head.t()).float().log_softmax(1)[range(5), tokens]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
