"""Metrics and histograms of a finished step (§9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import rexrag.metrics as keys
from rexrag.hints import HintPool
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.prepared_step import PreparedRow, PreparedStep
from rexrag.learner.rollout_metrics import CountedRow, Metrics, oldest_ages, rollout_metrics, row_metrics
from rexrag.learner.token_metrics import TokenRecord, token_metrics, weights_of
from rexrag.types import TrajectoryGroup


@dataclass(frozen=True, kw_only=True, eq=False)
class StepReport:
    """All that a step's metrics are made of. `version` is the learner's before the step."""

    groups: Sequence[TrajectoryGroup]
    prepared: PreparedStep
    trained: Sequence[PreparedRow]
    records: Sequence[TokenRecord]
    version: int
    rho: float
    success: float
    loss: float
    preserve_loss: float | None
    preserve_cosine: float | None
    num_preserved: int
    grad_norm: float | None
    learning_rate: float
    updated: bool
    bad_steps: int
    num_micro_batches: int
    num_packed_tokens: int
    num_row_tokens: int
    update_s: float


def step_metrics(
    report: StepReport, *, hints: HintPool, correction: CorrectionSettings
) -> tuple[Metrics, dict[str, list[float]]]:
    """Metrics and histograms by key; what only the controller knows (waiting, rollout speed) is not among them."""
    attempted = [
        CountedRow(trajectory=row, hops=group.hops)
        for group in report.groups
        for row in group.trajectories
        if not row.is_masked
    ]
    trained = [CountedRow(trajectory=row.trajectory, hops=row.hops) for row in report.trained]
    metrics: Metrics = {
        **rollout_metrics(report.groups, hints=hints, version=report.version),
        **row_metrics(attempted, area="attempted", version=report.version),
        **row_metrics(trained, area="trained", version=report.version),
        **token_metrics(report.records, correction=correction),
        **_update_metrics(report),
    }
    histograms = {
        keys.HISTOGRAM_WEIGHT: weights_of(report.records),
        keys.HISTOGRAM_AGE: oldest_ages(attempted, version=report.version),
        keys.HISTOGRAM_ATTEMPTED_TOKENS: _lengths(attempted),
        keys.HISTOGRAM_TRAINED_TOKENS: _lengths(trained),
        keys.HISTOGRAM_ATTEMPTED_HOPS: _hops(attempted),
        keys.HISTOGRAM_TRAINED_HOPS: _hops(trained),
    }
    return {key: _finite(value) for key, value in metrics.items()}, histograms


def _update_metrics(report: StepReport) -> Metrics:
    prepared = report.prepared
    shared = report.num_row_tokens - report.num_packed_tokens
    return {
        keys.STEP: float(report.version + 1),
        keys.VERSION: float(report.version + 1),
        keys.GROUP_INFORMATIVE: prepared.num_informative / len(report.groups) if report.groups else None,
        keys.GROUP_FILTERED_FLAT: float(prepared.num_filtered_flat),
        keys.MIXTURE_ALPHA: prepared.alpha,
        keys.FILTER_RHO: report.rho,
        keys.FILTER_SUCCESS: report.success,
        keys.FILTER_KEPT: float(prepared.num_kept_probes),
        keys.LOSS_TOTAL: report.loss if report.trained else None,
        keys.PRESERVE_LOSS: report.preserve_loss,
        keys.PRESERVE_COSINE: report.preserve_cosine,
        keys.PRESERVE_ROWS: float(report.num_preserved),
        keys.GRAD_NORM: report.grad_norm,
        keys.LEARNING_RATE: report.learning_rate if report.updated else None,
        keys.UPDATED: float(report.updated),
        keys.BAD_STEPS: float(report.bad_steps),
        keys.TRAINED_LOSS_TOKENS: float(prepared.denominator),
        keys.TIME_UPDATE: report.update_s,
        keys.LEARNER_MICRO_BATCHES: float(report.num_micro_batches),
        keys.LEARNER_TOKENS_PER_S: report.num_row_tokens / report.update_s if report.num_row_tokens else None,
        keys.LEARNER_SHARED_SHARE: shared / report.num_row_tokens if report.num_row_tokens else None,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _lengths(rows: Sequence[CountedRow]) -> list[float]:
    return [float(len(row.trajectory.token_ids)) for row in rows]


def _hops(rows: Sequence[CountedRow]) -> list[float]:
    return [float(row.hops) for row in rows if row.hops is not None]
