"""Advantages of a group's rows (§7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from rexrag.errors import ConfigError, counted
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


def likelihood_advantages(
    rewards: npt.NDArray[np.float64], *, log_weights: npt.NDArray[np.float64], num_targets: int
) -> npt.NDArray[np.float64]:
    """One advantage per row of a question, for the gradient of the log-likelihood of being right (§7b).

    A_i = n·(w_i·R_i / Σ w·R − w_i / Σ w): self-normalised importance sampling of ∇log E_π[R] from rows that were drawn
    from another density. With equal weights it is (R − mean)/mean, maximum-likelihood reinforcement learning
    (arXiv 2602.02710). Computed from log-weights with the largest taken out: rows whose weights are as small as
    e^−700 count by their shares.

    Args:
        rewards: [R], at least 0.
        log_weights: [R] log w of each row, −∞ where the policy cannot write it.
        num_targets: n, targets among the rows.

    Returns:
        [R], all 0 where no row that the policy can write has a reward, or all rewards are equal.

    Raises:
        ConfigError: a reward below 0, which has no log-likelihood.
        ValueError: lengths that differ, or a weight that is NaN or +∞.
    """
    if len(rewards) != len(log_weights):
        raise ValueError(
            f"rewards has {counted(len(rewards), 'entry', 'entries')}, log_weights {len(log_weights)}: one for each row"
        )
    if (rewards < 0).any():
        raise ConfigError(
            f'a reward is {rewards.min():g}, with correction.mixture = "normalized" it must be at least 0: add a '
            "constant to what reward.kind returns, or set another mixture"
        )
    if np.isnan(log_weights).any() or np.isposinf(log_weights).any():
        raise ValueError("log_weights must be below +inf and not NaN")
    right = _shares(np.where(rewards > 0, log_weights, -np.inf), rewards)
    if right is None or tell_nothing(rewards):
        return np.zeros(len(rewards))
    every = _shares(log_weights, np.ones(len(rewards)))
    assert every is not None, "a row that is right is a row"
    return num_targets * (right - every)


def _shares(log_weights: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """[R] w·v / Σ w·v; None where the sum is 0."""
    largest = log_weights.max(initial=-np.inf)
    if not np.isfinite(largest):
        return None
    terms: npt.NDArray[np.float64] = np.exp(log_weights - largest) * values
    shares: npt.NDArray[np.float64] = terms / terms.sum()
    return shares
