"""§10.1: the expected gradient of the weighted estimator, by enumeration, and the bias of all that is not exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from enumeration import EnumeratedRow, ExactRates, Floats, Toy, add_score, on_policy_gradient

from rexrag.learner.branches import BranchRates
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.loss import LossSettings
from rexrag.learner.mixture import MixtureWeigher, ProbeSettings
from rexrag.learner.objective import Objective
from rexrag.learner.prepare import PreparedRow
from rexrag.learner.view import Transfer
from rexrag.types import Kind

EXACT = LossSettings(train_hints=True, train_prefix=True)
UNBOUNDED = CorrectionSettings(mixture="sequence", bound="none")


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def rows(toy: Toy) -> dict[Transfer, list[EnumeratedRow]]:
    return {transfer: toy.rows(transfer=transfer) for transfer in ("hinted", "hint_free")}


@pytest.fixture(autouse=True)
def double_precision() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def advantage(reward: float) -> float:
    return reward - 0.4


def expected_gradient(
    toy: Toy,
    rows: list[EnumeratedRow],
    *,
    transfer: Transfer,
    correction: CorrectionSettings = UNBOUNDED,
    loss: LossSettings = EXACT,
    rates: BranchRates | None = None,
    share: Callable[[EnumeratedRow], float] = lambda row: row.probability * advantage(row.trajectory.reward),
    denominator: float | None = None,
) -> Floats:
    """[P] the learner's expected gradient per target, by its own weigher, views and objective.

    Args:
        share: expected number of a row, times its advantage.
        denominator: N per target; None: 1 + p.
    """
    probe = ProbeSettings(rate=toy.probe_rate, transfer=transfer, filter="none")
    trajectories = [row.trajectory for row in rows]
    num_probes = sum(row.probability for row in rows if row.trajectory.kind is Kind.PROBE)
    weigher = MixtureWeigher(correction=correction, probe=probe, hints=toy.hints, num_probes=1, num_targets=1)
    if correction.mixture == "sequence":
        switches = {row.trajectory: row.switch for row in rows}
        weigher.weigh_sequences(trajectories, rates or ExactRates(toy, switches))
    else:
        weigher.alpha = num_probes / (1.0 + num_probes)
    prepared = []
    for row in rows:
        view = weigher.view(row.trajectory, loss)
        weight, unfloored = weigher.weights(row.trajectory, view, may_floor=row.trajectory.correct)
        prepared.append(
            PreparedRow(
                trajectory=row.trajectory,
                view=view,
                group=0,
                row=0,
                hops=None,
                advantage=share(row),
                is_preserved=False,
                mixture_weight=weight,
                unfloored_weight=unfloored,
            )
        )
    prepared = [row for row in prepared if len(row.view.trained)]
    logprob = torch.tensor([value for row in prepared for value in logprobs(toy, row)], requires_grad=True)
    objective = Objective(
        prepared,
        denominator=1.0 + toy.probe_rate if denominator is None else denominator,
        version=1,
        correction=correction,
        loss=loss,
        reference_logprob=None,
        proximal_logprob=logprob.detach() if correction.mixture == "sequence" else None,
        device=torch.device("cpu"),
    )
    everything = slice(0, len(logprob))
    objective.chunk_loss(logprob, torch.zeros_like(logprob), everything).backward()  # type: ignore[no-untyped-call]
    assert logprob.grad is not None
    by_row = torch.split(-logprob.grad, [len(row.view.trained) for row in prepared])  # type: ignore[no-untyped-call]
    total = np.zeros_like(toy.learner.logits)
    for row, factors in zip(prepared, by_row, strict=True):
        placed = np.zeros(len(row.view.token_ids))
        placed[row.view.trained] = factors.numpy()
        add_score(total, toy, tuple(row.view.token_ids.tolist()), placed)
    return total.ravel()


def logprobs(toy: Toy, row: PreparedRow) -> list[float]:
    """Of the trained tokens under the learner's policy."""
    tokens = tuple(row.view.token_ids.tolist())
    return [toy.learner.logprob(tokens[:i], tokens[i]) for i in row.view.trained.tolist()]


@pytest.mark.parametrize("transfer", ["hinted", "hint_free"])
def test_all_rows_are_there(toy: Toy, rows: dict[Transfer, list[EnumeratedRow]], transfer: Transfer) -> None:
    targets = sum(row.probability for row in rows[transfer] if row.trajectory.kind is Kind.TARGET)
    assert targets == pytest.approx(1.0, abs=1e-12)
    dead = sum(
        row.probability
        for row in rows[transfer]
        if row.trajectory.kind is Kind.TARGET and not row.trajectory.correct and row.prefix is not None
    )
    probes = sum(row.probability for row in rows[transfer] if row.trajectory.kind is Kind.PROBE)
    assert probes == pytest.approx(toy.probe_rate * dead, abs=1e-12)
    assert 0.1 < probes < 0.5


@pytest.mark.parametrize("transfer", ["hinted", "hint_free"])
def test_the_expected_gradient_is_the_on_policy_gradient(
    toy: Toy, rows: dict[Transfer, list[EnumeratedRow]], transfer: Transfer
) -> None:
    exact = on_policy_gradient(toy, lambda tokens: advantage(toy.reward(tokens)))
    got = expected_gradient(toy, rows[transfer], transfer=transfer)
    assert np.abs(exact).max() > 1e-3
    assert np.abs(got - exact).max() < 1e-10
