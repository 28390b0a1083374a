"""The clipped objective of §7, per token. Legend: E trained tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rexrag.learner.advantage import Baseline
from rexrag.learner.shapes import require_shape


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of §7; `kl_coef` is β, and at 0 no reference model is needed.

    Attributes:
        preserve: weight of the penalty on what solved groups lose in likelihood; 0: none.
        preserve_knee: fall in log-prob, in nats, up to which that penalty is quadratic; 0: it is the fall itself.
        preserve_rows: kept rows that a step trains on.
    """

    baseline: Baseline
    clip_low: float
    clip_high: float
    dual_clip: float
    kl_coef: float
    train_hints: bool
    train_prefix: bool
    preserve: float
    preserve_knee: float
    preserve_rows: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyLoss:
    """Loss per token [E], before the division by N, and where each clip acted [E]."""

    loss: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor
    is_dual_clipped: Tensor


def policy_loss(
    logprob: Tensor, *, proximal_logprob: Tensor, advantage: Tensor, weight: Tensor, settings: LossSettings
) -> PolicyLoss:
    """− w · min(r·A, clip(r)·A) with r = π_θ/π_prox; for A < 0 at most − w·c_dual·A.

    The clip is on π_θ/π_prox alone. No gradient flows through `proximal_logprob` and `weight`.

    Args:
        logprob: [E] log π_θ, with gradient.
        proximal_logprob, advantage, weight: [E].

    Raises:
        ValueError: one of them has another shape.
    """
    require_shape(logprob, name="logprob", proximal_logprob=proximal_logprob, advantage=advantage, weight=weight)
    ratio = (logprob - proximal_logprob.detach()).exp()
    clipped = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    dual = settings.dual_clip * advantage
    gain = torch.where(advantage < 0, torch.maximum(gain, dual), gain)
    return PolicyLoss(
        loss=-weight.detach() * gain,
        is_clipped_low=(advantage < 0) & (ratio < 1.0 - settings.clip_low),
        is_clipped_high=(advantage > 0) & (ratio > 1.0 + settings.clip_high),
        is_dual_clipped=(advantage < 0) & (ratio > settings.dual_clip),
    )


def kl_k3(logprob: Tensor, *, reference_logprob: Tensor) -> Tensor:
    """k3 estimate of KL(π_θ ‖ π_ref) per token: d = π_ref/π_θ, d − 1 − log d ≥ 0.

    Raises:
        ValueError: the shapes differ.
    """
    require_shape(logprob, name="logprob", reference_logprob=reference_logprob)
    log_ratio = reference_logprob - logprob
    return log_ratio.exp() - 1.0 - log_ratio
