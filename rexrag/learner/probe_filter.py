"""Which probes of a step are trained on, and the rate that follows their success (§8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rexrag.types import Origin, Trajectory

FilterKind = Literal["hint_logprob", "none"]

INITIAL_SUCCESS: Final = 0.18
MIN_RHO: Final = 0.02
MAX_RHO: Final = 0.18
DECAY: Final = 0.9


def rho_of(success: float, *, kind: FilterKind) -> float:
    """ρ: probes kept per target; 1 with `none` (a target has at most one probe).

    Raises:
        ValueError: the success rate is none.
    """
    _require_rate(success)
    return 1.0 if kind == "none" else min(max(success, MIN_RHO), MAX_RHO)


def updated_success(success: float, *, right: int, probes: int) -> float:
    """The success rate m after a step: 0.9·m + 0.1·(right/all probes before the filter); unchanged without probes.

    Raises:
        ValueError: the success rate is none, or more probes are right than there are.
    """
    _require_rate(success)
    if not 0 <= right <= probes:
        raise ValueError(f"right is {right}, it must be in [0, {probes}], the number of probes")
    return success if probes == 0 else DECAY * success + (1.0 - DECAY) * right / probes


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """A probe's place in the step (group, row) and the mean log π_v of its hint tokens."""

    group: int
    row: int
    score: float


def hint_score(trajectory: Trajectory) -> float:
    """Mean log π_v of a probe's hint tokens, the whole hint: §2 branches only where it fits."""
    scores = trajectory.behavior_logprob[trajectory.origin == Origin.HINT]
    return float(scores.mean(dtype="float64")) if len(scores) else -math.inf


def kept_probes(
    probes: Sequence[ProbeScore], *, num_targets: int, rho: float, kind: FilterKind
) -> frozenset[tuple[int, int]]:
    """(group, row) of the best ⌊ρ·targets⌋ probes of the step; earlier ones win ties. `none` keeps all.

    Raises:
        ValueError: `rho` or `num_targets` is below 0, or a score is NaN, which has no place in an order.
    """
    if not (math.isfinite(rho) and rho >= 0.0 and num_targets >= 0):
        raise ValueError(f"rho is {rho} and num_targets {num_targets}, both must be finite and at least 0")
    if bad := next((probe for probe in probes if math.isnan(probe.score)), None):
        raise ValueError(f"score of row {bad.row} of group {bad.group} is NaN, it must be a log-prob")
    if kind == "none":
        return frozenset((probe.group, probe.row) for probe in probes)
    # The tolerance keeps products such as 0.18 · 50 = 8.999… at the integer that they stand for.
    quota = math.floor(rho * num_targets + 1e-9)
    best = sorted(probes, key=lambda probe: -probe.score)[:quota]
    return frozenset((probe.group, probe.row) for probe in best)


def _require_rate(success: float) -> None:
    if not 0.0 <= success <= 1.0:
        raise ValueError(f"success is {success}, it must be in [0, 1]")
