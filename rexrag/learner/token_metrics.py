"""Metrics of the tokens that a step trained on (§9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import rexrag.metrics as keys
from rexrag.learner.correction import CorrectionSettings

Metrics = dict[str, float | None]
Values = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRecord:
    """What one chunk of trained tokens showed, all [C] and without gradient.

    `mismatch` is NaN on tokens of an older version and on hint tokens, `kl` NaN where there is no reference or no
    KL term, `correct_logprob` NaN but on policy tokens of correct rows.
    """

    weight: Tensor
    stale_ratio: Tensor
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
    stale = _joined(records, "stale_ratio")
    is_probe = _joined(records, "is_probe").astype(bool)
    is_low_or_high = (stale < correction.low) | (stale > correction.high)
    bound = correction.bound
    return {
        keys.WEIGHT_MEAN: _mean(weight),
        keys.WEIGHT_P95: float(np.percentile(weight, 95)) if len(weight) else None,
        keys.WEIGHT_MAX: float(weight.max()) if len(weight) else None,
        keys.WEIGHT_ESS_TARGET: effective_sample_size(weight[~is_probe]),
        keys.WEIGHT_ESS_PROBE: effective_sample_size(weight[is_probe]),
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
