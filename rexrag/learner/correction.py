"""Weights that correct from what was sampled to the proximal policy (§5, §5b, §6).

Legend: T tokens of a trajectory. Log-probs are natural. Only policy and hint tokens carry a density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rexrag.hints import HintPool
from rexrag.types import FloatArray, Kind, Trajectory

Mixture = Literal["token", "none"]
Bound = Literal["truncate", "mask", "none"]


@dataclass(frozen=True, kw_only=True)
class CorrectionSettings:
    """How sampled tokens are weighted.

    Attributes:
        mixture: `token`, the paper's mixture of targets and probes per token; `none`, every weight of it 1.
        bound, cap, low, high: what `importance_weight` does with the staleness weight.
        floor: least mixture weight of a successful probe in a group without a correct target, in [0, 1].
    """

    mixture: Mixture = "token"
    bound: Bound = "truncate"
    cap: float = 2.0
    low: float = 0.5
    high: float = 2.0
    floor: float = 0.0


def mixture_logprob(behavior_logprob: Tensor, probe_logprob: Tensor, alpha: float) -> Tensor:
    """Elementwise log q = logaddexp(log(1−α) + log π_v, log α + log μ), of tokens or whole trajectories (§5).

    Args:
        behavior_logprob: log π_v as recorded, finite.
        probe_logprob: log μ of the same shape; −∞ where a probe cannot have written it.
        alpha: share of probes in the mixture, 0 ≤ alpha < 1.

    Returns:
        log q, finite, in the shape and type of `behavior_logprob`.

    Raises:
        ValueError: alpha outside [0, 1), a behaviour log-prob that is not finite, a probe log-prob that is NaN or +∞.
    """
    if not 0.0 <= alpha < 1.0:
        raise ValueError(
            f"alpha is {alpha}, it must be at least 0 and below 1: a step needs a target for every mixture"
        )
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
    """exp(log_ratio), not below `floor`, then bounded; elementwise and finite (§5b, §6).

    Args:
        log_ratio: log of wanted over sampled density; −∞ gives weight 0.
        bound: `truncate` (at most `cap`), `mask` (0 outside [`low`, `high`]) or `none`.
        floor: lower bound in [0, 1], one or elementwise, applied before `bound`.

    Raises:
        ValueError: a log ratio that is NaN or +∞, or a bound outside its range.
    """
    _refuse(log_ratio, torch.isnan(log_ratio) | torch.isposinf(log_ratio), "log_ratio", "below +inf, not NaN")
    floors = torch.as_tensor(floor, dtype=log_ratio.dtype, device=log_ratio.device)
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


def probe_logprob(trajectory: Trajectory, *, hints: HintPool) -> FloatArray:
    """Probe density log μ_t of the `token` mixture, [T] (§5); 0 where a token has no density.

    On a probe log π_v before and after the hint and the pool's log PMF on it; on a target log π_v up to the
    branch position and −∞ after it, or log π_v everywhere where it has no branch position.

    Raises:
        ValueError: the hint in a probe's tokens is not the one of the pool.
    """
    log_mu = trajectory.behavior_logprob.copy()
    if trajectory.branch_point is None:
        return log_mu
    branch = trajectory.prompt_length + trajectory.branch_point
    if trajectory.kind is Kind.TARGET:
        log_mu[branch:][trajectory.has_density[branch:]] = -np.inf
        return log_mu
    assert trajectory.hint_id is not None, "probes have a hint"
    if not 0 <= trajectory.hint_id < len(hints):
        raise ValueError(f"hint_id is {trajectory.hint_id}, the pool has {len(hints)} hints")
    ids = hints.ids(trajectory.hint_id)
    if list(trajectory.token_ids[branch : branch + len(ids)]) != list(ids):
        raise ValueError(f"the tokens at a probe's branch are not hint {trajectory.hint_id} of this run's pool")
    log_mu[branch : branch + len(ids)] = hints.logpmf(trajectory.hint_id)
    return log_mu


def _refuse(values: Tensor, is_bad: Tensor, name: str, wanted: str) -> None:
    if bool(is_bad.any()):
        raise ValueError(f"{name} has the value {float(values[is_bad].flatten()[0])}, every entry must be {wanted}")
