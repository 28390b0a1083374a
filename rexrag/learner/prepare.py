"""What a step trains on, before any forward pass: filter, advantages, mixture weights (§5, §7, §8).

Legend: T tokens of a row, E trained tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rexrag.errors import StaleGroupError
from rexrag.hints import HintPool
from rexrag.learner.advantage import group_advantages, is_flat
from rexrag.learner.correction import CorrectionSettings, importance_weight, mixture_logprob, probe_logprob
from rexrag.learner.filter import FilterKind, ProbeScore, hint_score, kept_probes
from rexrag.learner.loss import LossSettings
from rexrag.learner.packing import IndexArray
from rexrag.types import FloatArray, Kind, Origin, Trajectory, TrajectoryGroup


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRow:
    """A row that counts in the step.

    Attributes:
        group, row: its place in the step.
        trained: [E] indices of the tokens with m_t = 1 (§7).
        mixture_weight: [E] w_mix, the floor included; `unfloored_weight` without it.
    """

    trajectory: Trajectory
    group: int
    row: int
    hops: int | None
    advantage: float
    trained: IndexArray
    mixture_weight: FloatArray
    unfloored_weight: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedStep:
    """All rows that count, after the filter; rows without advantage included.

    `denominator` is N of §7; `num_filtered_flat` counts groups that the filter made flat.
    """

    rows: tuple[PreparedRow, ...]
    alpha: float
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


def trained_tokens(trajectory: Trajectory, *, train_hints: bool) -> IndexArray:
    """Indices with m_t = 1: policy tokens, hint tokens if asked for, nothing of a probe's prefix (§7)."""
    mask = trajectory.origin == Origin.POLICY
    if train_hints:
        mask |= trajectory.origin == Origin.HINT
    if trajectory.kind is Kind.PROBE:
        assert trajectory.branch_point is not None, "probes have a branch point"
        mask[: trajectory.prompt_length + trajectory.branch_point] = False
    return np.flatnonzero(mask)


def prepare_step(
    groups: Sequence[TrajectoryGroup],
    *,
    rho: float,
    filter_kind: FilterKind,
    correction: CorrectionSettings,
    loss: LossSettings,
    hints: HintPool,
) -> PreparedStep:
    """Filter over the whole step, then α, advantages and mixture weights; masked rows are left out of all.

    Raises:
        ValueError: a probe's hint is not that of the pool.
    """
    counted = [[i for i, row in enumerate(group.trajectories) if not row.is_masked] for group in groups]
    probes = [
        ProbeScore(group=g, row=i, score=hint_score(groups[g].trajectories[i]))
        for g, rows in enumerate(counted)
        for i in rows
        if groups[g].trajectories[i].kind is Kind.PROBE
    ]
    num_targets = sum(map(len, counted)) - len(probes)
    kept = kept_probes(probes, num_targets=num_targets, rho=rho, kind=filter_kind)
    remaining = [
        [i for i in rows if groups[g].trajectories[i].kind is Kind.TARGET or (g, i) in kept]
        for g, rows in enumerate(counted)
    ]
    alpha = len(kept) / (len(kept) + num_targets) if kept else 0.0
    assert alpha < 1.0, "a probe's parent counts in the step"
    rows: list[PreparedRow] = []
    for g, indices in enumerate(remaining):
        rows += _prepare_group(groups[g], g, indices, alpha=alpha, correction=correction, loss=loss, hints=hints)
    informative = {row.group for row in rows if row.advantage != 0.0}
    return PreparedStep(
        rows=tuple(rows),
        alpha=alpha,
        denominator=sum(len(row.trained) for row in rows),
        num_filtered_flat=sum(
            not is_flat(_rewards(group, before)) and is_flat(_rewards(group, after))
            for group, before, after in zip(groups, counted, remaining, strict=True)
        ),
        num_informative=len(informative),
        num_probes=len(probes),
        num_right_probes=sum(groups[probe.group].trajectories[probe.row].correct for probe in probes),
        num_kept_probes=len(kept),
    )


def _rewards(group: TrajectoryGroup, rows: Sequence[int]) -> npt.NDArray[np.float64]:
    return np.array([group.trajectories[i].reward for i in rows], np.float64)


def _prepare_group(
    group: TrajectoryGroup,
    group_index: int,
    indices: Sequence[int],
    *,
    alpha: float,
    correction: CorrectionSettings,
    loss: LossSettings,
    hints: HintPool,
) -> list[PreparedRow]:
    rows = [group.trajectories[i] for i in indices]
    advantages = group_advantages(
        _rewards(group, indices),
        is_probe=np.array([row.kind is Kind.PROBE for row in rows], bool),
        family=[i if row.parent is None else row.parent for i, row in zip(indices, rows, strict=True)],
        baseline=loss.baseline,
    )
    is_solved = any(row.correct for row in rows if row.kind is Kind.TARGET)
    prepared = []
    for i, row, advantage in zip(indices, rows, advantages, strict=True):
        trained = trained_tokens(row, train_hints=loss.train_hints)
        is_floored = row.kind is Kind.PROBE and advantage > 0 and not is_solved
        floor = correction.floor if is_floored else 0.0
        weight, unfloored = mixture_weights(row, trained, alpha=alpha, floor=floor, correction=correction, hints=hints)
        prepared.append(
            PreparedRow(
                trajectory=row,
                group=group_index,
                row=i,
                hops=group.hops,
                advantage=float(advantage),
                trained=trained,
                mixture_weight=weight,
                unfloored_weight=unfloored,
            )
        )
    return prepared


def mixture_weights(
    trajectory: Trajectory,
    trained: IndexArray,
    *,
    alpha: float,
    floor: float,
    correction: CorrectionSettings,
    hints: HintPool,
) -> tuple[FloatArray, FloatArray]:
    """w_mix = π_v/q of the trained tokens with and without the floor (§5, §5b, §6), both [E]."""
    behavior = torch.from_numpy(trajectory.behavior_logprob[trained])
    if correction.mixture == "none":
        log_q = behavior
    else:
        log_mu = torch.from_numpy(probe_logprob(trajectory, hints=hints)[trained])
        log_q = mixture_logprob(behavior, log_mu, alpha)
    log_ratio = behavior - log_q
    unfloored: FloatArray = importance_weight(log_ratio, bound="none").numpy()
    weight: FloatArray = importance_weight(log_ratio, bound="none", floor=floor).numpy()
    return weight, unfloored
