"""Metrics of the tokens that a step trained on (§9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import rexrag.metrics as keys
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.prepared_step import PreparedRow

Metrics = dict[str, float | None]
Values = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRecord:
    """What one chunk of trained tokens showed, all [C] and without gradient.

    `row` is the index of the token's row in `rows`. `weight` is that of the loss, `pull` |A·w|, `log_ratio` learner
    over engine, and `is_current` whether the version that wrote the token is the learner's.

    `mismatch` is NaN on tokens of an older version and on hint tokens, `kl` NaN where there is no reference or no
    KL term, `correct_logprob` NaN but on policy tokens of correct rows.
    """

    rows: Sequence[PreparedRow]
    row: Tensor
    weight: Tensor
    pull: Tensor
    stale_ratio: Tensor
    log_ratio: Tensor
    is_current: Tensor
    is_probe: Tensor
    entropy: Tensor
    kl: Tensor
    mismatch: Tensor
    correct_logprob: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor
    is_dual_clipped: Tensor


def effective_sample_size(weights: Values) -> float | None:
    """(Σw)²/(n·Σw²), in [0, 1]; None without a weight above 0."""
    squares = float(np.square(weights, dtype=np.float64).sum())
    return float(weights.sum(dtype=np.float64)) ** 2 / (len(weights) * squares) if squares > 0 else None


def token_metrics(records: Sequence[TokenRecord], *, correction: CorrectionSettings) -> Metrics:
    """Metrics of the areas weight, loss (clip shares) and policy; None where no token has a value."""
    weight = _joined(records, "weight")
    # Where the shares of a question's rows are in the advantages, how many rows count is seen there alone.
    counting = _joined(records, "pull") if correction.mixture == "normalized" else weight
    stale = _joined(records, "stale_ratio")
    is_probe = _joined(records, "is_probe").astype(bool)
    is_low_or_high = (stale < correction.low) | (stale > correction.high)
    bound = correction.bound
    return {
        **row_pulls(records),
        **weight_causes(records),
        keys.WEIGHT_MEAN: _mean(weight),
        keys.WEIGHT_P95: float(np.percentile(weight, 95)) if len(weight) else None,
        keys.WEIGHT_MAX: float(weight.max()) if len(weight) else None,
        keys.WEIGHT_ESS_TARGET: effective_sample_size(counting[~is_probe]),
        keys.WEIGHT_ESS_PROBE: effective_sample_size(counting[is_probe]),
        keys.WEIGHT_TRUNCATED_SHARE: _mean(stale > correction.cap) if bound == "truncate" else None,
        keys.WEIGHT_MASKED_SHARE: _mean(is_low_or_high) if bound == "mask" else None,
        keys.LOSS_CLIP_LOW_SHARE: _mean(_joined(records, "is_clipped_low")),
        keys.LOSS_CLIP_HIGH_SHARE: _mean(_joined(records, "is_clipped_high")),
        keys.LOSS_DUAL_CLIP_SHARE: _mean(_joined(records, "is_dual_clipped")),
        keys.POLICY_ENTROPY: _mean(_joined(records, "entropy")),
        keys.POLICY_KL_REF: _mean_known(_joined(records, "kl")),
        keys.POLICY_MISMATCH_KL: _mean_known(_joined(records, "mismatch")),
        keys.POLICY_CORRECT_LOGPROB: _mean_known(_joined(records, "correct_logprob")),
    }


def row_pulls(records: Sequence[TokenRecord]) -> Metrics:
    """Which rows carry the gradient: |A·w| summed over the tokens of probes, and of each hint, over that of all."""
    pulls: dict[int | None, float] = {}
    for row, pull in _sums_by_row(records, lambda record: record.pull):
        pulls[row.trajectory.hint_id] = pulls.get(row.trajectory.hint_id, 0.0) + pull
    total = sum(pulls.values())
    if not total:
        return {keys.GRADIENT_PROBE_SHARE: None}
    by_hint = {hint: pull for hint, pull in pulls.items() if hint is not None}
    return {
        keys.GRADIENT_PROBE_SHARE: sum(by_hint.values()) / total,
        **{keys.hint_key(hint): pull / total for hint, pull in sorted(by_hint.items())},
    }


def weight_causes(records: Sequence[TokenRecord]) -> Metrics:
    """What the rows' weights owe to what: |log| of each cause over a row, summed over rows, as shares of all three.

    A token that the learner's own version wrote differs from the learner by the engine's arithmetic alone; an older
    one by staleness, in which the same mismatch is contained.
    """
    older = _sums_by_row(records, lambda record: record.log_ratio.masked_fill(record.is_current, 0.0))
    current = _sums_by_row(records, lambda record: record.log_ratio.masked_fill(~record.is_current, 0.0))
    causes = {
        keys.WEIGHT_BY_MIXTURE: sum(abs(row.log_mixture) for row, _ in older if math.isfinite(row.log_mixture)),
        keys.WEIGHT_BY_STALENESS: sum(abs(value) for _, value in older),
        keys.WEIGHT_BY_MISMATCH: sum(abs(value) for _, value in current),
    }
    total = sum(causes.values())
    return {name: cause / total if total else None for name, cause in causes.items()}


def _sums_by_row(
    records: Sequence[TokenRecord], values: Callable[[TokenRecord], Tensor]
) -> list[tuple[PreparedRow, float]]:
    """Each row with the sum of its tokens' values, in all chunks that have some of it."""
    sums: dict[PreparedRow, float] = {}
    for record in records:
        found = np.bincount(
            record.row.cpu().numpy(), weights=values(record).double().cpu().numpy(), minlength=len(record.rows)
        )
        for row, value in zip(record.rows, found.tolist(), strict=True):
            sums[row] = sums.get(row, 0.0) + value
    return list(sums.items())


def weights_of(records: Sequence[TokenRecord]) -> list[float]:
    """All weights, for a histogram."""
    return [float(weight) for weight in _joined(records, "weight")]


def _joined(records: Sequence[TokenRecord], name: str) -> Values:
    parts: list[Tensor] = [getattr(record, name) for record in records]
    values: Values = torch.cat(parts).float().cpu().numpy() if parts else np.empty(0, np.float32)
    return values


def _mean(values: npt.NDArray[np.generic]) -> float | None:
    return float(values.astype(np.float64).mean()) if len(values) else None


def _mean_known(values: Values) -> float | None:
    return _mean(values[~np.isnan(values)])
