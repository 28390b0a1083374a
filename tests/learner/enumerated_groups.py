"""Expected advantages of `normalized` over all groups of n targets, without listing the groups.

An advantage is a share w·R/Σw·R or w/Σw, and the sum in it is over all rows of the group. Families (a target and its
probe) are independent, so with 1/Σ = ∫ e^(−u·Σ) du the expectation falls apart into a product over families under one
integral over u, which the trapezoid rule in log u gives to the last digits: the integrand is analytic and falls off
doubly exponentially.

Legend: R rows, U nodes of the integral, K places where targets can be forked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
STEP = 0.125
SMALLEST = -40.0
"""Between nodes of log u, and the first of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupRows:
    """All rows that a target may bring.

    Attributes:
        probability: [R] expected number of the row per target. reward, weight: [R].
        is_probe: [R].
        place: [R] in [0, K): where a failed target can be forked, and where a probe was; −1 elsewhere.
        probe_rate: of failed targets that can be forked.
    """

    probability: Floats
    reward: Floats
    weight: Floats
    is_probe: npt.NDArray[np.bool_]
    place: npt.NDArray[np.int64]
    probe_rate: float


def expected_shares(rows: GroupRows, *, num_targets: int) -> Floats:
    """[R] E[number of the row · A]/n of a group of n targets: what the row's ∇log π counts per target."""
    right = _expected(rows, rows.weight * rows.reward, num_targets=num_targets)
    every = _expected(rows, rows.weight, num_targets=num_targets)
    # A group that is all wrong has no advantage; in one that is all right the shares are the same.
    wrong = _expected(rows, rows.weight, num_targets=num_targets, only=rows.reward == 0.0)
    return right - (every - wrong)


def _expected(rows: GroupRows, value: Floats, *, num_targets: int, only: npt.NDArray[np.bool_] | None = None) -> Floats:
    """[R] E[Σ of the row's value over Σ of all values of its group], over groups of rows in `only`."""
    allowed = np.ones(len(value), bool) if only is None else only
    largest = np.log(60.0 / value[value > 0].min())
    log_u = np.arange(SMALLEST, largest + STEP, STEP)
    nodes = np.exp(log_u)
    is_parent = ~rows.is_probe & (rows.place >= 0) & (rows.reward == 0.0)
    is_alone = ~rows.is_probe & ~is_parent
    num_places = int(rows.place.max(initial=-1)) + 1
    masses = np.bincount(rows.place[is_parent], rows.probability[is_parent], num_places)
    masses = np.append(masses, 1.0)  # of the place −1, where nothing is forked

    def summed(chosen: npt.NDArray[np.bool_], share: Floats) -> Floats:
        """[K, U] Σ share·e^(−u·value) over the chosen rows of each place."""
        total = np.zeros((num_places, len(nodes)))
        for place in range(num_places):
            at = np.flatnonzero(chosen & (rows.place == place))
            total[place] = share[at] @ np.exp(-np.outer(value[at], nodes))
        return total

    share_of_place = np.where(rows.place >= 0, rows.probability / masses[rows.place], 0.0)
    probes = (1.0 - rows.probe_rate) + summed(rows.is_probe & allowed, share_of_place)
    parents = summed(is_parent & allowed, rows.probability)
    alone = np.flatnonzero(is_alone & allowed)
    family = rows.probability[alone] @ np.exp(-np.outer(value[alone], nodes)) + (parents * probes).sum(axis=0)
    others = nodes * STEP * family ** (num_targets - 1)

    def beside(row: int) -> Floats:
        """[U] of the rest of the row's own family."""
        if rows.is_probe[row]:
            of_parents: Floats = parents[rows.place[row]] / masses[rows.place[row]]
            return of_parents
        return probes[rows.place[row]] if is_parent[row] else np.ones(len(nodes))

    found = np.zeros(len(value))
    for row in np.flatnonzero(allowed & (value > 0)).tolist():
        found[row] = rows.probability[row] * value[row] * (np.exp(-value[row] * nodes) * beside(row) @ others)
    return num_targets * found
