"""Solved groups: which are kept, and what the penalty on lost likelihood does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_builders import (
    core,
    first_gradient,
    group,
    random_groups,
    step_batch,
    target,
    tiny_model,
    trajectory,
)
from plain_settings import learner_settings, loss_settings, optimizer_settings, probe_settings

import rexrag.metrics as keys
from rexrag.learner.preserving import KEPT_ROWS, PreservedRow, PreservingSet, decrease_penalty, join_gradients
from rexrag.learner.step import LearnerSettings
from rexrag.types import EndReason, Origin, TrajectoryGroup

UNCLIPPED = optimizer_settings(learning_rate=1e-3, max_grad_norm=1e9)


def solved(first_token: int) -> TrajectoryGroup:
    rows = [target(1.0, ids=(first_token, 11 + i), logprob=-0.05) for i in range(2)]
    return group(*rows, name=f"r-{first_token}")


def settings(preserve: float, *, knee: float = 0.0) -> LearnerSettings:
    return learner_settings(
        optimizer=UNCLIPPED,
        probe=probe_settings(filter="none"),
        loss=loss_settings(preserve=preserve, preserve_knee=knee),
    )


def test_only_groups_that_are_all_right_are_kept() -> None:
    kept = PreservingSet()
    kept.add([solved(20), group(target(1.0), target(0.0), name="mixed"), group(target(0.0), target(0.0), name="dead")])
    masked = group(target(1.0, ids=(21, 12), logprob=-0.05), target(0.0, end_reason=EndReason.ENV_ERROR), name="masked")
    unsure = group(target(1.0, logprob=-0.2), target(1.0, logprob=-0.2), name="unsure")
    kept.add([masked, unsure])
    assert [int(row.token_ids[3]) for row in kept.rows] == [20, 21]
    assert kept.num_seen == 2


def test_of_a_row_the_tokens_are_kept_that_the_policy_was_sure_of() -> None:
    parts = [(Origin.POLICY, [10, 11]), (Origin.ENV, [12]), (Origin.POLICY, [13])]
    row = PreservedRow.of(trajectory(parts, reward=1.0, logprob=[-0.1, -2.0, 0.0, -0.01]))
    assert row.trained.tolist() == [3, 6]
    assert row.logprob.tolist() == pytest.approx([-0.1, -0.01])


def test_the_sample_is_uniform_over_the_run() -> None:
    counts: Counter[int] = Counter()
    total = 4 * KEPT_ROWS
    for seed in range(60):
        kept = PreservingSet(seed=seed)
        kept.add([solved(1000 + i) for i in range(total)])
        assert len(kept.rows) == KEPT_ROWS
        counts.update((int(row.token_ids[3]) - 1000) // KEPT_ROWS for row in kept.rows)
    # 60 · 64 kept rows over four quarters of the run: 960 each, standard deviation 27.
    assert all(abs(counts[quarter] - 960) < 110 for quarter in range(4))


@pytest.mark.parametrize(
    ("knee", "expected", "slopes"),
    [
        (0.0, [2.0, 0.5, 0.2, 0.0, 0.0], [-1.0, -1.0, -1.0, 0.0, 0.0]),
        (0.5, [1.75, 0.25, 0.04, 0.0, 0.0], [-1.0, -1.0, -0.4, 0.0, 0.0]),
    ],
)
def test_penalty_by_hand(knee: float, expected: list[float], slopes: list[float]) -> None:
    logprob = torch.tensor([-3.0, -1.5, -1.2, -1.0, -0.5], requires_grad=True)
    penalty = decrease_penalty(logprob, kept_logprob=torch.full((5,), -1.0), knee=knee)
    assert penalty.tolist() == pytest.approx(expected)
    (slope,) = torch.autograd.grad(penalty.sum(), logprob)
    assert slope.tolist() == pytest.approx(slopes)


@pytest.mark.parametrize(
    ("penalty", "joined"),
    [
        pytest.param([-3.0, 0.0], [-3.0, 4.0], id="the part against it is taken out, then it is added"),
        pytest.param([-30.0, 0.0], [-5.0, 4.0], id="added with the size of the objective at most"),
        pytest.param([3.0, 0.0], [6.0, 4.0], id="nothing is against it"),
        pytest.param([0.0, 0.0], [3.0, 4.0], id="nothing was lost"),
    ],
)
def test_joined_gradient_by_hand(penalty: list[float], joined: list[float]) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    for parameter, value in zip(parameters[:2], penalty, strict=True):
        parameter.grad = torch.tensor([value])
    cosine = join_gradients(parameters, objective=[torch.tensor([3.0]), torch.tensor([4.0]), None])
    assert [float(p.grad) for p in parameters[:2] if p.grad is not None] == pytest.approx(joined)
    assert parameters[2].grad is None
    assert cosine == (pytest.approx(3.0 * penalty[0] / (5.0 * abs(penalty[0]))) if penalty[0] else None)


def test_a_penalty_that_is_not_finite_leaves_no_finite_gradient() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([float("nan"), 1.0])
    join_gradients([parameter], objective=[torch.ones(2)])
    assert not parameter.grad.isfinite().any()


def test_what_has_not_lost_likelihood_has_no_gradient(tmp_path: Path) -> None:
    groups = random_groups()
    plain = core(tmp_path, settings=settings(0.0))
    plain.step(step_batch(groups))
    kept = core(tmp_path, settings=settings(5.0))
    row = solved(20).trajectories[0]
    kept._preserving.rows = [replace(PreservedRow.of(row), logprob=np.full(3, -50.0, np.float32))]
    result = kept.step(step_batch(groups))
    assert result.metrics[keys.PRESERVE_LOSS] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), kept.model.parameters(), strict=True))


@pytest.mark.parametrize("knee", [0.0, 10.0])
def test_what_has_lost_likelihood_is_raised_again(tmp_path: Path, knee: float) -> None:
    """The gradient is joined of that of the step without the penalty and of the penalty's, by an ordinary pass."""
    groups = random_groups()
    row = solved(20).trajectories[0]
    likely = replace(row, behavior_logprob=np.where(row.has_density, -0.1, 0.0).astype(np.float32))
    right = group(likely, likely, name="right")
    preserve = 0.7
    gradients = []
    for weight in (0.0, preserve):
        learner = core(tmp_path, settings=settings(weight, knee=knee))
        learner._preserving.add([right] if weight else [])
        result = learner.step(step_batch(groups))
        gradients.append(first_gradient(learner))
        assert (result.metrics[keys.PRESERVE_LOSS] is None) == (weight == 0.0)
    model = tiny_model()
    ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
    logprob = model(ids).logits[0].log_softmax(-1)
    at = np.flatnonzero(row.has_density)
    fall = (-0.1 - logprob[at - 1, row.token_ids[at]]).clamp(min=0)
    loss = preserve * (fall**2 / (2 * knee) if knee else fall).mean()
    loss.backward()
    assert result.metrics[keys.PRESERVE_LOSS] == pytest.approx(float(loss.detach()), rel=1e-5)
    names = [name for name, _ in model.named_parameters()]
    plain, joined = (torch.cat([by_name[name].flatten() for name in names]) for by_name in gradients)
    penalty = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    against = min(0.0, float(plain @ penalty)) / float(penalty @ penalty)
    expected = plain + (min(1.0, float(plain.norm() / penalty.norm())) - against) * penalty
    assert float((joined - expected).norm() / expected.norm()) < 1e-4
    assert float((joined - plain).norm() / plain.norm()) > 0.1
    cosine = float(plain @ penalty / (plain.norm() * penalty.norm()))
    assert result.metrics[keys.PRESERVE_COSINE] == pytest.approx(cosine, abs=1e-4)


def test_without_an_update_nothing_is_trained(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=settings(5.0))
    learner._preserving.add([solved(20)])
    before = [p.clone() for p in learner.model.parameters()]
    assert not learner.step(step_batch([solved(30)])).updated
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True))
    assert learner._preserving.num_seen == 2
