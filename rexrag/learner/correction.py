"""Weights that correct from what was sampled to the proximal policy (§5, §5b, §6).

Legend: T tokens of a trajectory, or of all of them one after the other; N trajectories; D decompositions. Log-probs
are natural. Only policy and hint tokens carry a density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rexrag.hints import HintPool
from rexrag.learner.shapes import require_shape
from rexrag.learner.trained_tokens import Transfer, hint_span
from rexrag.types import FloatArray, Kind, Trajectory

Mixture = Literal["token", "sequence", "normalized", "none"]
Bound = Literal["truncate", "mask", "none"]


@dataclass(frozen=True, kw_only=True)
class CorrectionSettings:
    """How sampled tokens are weighted.

    Attributes:
        mixture: `token`, the paper's mixture of targets and probes per token; `sequence`, one exact weight for a
            whole trajectory; `normalized`, that weight as a share of its question's, in the advantage (§7b); `none`,
            every weight of it 1.
        bound, cap, low, high: what `importance_weight` does with the staleness weight.
    """

    mixture: Mixture
    bound: Bound
    cap: float
    low: float
    high: float

    @property
    def weighs_trajectories(self) -> bool:
        """Whether weights are those of whole trajectories, with all of their decompositions."""
        return self.mixture in ("sequence", "normalized")


def mixture_logprob(behavior_logprob: Tensor, probe_logprob: Tensor, alpha: float) -> Tensor:
    """Elementwise log q = logaddexp(log(1−α) + log π_v, log α + log μ), of tokens or whole trajectories (§5).

    Args:
        behavior_logprob: log π_v as recorded, finite.
        probe_logprob: log μ of the same shape; −∞ where a probe cannot have written it.
        alpha: share of probes in the mixture, 0 ≤ alpha < 1.

    Returns:
        log q, finite, in the shape and type of `behavior_logprob`.

    Raises:
        ValueError: alpha outside [0, 1), shapes that differ, a behaviour log-prob that is not finite, a probe log-prob
            that is NaN or +∞.
    """
    if not 0.0 <= alpha < 1.0:
        raise ValueError(
            f"alpha is {alpha}, it must be at least 0 and below 1: a step needs a target for every mixture"
        )
    require_shape(behavior_logprob, name="behavior_logprob", probe_logprob=probe_logprob)
    _refuse(behavior_logprob, ~torch.isfinite(behavior_logprob), "behavior_logprob", "finite")
    _refuse(
        probe_logprob,
        torch.isnan(probe_logprob) | torch.isposinf(probe_logprob),
        "probe_logprob",
        "below +inf, not NaN",
    )
    log_alpha = math.log(alpha) if alpha > 0.0 else -math.inf
    return torch.logaddexp(math.log1p(-alpha) + behavior_logprob, log_alpha + probe_logprob)


def importance_weight(
    log_ratio: Tensor,
    *,
    bound: Bound = "truncate",
    cap: float = 2.0,
    low: float = 0.5,
    high: float = 2.0,
    floor: float | Tensor = 0.0,
) -> Tensor:
    """exp(log_ratio), not below `floor`, then bounded; elementwise and finite (§5, §6).

    Args:
        log_ratio: log of wanted over sampled density; −∞ gives weight 0.
        bound: `truncate` (at most `cap`), `mask` (0 outside [`low`, `high`]) or `none`.
        floor: lower bound in [0, 1], one or elementwise, applied before `bound`.

    Raises:
        ValueError: a log ratio that is NaN or +∞, a bound outside its range, or floors of another shape.
    """
    _refuse(log_ratio, torch.isnan(log_ratio) | torch.isposinf(log_ratio), "log_ratio", "below +inf, not NaN")
    floors = torch.as_tensor(floor, dtype=log_ratio.dtype, device=log_ratio.device)
    if floors.ndim:
        require_shape(log_ratio, name="log_ratio", floor=floors)
    _refuse(floors, ~((floors >= 0.0) & (floors <= 1.0)), "floor", "in [0, 1]")
    largest = torch.finfo(log_ratio.dtype).max
    weight = torch.maximum(log_ratio.exp().clamp(max=largest), floors)
    if bound == "none":
        return weight
    if bound == "truncate":
        if not (math.isfinite(cap) and cap >= 1.0):
            raise ValueError(f"cap is {cap}, it must be finite and at least 1, the weight of on-policy data")
        return weight.clamp(max=cap)
    if bound == "mask":
        if not (0.0 < low <= 1.0 <= high < math.inf):
            raise ValueError(f"low is {low} and high {high}, they must obey 0 < low <= 1 <= high, both finite")
        return torch.where((weight >= low) & (weight <= high), weight, torch.zeros_like(weight))
    raise ValueError(f"bound is {bound!r}, it must be truncate, mask or none")


def sequence_probe_logprob(
    behavior_logprob: Tensor,
    offsets: Tensor,
    *,
    row: Tensor,
    start: Tensor,
    length: Tensor,
    log_pmf: Tensor,
    log_phi: Tensor,
) -> Tensor:
    """[N] log μ of whole trajectories, per target the measure of probes over p (§4).

    log μ(y) = Σ_t log π_v(y_t) + logsumexp over (j, c) ∈ D(y) of log φ_j + log PMF(c) − Σ_{t ∈ c} log π_v(y_t).

    Args:
        behavior_logprob: [T] log π_v of all trajectories, one after the other; 0 where a token has no density.
        offsets: [N + 1] trajectory n has the tokens [offsets[n], offsets[n + 1]).
        row: [D] the trajectory of a decomposition.
        start, length: [D] first token of its hint, counted from the trajectory's start, and number of its tokens.
        log_pmf: [D] log PMF of the whole hint.
        log_phi: [D] log φ_j.

    Returns:
        In the type of `behavior_logprob`; summed in float64. −∞ without a decomposition.

    Raises:
        ValueError: offsets that do not cover the tokens, a decomposition outside its trajectory, lengths that
            differ, or values that are not finite (`log_phi` and `log_pmf` may be −∞).
    """
    _require_vectors(behavior_logprob=behavior_logprob, offsets=offsets)
    _refuse(behavior_logprob, ~torch.isfinite(behavior_logprob), "behavior_logprob", "finite")
    _check_offsets(offsets, num_tokens=len(behavior_logprob))
    columns = {"row": row, "start": start, "length": length, "log_pmf": log_pmf, "log_phi": log_phi}
    _require_vectors(**columns)
    if len({len(column) for column in columns.values()}) > 1:
        sizes = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise ValueError(f"decompositions must have one length, they have {sizes}")
    num_rows = len(offsets) - 1
    _refuse(row, (row < 0) | (row >= num_rows), "row", f"in [0, {num_rows})")
    for name in ("log_pmf", "log_phi"):
        values = columns[name]
        _refuse(values, ~(values <= 0.0), name, "a log-probability, at most 0")
    first = offsets[row] + start
    _refuse(start, (start < 0) | (first + length > offsets[row + 1]), "start", "such that the hint is inside its row")
    _refuse(length, length < 1, "length", "at least 1")
    cumulative = torch.cat([behavior_logprob.new_zeros(1, dtype=torch.float64), behavior_logprob.double().cumsum(0)])
    total = cumulative[offsets[1:]] - cumulative[offsets[:-1]]
    hint = cumulative[first + length] - cumulative[first]
    terms = log_phi.double() + log_pmf.double() - hint
    return (total + _row_logsumexp(terms, row, num_rows)).to(behavior_logprob.dtype)


def _row_logsumexp(terms: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """[N] logsumexp of the terms [D] of each row, −∞ of none."""
    largest = terms.new_full((num_rows,), -math.inf).scatter_reduce(0, row, terms, "amax")
    shift = torch.where(torch.isfinite(largest), largest, 0.0)
    sums = terms.new_zeros(num_rows).index_add(0, row, (terms - shift[row]).exp())
    return sums.log() + shift


def _require_vectors(**columns: Tensor) -> None:
    for name, column in columns.items():
        if column.ndim != 1:
            raise ValueError(f"{name} has the shape {tuple(column.shape)}, it must have one dimension")


def _check_offsets(offsets: Tensor, *, num_tokens: int) -> None:
    if offsets.ndim != 1 or len(offsets) < 1 or int(offsets[0]) != 0 or int(offsets[-1]) != num_tokens:
        ends = [int(offsets[0]), int(offsets[-1])] if offsets.numel() else []
        raise ValueError(f"offsets has the ends {ends}, they must be 0 and the {num_tokens} tokens")
    steps = offsets.diff()
    _refuse(steps, steps < 0, "a step of offsets", "at least 0")


def token_probe_logprob(trajectory: Trajectory, *, hints: HintPool, transfer: Transfer = "hinted") -> FloatArray:
    """Probe density log μ_t of the `token` mixture, [T] (§5, §5b); 0 where a token has no density.

    On a probe log π_v before and after the hint, in its context, and the pool's log PMF on it (0 with `hint_free` on
    what stays of it: the probe was forced to write that); on a target log π_v up to the branch position and −∞ after
    it, or log π_v everywhere where it has no branch position.

    Raises:
        ValueError: the hint in a probe's tokens is not the one of the pool.
    """
    log_mu = trajectory.behavior_logprob.copy()
    if trajectory.branch_point is None:
        return log_mu
    if trajectory.kind is Kind.TARGET:
        branch = trajectory.prompt_length + trajectory.branch_point
        log_mu[branch:][trajectory.has_density[branch:]] = -np.inf
        return log_mu
    start, _, end = hint_span(trajectory, hints=hints)
    assert trajectory.hint_id is not None, "a probe has a hint"
    log_mu[start:end] = 0.0 if transfer == "hint_free" else hints.logpmf(trajectory.hint_id)
    return log_mu


def _refuse(values: Tensor, is_bad: Tensor, name: str, wanted: str) -> None:
    if bool(is_bad.any()):
        raise ValueError(f"{name} has the value {float(values[is_bad].flatten()[0])}, every entry must be {wanted}")
