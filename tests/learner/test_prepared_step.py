from __future__ import annotations

import pytest
from learner_builders import POOL, group, probe, target, trajectory
from plain_settings import correction_settings, loss_settings, probe_settings

from rexrag.errors import StaleGroupError
from rexrag.learner.branches import BranchRates
from rexrag.learner.prepared_step import PreparedStep, check_ages, prepare_step
from rexrag.learner.probe_filter import FilterKind
from rexrag.learner.trained_tokens import trained_tokens
from rexrag.types import EndReason, Origin, Trajectory, TrajectoryGroup


def prepare(
    *groups: TrajectoryGroup,
    rho: float = 1.0,
    kind: FilterKind = "hint_logprob",
) -> PreparedStep:
    return prepare_step(
        groups,
        rho=rho,
        probe=probe_settings(filter=kind),
        correction=correction_settings(),
        loss=loss_settings(),
        hints=POOL,
        rates=BranchRates(),
    )


def trained(row: Trajectory, *, train_hints: bool = True, train_prefix: bool = False) -> list[int]:
    tokens = trained_tokens(row, hints=POOL, transfer="hinted", train_hints=train_hints, train_prefix=train_prefix)
    assert tokens.source.tolist() == tokens.trained.tolist()
    return [int(at) for at in tokens.trained]


def test_what_is_trained() -> None:
    parts = [(Origin.POLICY, [10, 11]), (Origin.ENV, [12, 13]), (Origin.POLICY, [14])]
    assert trained(trajectory(parts)) == [3, 4, 7]
    # 3 prompt tokens, one kept token of the parent, two of the hint, two of its own.
    assert trained(probe()) == [4, 5, 6, 7]
    assert trained(probe(), train_hints=False) == [6, 7]
    assert trained(probe(), train_prefix=True) == [3, 4, 5, 6, 7]


def test_alpha_and_denominator_count_rows_after_the_filter_without_advantage_too() -> None:
    live = group(target(0.0), target(1.0), probe(1.0, logprob=-1.0), name="a")
    flat = group(target(1.0), target(1.0), name="b")
    dropped = group(target(0.0), target(0.0), probe(1.0, logprob=-5.0), name="c")
    step = prepare(live, flat, dropped, rho=0.18)  # ⌊0.18 · 6⌋ = 1: the likelier hint stays
    assert step.num_kept_probes == 1
    assert step.alpha == pytest.approx(1 / 7)
    assert step.denominator == 6 * 3 + 4
    assert (step.num_probes, step.num_right_probes) == (2, 2)
    assert (step.num_informative, step.num_filtered_flat) == (1, 1)
    assert [row.advantage != 0.0 for row in step.rows] == [True, True, True, False, False, False, False]


def test_advantages_are_computed_after_the_filter() -> None:
    step = prepare(group(target(0.0), target(1.0), probe(1.0)), rho=0.0)
    assert [row.advantage for row in step.rows] == pytest.approx([-0.7071, 0.7071], abs=1e-4)


def test_masked_rows_count_nowhere() -> None:
    masked = target(0.0, end_reason=EndReason.ENV_ERROR, ids=range(30, 60))
    step = prepare(group(masked, target(0.0), target(1.0), probe(1.0, parent=1)), kind="none")
    assert step.alpha == pytest.approx(1 / 3)
    assert step.denominator == 3 + 3 + 4
    assert [row.row for row in step.rows] == [1, 2, 3]
    assert [row.advantage for row in step.rows] == pytest.approx([-1.1547, 0.57735, 0.57735], abs=1e-4)


def test_ages() -> None:
    one = group(target(version=[3, 3, 4]), target(1.0, version=5))
    check_ages([one], version=5, max_staleness=2)
    with pytest.raises(StaleGroupError, match=r"version 3 at learner version 6: its age 3 exceeds .* 2"):
        check_ages([one], version=6, max_staleness=2)
    with pytest.raises(StaleGroupError, match="has only reached 4"):
        check_ages([one], version=4, max_staleness=2)
