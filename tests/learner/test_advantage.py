from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from rexrag.learner.advantage import Baseline, group_advantages


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
