"""What a step trains on, before any forward pass: filter, advantages, mixture weights (§5, §7, §8).

Legend: T tokens of a row, E trained tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rexrag.errors import StaleGroupError
from rexrag.hints import HintPool
from rexrag.learner.advantage import group_advantages, likelihood_advantages, tell_nothing
from rexrag.learner.branches import BranchRates
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.loss import LossSettings
from rexrag.learner.mixture_weights import MixtureWeigher, ProbeSettings
from rexrag.learner.probe_filter import ProbeScore, hint_score, kept_probes
from rexrag.learner.trained_tokens import TrainedTokens
from rexrag.types import FloatArray, Kind, Trajectory, TrajectoryGroup


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRow:
    """A row that counts in the step.

    Attributes:
        tokens: what is trained of it.
        group, row: its place in the step.
        mixture_weight: [E] w_mix.
        log_mixture: log of what all of the row owes to probe mixing, wherever it acts; −∞ where no target could have
            written it.
    """

    trajectory: Trajectory
    tokens: TrainedTokens
    group: int
    row: int
    hops: int | None
    advantage: float
    mixture_weight: FloatArray
    log_mixture: float


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedStep:
    """All rows that count, after the filter; rows without advantage included.

    `denominator` is N of §7 for weights per token; `num_filtered_flat` counts groups that the filter made flat.
    """

    rows: tuple[PreparedRow, ...]
    alpha: float
    num_targets: int
    denominator: int
    num_filtered_flat: int
    num_informative: int
    num_probes: int
    num_right_probes: int
    num_kept_probes: int


def check_ages(groups: Sequence[TrajectoryGroup], *, version: int, max_staleness: int) -> None:
    """Assert §6's bound where data is consumed.

    Raises:
        StaleGroupError: a token older than `max_staleness` steps, or of a version that the learner has not made.
    """
    for group in groups:
        oldest, newest = group.min_version, group.max_version
        if oldest is not None and version - oldest > max_staleness:
            raise StaleGroupError(
                f"group {group.group_id} has a token of version {oldest} at learner version {version}: "
                f"its age {version - oldest} exceeds replay.max_staleness {max_staleness}"
            )
        if newest is not None and newest > version:
            raise StaleGroupError(
                f"group {group.group_id} has a token of version {newest}, the learner has only reached {version}"
            )


def prepare_step(
    groups: Sequence[TrajectoryGroup],
    *,
    rho: float,
    probe: ProbeSettings,
    correction: CorrectionSettings,
    loss: LossSettings,
    hints: HintPool,
    rates: BranchRates,
) -> PreparedStep:
    """Filter over the whole step, then α, advantages and mixture weights; masked rows are left out of all.

    Args:
        rates: φ, for the weights of whole trajectories; the step's own targets are counted first.

    Raises:
        ValueError: a probe's hint is not that of the pool, or a row was not recorded for the transfer.
    """
    counted = [[i for i, row in enumerate(group.trajectories) if not row.is_masked] for group in groups]
    probes = [
        ProbeScore(group=g, row=i, score=hint_score(groups[g].trajectories[i]))
        for g, rows in enumerate(counted)
        for i in rows
        if groups[g].trajectories[i].kind is Kind.PROBE
    ]
    targets = [
        groups[g].trajectories[i]
        for g, rows in enumerate(counted)
        for i in rows
        if groups[g].trajectories[i].kind is Kind.TARGET
    ]
    kept = kept_probes(probes, num_targets=len(targets), rho=rho, kind=probe.filter)
    remaining = [
        [i for i in rows if groups[g].trajectories[i].kind is Kind.TARGET or (g, i) in kept]
        for g, rows in enumerate(counted)
    ]
    weigher = MixtureWeigher(
        correction=correction, probe=probe, hints=hints, num_probes=len(kept), num_targets=len(targets)
    )
    if correction.weighs_trajectories:
        rates.observe(targets, branch=probe.branch)
        weigher.weigh_sequences([groups[g].trajectories[i] for g, rows in enumerate(remaining) for i in rows], rates)
    rows: list[PreparedRow] = []
    for g, indices in enumerate(remaining):
        rows += _prepare_group(groups[g], g, indices, weigher=weigher, correction=correction, loss=loss)
    return PreparedStep(
        rows=tuple(rows),
        alpha=weigher.alpha,
        num_targets=len(targets),
        denominator=sum(len(row.tokens.trained) for row in rows),
        num_filtered_flat=sum(
            not tell_nothing(_rewards(group, before)) and tell_nothing(_rewards(group, after))
            for group, before, after in zip(groups, counted, remaining, strict=True)
        ),
        num_informative=len({row.group for row in rows if row.advantage != 0.0}),
        num_probes=len(probes),
        num_right_probes=sum(groups[probe.group].trajectories[probe.row].correct for probe in probes),
        num_kept_probes=len(kept),
    )


def _rewards(group: TrajectoryGroup, rows: Sequence[int]) -> npt.NDArray[np.float64]:
    return np.array([group.trajectories[i].reward for i in rows], np.float64)


def _advantages(
    group: TrajectoryGroup,
    indices: Sequence[int],
    *,
    weigher: MixtureWeigher,
    correction: CorrectionSettings,
    loss: LossSettings,
) -> npt.NDArray[np.float64]:
    rows = [group.trajectories[i] for i in indices]
    is_probe = np.array([row.kind is Kind.PROBE for row in rows], bool)
    if correction.mixture == "normalized":
        return likelihood_advantages(
            _rewards(group, indices),
            log_weights=np.array([weigher.log_weight(row) for row in rows], np.float64),
            num_targets=int((~is_probe).sum()),
        )
    return group_advantages(
        _rewards(group, indices),
        is_probe=is_probe,
        family=[i if row.parent is None else row.parent for i, row in zip(indices, rows, strict=True)],
        baseline=loss.baseline,
    )


def _prepare_group(
    group: TrajectoryGroup,
    group_index: int,
    indices: Sequence[int],
    *,
    weigher: MixtureWeigher,
    correction: CorrectionSettings,
    loss: LossSettings,
) -> list[PreparedRow]:
    rows = [group.trajectories[i] for i in indices]
    advantages = _advantages(group, indices, weigher=weigher, correction=correction, loss=loss)
    prepared = []
    for i, row, advantage in zip(indices, rows, advantages, strict=True):
        tokens = weigher.tokens_of(row, loss)
        weight = weigher.weights(row, tokens)
        prepared.append(
            PreparedRow(
                trajectory=row,
                tokens=tokens,
                group=group_index,
                row=i,
                hops=group.hops,
                advantage=float(advantage),
                mixture_weight=weight,
                log_mixture=weigher.log_mixture(row, weight),
            )
        )
    return prepared
