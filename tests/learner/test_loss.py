from __future__ import annotations

import math

import pytest
import torch
from plain_settings import loss_settings
from torch import Tensor

from rexrag.learner.loss import PolicyLoss, kl_k3, policy_loss


def loss_of(ratio: float, advantage: float, weight: float = 1.0) -> tuple[PolicyLoss, Tensor]:
    logprob = torch.tensor([math.log(ratio) - 2.0], dtype=torch.float64, requires_grad=True)
    proximal = torch.full_like(logprob, -2.0).requires_grad_()
    w = torch.full_like(logprob, weight).requires_grad_()
    settings = loss_settings(clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    parts = policy_loss(
        logprob,
        proximal_logprob=proximal,
        advantage=torch.full_like(w, advantage).detach(),
        weight=w,
        settings=settings,
    )
    parts.loss.sum().backward()  # type: ignore[no-untyped-call]
    assert proximal.grad is None
    assert w.grad is None
    assert logprob.grad is not None
    return parts, logprob.grad


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "loss", "gradient"),
    [
        (1.0, 2.0, 0.5, -1.0, -1.0),  # on policy: −w·A, gradient −w·A
        (1.1, 2.0, 1.0, -2.2, -2.2),
        (1.5, 2.0, 1.0, -2.6, 0.0),  # clipped at 1.3
        (0.5, 2.0, 1.0, -1.0, -1.0),  # a bad ratio of a good token is not clipped
        (0.5, -1.0, 1.0, 0.8, 0.0),  # clipped at 0.8
        (1.5, -1.0, 2.0, 3.0, 3.0),
        (5.0, -1.0, 2.0, 6.0, 0.0),  # dual clip: at most w·3·|A|
        (5.0, 1.0, 1.0, -1.3, 0.0),
    ],
)
def test_objective_by_hand(ratio: float, advantage: float, weight: float, loss: float, gradient: float) -> None:
    parts, grad = loss_of(ratio, advantage, weight)
    assert float(parts.loss.detach()) == pytest.approx(loss, abs=1e-12)
    assert float(grad) == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high", "dual"),
    [(1.0, 1.0, 0, 0, 0), (1.5, 1.0, 0, 1, 0), (0.5, -1.0, 1, 0, 0), (1.5, -1.0, 0, 0, 0), (3.5, -1.0, 0, 0, 1)],
)
def test_where_clips_act(ratio: float, advantage: float, low: int, high: int, dual: int) -> None:
    parts, _ = loss_of(ratio, advantage)
    assert (int(parts.is_clipped_low), int(parts.is_clipped_high), int(parts.is_dual_clipped)) == (low, high, dual)


def test_kl_k3_by_hand() -> None:
    policy = torch.tensor([0.5, 0.25]).log().requires_grad_()
    reference = torch.tensor([0.5, 0.5]).log()
    kl = kl_k3(policy, reference_logprob=reference)
    assert kl.tolist() == pytest.approx([0.0, 2.0 - 1.0 - math.log(2.0)], abs=1e-6)
    kl.sum().backward()  # type: ignore[no-untyped-call]
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([0.0, -1.0], abs=1e-6)
