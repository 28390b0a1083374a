from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from learner_builders import probe

from rexrag.learner.probe_filter import INITIAL_SUCCESS, ProbeScore, hint_score, kept_probes, rho_of, updated_success


def scores(*values: float) -> list[ProbeScore]:
    return [ProbeScore(group=i, row=4, score=value) for i, value in enumerate(values)]


def test_rate_follows_success_within_its_bounds() -> None:
    m = INITIAL_SUCCESS
    assert rho_of(m, kind="hint_logprob") == 0.18
    m = updated_success(m, right=0, probes=10)
    assert m == pytest.approx(0.162)
    assert rho_of(m, kind="hint_logprob") == pytest.approx(0.162)
    assert updated_success(m, right=0, probes=0) == m
    for _ in range(100):
        m = updated_success(m, right=0, probes=5)
    assert rho_of(m, kind="hint_logprob") == 0.02
    for _ in range(20):
        m = updated_success(m, right=5, probes=5)
    assert rho_of(m, kind="hint_logprob") == 0.18
    assert rho_of(0.0, kind="none") == 1.0


def test_best_hints_are_kept_over_the_whole_step() -> None:
    probes = scores(-3.0, -1.0, -2.0, -1.0)
    assert kept_probes(probes, num_targets=10, rho=0.18, kind="hint_logprob") == {(1, 4)}
    assert kept_probes(probes, num_targets=12, rho=0.18, kind="hint_logprob") == {(1, 4), (3, 4)}
    assert kept_probes(probes, num_targets=1000, rho=0.18, kind="hint_logprob") == {(i, 4) for i in range(4)}
    assert kept_probes(probes, num_targets=5, rho=0.18, kind="hint_logprob") == frozenset()
    assert kept_probes(probes, num_targets=5, rho=0.18, kind="none") == {(i, 4) for i in range(4)}


@given(st.lists(st.floats(-50, 0), max_size=20), st.integers(1, 100), st.floats(0.02, 0.18))
def test_quota(values: list[float], num_targets: int, rho: float) -> None:
    kept = kept_probes(scores(*values), num_targets=num_targets, rho=rho, kind="hint_logprob")
    assert len(kept) == min(len(values), int(rho * num_targets + 1e-9))
    worst = min((values[g] for g, _ in kept), default=0.0)
    assert all(value <= worst for i, value in enumerate(values) if (i, 4) not in kept) or not kept


def test_score_is_over_hint_tokens_alone() -> None:
    row = probe(hint_id=0, logprob=[-9.0, -1.0, -2.0, -7.0, -7.0])
    assert hint_score(row) == pytest.approx(-1.5)
