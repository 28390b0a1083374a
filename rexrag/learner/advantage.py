"""Advantages of a group's rows (§7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from rexrag.learner.shapes import require_length

Baseline = Literal["joint", "target", "loo"]
EPSILON: Final = 1e-6


def tell_nothing(rewards: npt.NDArray[np.float64]) -> bool:
    """Whether a group's rewards tell nothing: fewer than two rows, or all of them equal."""
    return len(rewards) < 2 or bool((rewards == rewards[0]).all())


def group_advantages(
    rewards: npt.NDArray[np.float64], *, is_probe: npt.NDArray[np.bool_], family: Sequence[int], baseline: Baseline
) -> npt.NDArray[np.float64]:
    """One advantage per row of a group, all rows of which count (masked and filtered ones are left out before).

    Args:
        rewards: [R].
        is_probe: [R].
        family: [R] the same number for a target and its probes.
        baseline: `joint` (R − mean)/(std + 1e−6); `target` (R − mean of the targets)/(std + 1e−6);
            `loo` R − mean of the rows outside the family, 0 with one family.

    Standard deviations are over all rows, ddof 1.

    Raises:
        ValueError: lengths that differ, a reward that is not finite, no target for `target`, or an unknown baseline.
    """
    require_length(len(rewards), {"is_probe": is_probe, "family": family}, name="rewards")
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards has the value {rewards[~np.isfinite(rewards)][0]}, every entry must be finite")
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline is {baseline!r}, it must be one of {', '.join(get_args(Baseline))}")
    if tell_nothing(rewards):
        return np.zeros(len(rewards))
    if baseline == "loo":
        return _leave_family_out(rewards, np.asarray(family))
    centre = rewards if baseline == "joint" else rewards[~is_probe]
    if not len(centre):
        raise ValueError(f"is_probe is True of all {len(rewards)} rows, a baseline of targets needs one of them")
    advantages: npt.NDArray[np.float64] = (rewards - centre.mean()) / (rewards.std(ddof=1) + EPSILON)
    return advantages


def _leave_family_out(rewards: npt.NDArray[np.float64], family: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    others = family[:, None] != family[None, :]
    count = others.sum(axis=1)
    mean = np.divide(others @ rewards, count, out=np.zeros(len(rewards)), where=count > 0)
    return np.where(count > 0, rewards - mean, 0.0)
