"""Whatever public function of the learner gets sizes or values that do not fit, it names them, and never torch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from plain_settings import loss_settings
from torch import nn

from rexrag.learner.advantage import group_advantages
from rexrag.learner.branches import BranchRates
from rexrag.learner.correction import importance_weight, mixture_logprob, sequence_probe_logprob
from rexrag.learner.loss import kl_k3, policy_loss
from rexrag.learner.preserving import decrease_penalty, join_gradients
from rexrag.learner.probe_filter import ProbeScore, kept_probes, rho_of, updated_success
from rexrag.learner.sequence_weights import sequence_log_weights

TWO, THREE = torch.zeros(2), torch.zeros(3)
SCALAR = torch.tensor(0.0)


def loss(**changed: torch.Tensor) -> Any:  # noqa: ANN401
    given = dict.fromkeys(("proximal_logprob", "advantage", "weight"), THREE) | changed
    return policy_loss(THREE, settings=loss_settings(), **given)


def probe_logprob(**changed: torch.Tensor) -> Any:  # noqa: ANN401
    ones = torch.ones(1, dtype=torch.int64)
    given = {"row": ones - 1, "start": ones, "length": ones, "log_pmf": -torch.ones(1), "log_phi": -torch.ones(1)}
    values = {"behavior_logprob": THREE, "offsets": torch.tensor([0, 3]), **given, **changed}
    return sequence_probe_logprob(values.pop("behavior_logprob"), values.pop("offsets"), **values)


def advantages(rewards: list[float], *, probes: list[bool], family: list[int], baseline: str = "joint") -> Any:  # noqa: ANN401
    return group_advantages(
        np.array(rewards), is_probe=np.array(probes, bool), family=family, baseline=baseline  # type: ignore[arg-type]
    )  # fmt: skip


def probes(*, rho: float = 0.5, score: float = -1.0) -> Any:  # noqa: ANN401
    return kept_probes([ProbeScore(group=3, row=1, score=score)], num_targets=4, rho=rho, kind="hint_logprob")


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: mixture_logprob(TWO, THREE, 0.5), r"probe_logprob has the shape \(3,\).*of behavior_logprob, \(2,\)"),
    (lambda: mixture_logprob(THREE, SCALAR, 0.5), r"probe_logprob has the shape \(\)"),
    (lambda: importance_weight(THREE, floor=TWO), r"floor has the shape \(2,\).*of log_ratio, \(3,\)"),
    (lambda: probe_logprob(row=torch.zeros(2, dtype=torch.int64)), r"decompositions must have one length, .*row 2"),
    (lambda: probe_logprob(behavior_logprob=torch.zeros(3, 1)), r"behavior_logprob has the shape \(3, 1\)"),
    (lambda: probe_logprob(offsets=torch.tensor([[0, 3]])), r"offsets has the shape \(1, 2\)"),
    (lambda: loss(advantage=TWO), r"advantage has the shape \(2,\).*of logprob, \(3,\)"),
    (lambda: loss(weight=SCALAR), r"weight has the shape \(\)"),
    (lambda: kl_k3(THREE, reference_logprob=TWO), r"reference_logprob has the shape \(2,\)"),
    (lambda: decrease_penalty(THREE, kept_logprob=TWO, knee=0.0), r"kept_logprob has the shape \(2,\)"),
    (lambda: decrease_penalty(THREE, kept_logprob=THREE, knee=-1.0), r"knee is -1\.0.*at least 0"),
    (lambda: join_gradients([nn.Parameter(TWO)], objective=[]), r"objective has 0 entries, it must have 1"),
    (lambda: advantages([0.0, 1.0], probes=[False], family=[0, 1]), r"is_probe has 1 entry, it must have 2"),
    (lambda: advantages([0.0, 1.0], probes=[False, False], family=[0]), r"family has 1 entry, it must have 2"),
    (lambda: advantages([0.0, np.nan], probes=[False, False], family=[0, 1]), r"rewards has the value nan"),
    (lambda: advantages([0.0, 1.0], probes=[True, True], family=[0, 0], baseline="target"), r"is_probe .* all 2 rows"),
    (lambda: advantages([0.0, 1.0], probes=[False, False], family=[0, 1], baseline="mean"), r"baseline is 'mean'"),
    (lambda: rho_of(1.5, kind="hint_logprob"), r"success is 1\.5, it must be in \[0, 1\]"),
    (lambda: updated_success(0.5, right=3, probes=2), r"right is 3, it must be in \[0, 2\]"),
    (lambda: probes(rho=-0.1), r"rho is -0\.1"),
    (lambda: probes(score=np.nan), r"score of row 1 of group 3 is NaN"),
    (
        lambda: sequence_log_weights(
            [], probe_rate=-1.0, hints=None, branch="turn", transfer="hinted", rates=BranchRates()  # type: ignore[arg-type]
        ),
        r"probe_rate is -1\.0",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_does_not_fit_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
