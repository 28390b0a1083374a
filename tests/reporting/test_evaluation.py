"""Figures of an evaluation and their bootstrap intervals, against hand arithmetic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rexrag.reporting.evaluation import NUM_RESAMPLES, bootstrap, summarize
from rexrag.types import EndReason, EpisodeScore, WeightVersion

VERSION = WeightVersion(incarnation="run", step=3)


def score(em: float, *, source: str = "world", hops: int | None = 1, gold: bool | None = None) -> EpisodeScore:
    return EpisodeScore(
        question_id="q",
        data_source=source,
        hops=hops,
        version=VERSION,
        em=em,
        f1=em / 2,
        num_searches=2,
        num_turns=4,
        num_malformed=1,
        num_tokens=10,
        gold_retrieved=gold,
        end_reason=EndReason.ANSWER,
    )


def test_the_interval_of_two_values_by_hand() -> None:
    """Resamples of (0, 1) have the means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4: both ends are far out in them."""
    found = bootstrap([0.0, 1.0])
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_the_interval_is_the_percentiles_of_resampled_means() -> None:
    values = [0.0, 0.0, 1.0, 1.0, 1.0]
    draws = np.random.default_rng(7).integers(0, 5, (NUM_RESAMPLES, 5))
    means = sorted(sum(values[i] for i in row) / 5 for row in draws.tolist())
    found = bootstrap(values, seed=7)
    # 2.5% of 1,000 sorted means: between the 25th and the 26th, and as far from the top.
    assert found.low == pytest.approx(means[24] + 0.975 * (means[25] - means[24]))
    assert found.high == pytest.approx(means[974] + 0.025 * (means[975] - means[974]))
    assert found.mean == pytest.approx(0.6)


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    samples = rng.random((300, 60)) < 0.3
    covered = [bootstrap(row.astype(float).tolist(), seed=i) for i, row in enumerate(samples)]
    share = sum(one.low <= 0.3 <= one.high for one in covered) / len(covered)
    assert 0.90 <= share <= 0.99


def test_equal_values_have_no_spread() -> None:
    found = bootstrap([1.0] * 7)
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)


def test_figures_by_hand() -> None:
    scores = [
        score(1.0, source="a", hops=1, gold=True),
        score(0.0, source="a", hops=2, gold=False),
        score(0.0, source="a", hops=None),
        score(1.0, source="b", hops=2, gold=True),
    ]
    report = summarize(scores)
    assert (report.n, report.em.mean, report.f1.mean) == (4, 0.5, 0.25)
    assert report.macro_em == pytest.approx((1 / 3 + 1) / 2)
    assert report.by_source == {"a": {"em": pytest.approx(1 / 3), "n": 3}, "b": {"em": 1.0, "n": 1}}
    assert report.by_hops == {"1": {"em": 1.0, "n": 1}, "2": {"em": 0.5, "n": 2}}
    assert report.valid_action_share.mean == 0.75
    assert report.retrieval_recall is not None
    assert report.retrieval_recall.mean == pytest.approx(2 / 3)


def test_scores_of_two_versions_are_no_evaluation() -> None:
    later = replace(score(1.0), version=WeightVersion(incarnation="run", step=4))
    with pytest.raises(ValueError, match="one version"):
        summarize([score(1.0), later])
