"""What a step's groups say about the policy (§9), before the filter and without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

import rexrag.metrics as keys
from rexrag.hints import HintPool
from rexrag.types import EndReason, Kind, Origin, Trajectory, TrajectoryGroup

Metrics = dict[str, float | None]

_CAUSES = {
    keys.DEAD_NEVER_RETRIEVED: keys.RESCUED_NEVER_RETRIEVED,
    keys.DEAD_NOT_USED: keys.RESCUED_NOT_USED,
    keys.DEAD_MALFORMED: keys.RESCUED_MALFORMED,
    keys.DEAD_LIMIT: keys.RESCUED_LIMIT,
}
"""Cause of a dead group → its rescue rate. Of equally frequent causes the earlier one names the group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CountedRow:
    """A row with what its group knows about the question."""

    trajectory: Trajectory
    hops: int | None


def mean(values: Iterable[float]) -> float | None:
    """The mean, None of nothing."""
    numbers = list(values)
    return float(np.mean(numbers)) if numbers else None


def rollout_metrics(groups: Sequence[TrajectoryGroup], *, hints: HintPool, version: int) -> Metrics:
    """Metrics of the areas target, search, probe, env_error, group, dead, rescued and staleness.

    Args:
        version: learner version at which the groups are consumed; ages count from it.
    """
    counted = [[row for row in group.trajectories if not row.is_masked] for group in groups]
    rows = [row for group in counted for row in group]
    targets = [row for row in rows if row.kind is Kind.TARGET]
    probes = [row for row in rows if row.kind is Kind.PROBE]
    return {
        **_target_metrics(targets, hints),
        **_probe_metrics(probes),
        keys.ENV_ERROR_COUNT: float(sum(row.is_masked for group in groups for row in group.trajectories)),
        **_group_metrics(counted),
        **_age_metrics(rows, version),
    }


def row_metrics(rows: Sequence[CountedRow], *, area: str, version: int) -> Metrics:
    """Means over `rows` in the area `attempted` or `trained`: what kind of rows they were."""
    trajectories = [row.trajectory for row in rows]
    return {
        f"{area}/rows": float(len(rows)),
        f"{area}/hops": mean(row.hops for row in rows if row.hops is not None),
        f"{area}/searches": mean(row.num_searches for row in trajectories),
        f"{area}/tokens": mean(len(row.token_ids) for row in trajectories),
        f"{area}/probe_share": mean(row.kind is Kind.PROBE for row in trajectories),
        f"{area}/age": mean(oldest_ages(rows, version=version)),
    }


def oldest_ages(rows: Sequence[CountedRow], *, version: int) -> list[float]:
    """Age of each row's oldest token with a density, learner steps."""
    return [float(version - oldest) for row in rows if (oldest := row.trajectory.min_version) is not None]


def reflects(trajectory: Trajectory, *, hints: HintPool) -> bool:
    """Whether the policy itself wrote all words of a hint."""
    is_policy = trajectory.origin == Origin.POLICY
    found = hints.find(trajectory.token_ids)
    return any(bool(is_policy[start : start + len(hints.ids(hint))].all()) for start, hint in found)


