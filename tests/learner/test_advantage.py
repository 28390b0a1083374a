from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import ConfigError
from rexrag.learner.advantage import Baseline, group_advantages, likelihood_advantages


def advantages(
    rewards: Sequence[float], probes: Sequence[bool], family: Sequence[int], baseline: Baseline
) -> list[float]:
    values = group_advantages(np.array(rewards), is_probe=np.array(probes, bool), family=family, baseline=baseline)
    return list(values.tolist())


ROWS = ([0.0, 0.0, 1.0, 1.0], [False, False, False, True], [0, 1, 2, 0])
STD = math.sqrt(1 / 3)  # of 0, 0, 1, 1 with ddof 1


def test_joint() -> None:
    unit = 0.5 / (STD + 1e-6)
    assert advantages(*ROWS, "joint") == pytest.approx([-unit, -unit, unit, unit], abs=1e-12)


def test_target() -> None:
    low, high = (-1 / 3) / (STD + 1e-6), (2 / 3) / (STD + 1e-6)
    assert advantages(*ROWS, "target") == pytest.approx([low, low, high, high], abs=1e-12)


def test_leave_family_out() -> None:
    # Row 0 and its probe (row 3) are compared with rows 1 and 2; row 1 with 0, 2, 3; row 2 with 0, 1, 3.
    assert advantages(*ROWS, "loo") == pytest.approx([-0.5, -2 / 3, 1 - 1 / 3, 0.5], abs=1e-12)


def test_one_family_has_no_baseline() -> None:
    assert advantages([0.0, 1.0], [False, True], [0, 0], "loo") == [0.0, 0.0]


@pytest.mark.parametrize("baseline", ["joint", "target", "loo"])
@pytest.mark.parametrize("rewards", [[0.7], [0.1, 0.1, 0.1]])
def test_flat_groups_have_none(rewards: list[float], baseline: Baseline) -> None:
    assert advantages(rewards, [False] * len(rewards), list(range(len(rewards))), baseline) == [0.0] * len(rewards)


def likelihood(rewards: list[float], log_weights: list[float], *, num_targets: int) -> list[float]:
    found = likelihood_advantages(np.array(rewards), log_weights=np.array(log_weights), num_targets=num_targets)
    return [float(value) for value in found]


def test_shares_of_weights_by_hand() -> None:
    """W = (1, 2, 1), R = (0, 1, 1): Σ w·R = 3, Σ w = 4; A = 2·(w·R/3 − w/4)."""
    found = likelihood([0.0, 1.0, 1.0], [0.0, math.log(2.0), 0.0], num_targets=2)
    assert found == pytest.approx([-0.5, 2 * (2 / 3 - 1 / 2), 2 * (1 / 3 - 1 / 4)])


def test_with_equal_weights_it_is_maximum_likelihood_reinforcement_learning() -> None:
    rewards = [0.0, 1.0, 0.0, 0.25]
    mean = sum(rewards) / 4
    found = likelihood(rewards, [-3.0] * 4, num_targets=4)
    assert found == pytest.approx([(reward - mean) / mean for reward in rewards])


def test_with_one_right_row_its_advantage_is_what_its_weight_leaves() -> None:
    log_weights = [0.0, -0.7, -92.0, 0.4]
    share = math.exp(-92.0) / sum(map(math.exp, log_weights))
    found = likelihood([0.0, 0.0, 1.0, 0.0], log_weights, num_targets=3)
    assert found[2] == pytest.approx(3 * (1 - share))
    assert sum(found) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("rewards", "log_weights"),
    [
        ([0.0, 0.0], [0.0, 0.0]),
        ([1.0, 1.0], [0.0, -5.0]),
        ([0.0, 1.0], [0.0, -math.inf]),
        ([1.0], [0.0]),
    ],
)
def test_nothing_to_learn_is_zero(rewards: list[float], log_weights: list[float]) -> None:
    assert likelihood(rewards, log_weights, num_targets=1) == [0.0] * len(rewards)


@given(
    rows=st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.floats(-700.0, 50.0)), min_size=2, max_size=64),
    shift=st.floats(-600.0, 600.0),
)
def test_shares_are_finite_sum_to_zero_and_know_no_scale(rows: list[tuple[float, float]], shift: float) -> None:
    rewards, log_weights = [list(column) for column in zip(*rows, strict=True)]
    found = likelihood(rewards, log_weights, num_targets=4)
    assert all(math.isfinite(value) for value in found)
    assert sum(found) == pytest.approx(0.0, abs=1e-9)
    moved = likelihood(rewards, [weight + shift for weight in log_weights], num_targets=4)
    assert moved == pytest.approx(found, abs=1e-6)
    assert all(-4.0 <= value <= 4.0 for value in found)


def test_a_reward_below_zero_has_no_likelihood() -> None:
    with pytest.raises(ConfigError, match=r"a reward is -0\.5, .* at least 0: .* reward\.kind"):
        likelihood([1.0, -0.5], [0.0, 0.0], num_targets=2)
