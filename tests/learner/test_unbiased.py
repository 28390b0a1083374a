"""§10.1: the expected gradient of the weighted estimator, by enumeration, and the bias of all that is not exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from enumerated_estimates import Case, World, estimate
from enumerated_gradient import Moments

from rexrag.types import Kind

pytestmark = pytest.mark.usefixtures("double_precision")

DOCS = Path(__file__).parents[2] / "docs" / "estimators.md"

EXACT = [Case(name="exact"), Case(name="exact, hint-free", transfer="hint_free")]
LOO = Case(name="`loss.baseline = loo`", baseline="loo")
BIASED = [
    Case(name="φ = 1", phi="one"),
    Case(name="φ estimated by turn and the token before", phi="estimated"),
    Case(name="`token`", mixture="token"),
    Case(name="`token`, prefix and hint not trained", mixture="token", train_prefix=False, train_hints=False),
    Case(name="`none`", mixture="none"),
    Case(name="`correction.cap = 2` on staleness", cap=2.0),
    Case(name="hints below the median likelihood dropped", keep_hints_above=0.5),
    Case(name="`loss.baseline = joint`", baseline="joint"),
    Case(name="`loss.baseline = target`", baseline="target"),
    Case(name="N = rows of the step", count_rows=True),
    Case(name="prefix not trained", train_prefix=False),
    Case(name="hint-free: φ = 1", transfer="hint_free", phi="one"),
    Case(name="hint-free: φ estimated", transfer="hint_free", phi="estimated"),
    Case(name="hint-free: scored under the last version", transfer="hint_free", score_by_path=False),
    Case(name="hint-free: hint counts towards the turn's tokens", transfer="hint_free", hint_in_limits=True),
    Case(name="hint-free: `token`", transfer="hint_free", mixture="token"),
    Case(name="hint-free: `none`", transfer="hint_free", mixture="none"),
]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_every_row_is_there(world: World, case: Case) -> None:
    rows = world.rows(case)
    targets = [row for row in rows if row.trajectory.kind is Kind.TARGET]
    assert sum(row.probability for row in targets) == pytest.approx(1.0, abs=1e-12)
    dead = sum(row.probability for row in targets if not row.trajectory.correct and row.prefix is not None)
    probes = sum(row.probability for row in rows if row.trajectory.kind is Kind.PROBE)
    assert probes == pytest.approx(world.toy.probe_rate * dead, abs=1e-12)
    assert 0.1 < probes < 0.5


@pytest.mark.parametrize("case", [*EXACT, LOO], ids=lambda case: case.name)
def test_the_expected_gradient_is_the_on_policy_gradient(world: World, case: Case) -> None:
    got = estimate(world, case)
    assert np.abs(world.exact.mean).max() > 1e-3
    assert np.abs(got.mean - world.exact.mean).max() < 1e-10


@pytest.mark.slow
@pytest.mark.timeout(900)  # all cases, all trajectories: minutes of one core
def test_the_bias_of_everything_else_is_the_documented_one(world: World) -> None:
    lines = [line_of(world, "targets alone, on-policy", world.exact)]
    for case in (*EXACT, LOO, *BIASED):
        moments = estimate(world, case)
        if case in BIASED:
            assert world.relative(moments)[0] > 1e-6, f"{case.name} is exact"
        lines.append(line_of(world, case.name, moments))
    missing = [line for line in lines if line not in DOCS.read_text().splitlines()]
    assert not missing, "docs/estimators.md lacks\n" + "\n".join(lines)


def line_of(world: World, name: str, moments: Moments) -> str:
    bias, cosine, deviation = world.relative(moments)
    shown = "0" if bias < 1e-8 else f"{bias:.2f}" if bias >= 0.005 else f"{bias:.0e}"
    return f"| {name} | {shown} | {cosine:.2f} | {deviation:.1f} |"