def _target_metrics(rows: Sequence[Trajectory], hints: HintPool) -> Metrics:
    turns = sum(row.num_turns for row in rows)
    dead = [row for row in rows if not row.correct]
    return {
        keys.TARGET_COUNT: float(len(rows)),
        keys.TARGET_EM: mean(row.em for row in rows),
        keys.TARGET_F1: mean(row.f1 for row in rows),
        keys.TARGET_REWARD: mean(row.reward for row in rows),
        keys.TARGET_DEAD_END_RATE: mean(not row.correct for row in rows),
        keys.TARGET_UNPROBEABLE_RATE: mean(row.branch_point is None for row in dead),
        keys.TARGET_LIMIT_RATE: mean(row.end_reason is not EndReason.ANSWER for row in rows),
        keys.TARGET_VALID_ACTION_RATE: 1.0 - sum(row.num_malformed for row in rows) / turns if turns else None,
        keys.TARGET_REFLECT_RATE: mean(reflects(row, hints=hints) for row in rows),
        keys.TARGET_RETRIEVAL_RECALL: mean(row.gold_retrieved for row in rows if row.gold_retrieved is not None),
        keys.TARGET_SEARCHES: mean(row.num_searches for row in rows),
        keys.SEARCH_REFUSED: float(sum(row.num_refused for row in rows)),
        keys.TARGET_TURNS: mean(row.num_turns for row in rows),
        keys.TARGET_TOKENS: mean(len(row.token_ids) - row.prompt_length for row in rows),
        keys.TARGET_POLICY_TOKENS: mean(int((row.origin == Origin.POLICY).sum()) for row in rows),
        keys.TARGET_GENERATE_S: mean(row.generate_s for row in rows),
        keys.TARGET_SEARCH_S: mean(row.search_s for row in rows),
    }


def _probe_metrics(rows: Sequence[Trajectory]) -> Metrics:
    return {
        keys.PROBE_COUNT: float(len(rows)),
        keys.PROBE_EM: mean(row.em for row in rows),
        keys.PROBE_F1: mean(row.f1 for row in rows),
        keys.PROBE_REWARD: mean(row.reward for row in rows),
        keys.PROBE_DEAD_END_RATE: mean(not row.correct for row in rows),
        keys.PROBE_SEARCHES: mean(row.num_searches for row in rows),
        keys.PROBE_TURNS: mean(row.num_turns for row in rows),
        keys.PROBE_TOKENS: mean(len(row.token_ids) - row.prompt_length for row in rows),
    }


def _group_metrics(groups: Sequence[Sequence[Trajectory]]) -> Metrics:
    with_targets = [rows for rows in groups if any(row.kind is Kind.TARGET for row in rows)]
    dead = [rows for rows in with_targets if not _has_correct(rows, Kind.TARGET)]
    metrics: Metrics = {
        keys.GROUP_COUNT: float(len(groups)),
        keys.GROUP_DEAD_END_RATE: len(dead) / len(with_targets) if with_targets else None,
        keys.GROUP_RESCUED: mean(_is_rescued(rows) for rows in with_targets),
    }
    causes = [_cause_of(rows) for rows in dead]
    for cause, rescue in _CAUSES.items():
        members = [rows for rows, its_cause in zip(dead, causes, strict=True) if its_cause == cause]
        metrics[cause] = len(members) / len(dead) if dead else None
        metrics[rescue] = mean(_has_correct(rows, Kind.PROBE) for rows in members)
    return metrics


def _is_rescued(rows: Sequence[Trajectory]) -> bool:
    return _has_correct(rows, Kind.PROBE) and not _has_correct(rows, Kind.TARGET)


def _has_correct(rows: Sequence[Trajectory], kind: Kind) -> bool:
    return any(row.correct for row in rows if row.kind is kind)


def _cause_of(rows: Sequence[Trajectory]) -> str | None:
    counts = Counter(cause for row in rows if row.kind is Kind.TARGET and (cause := _row_cause(row)) is not None)
    return max(_CAUSES, key=lambda cause: counts[cause]) if counts else None


def _row_cause(row: Trajectory) -> str | None:
    if row.end_reason is not EndReason.ANSWER:
        return keys.DEAD_MALFORMED if row.num_malformed else keys.DEAD_LIMIT
    if row.gold_retrieved is None:
        return None
    return keys.DEAD_NOT_USED if row.gold_retrieved else keys.DEAD_NEVER_RETRIEVED


def _age_metrics(rows: Sequence[Trajectory], version: int) -> Metrics:
    token_versions = [row.policy_version[row.has_density] for row in rows]
    ages = version - np.concatenate([np.empty(0, np.int32), *token_versions])
    return {
        keys.STALENESS_MEAN: float(ages.mean()) if len(ages) else None,
        keys.STALENESS_MAX: float(ages.max()) if len(ages) else None,
    }
