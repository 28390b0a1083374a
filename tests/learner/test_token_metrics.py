"""Who carries a step's gradient, and what its weights are owed to, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from learner_builders import POOL, group, probe, target
from plain_settings import correction_settings, loss_settings, probe_settings

import rexrag.metrics as keys
from rexrag.learner.branches import BranchRates
from rexrag.learner.objective import Objective
from rexrag.learner.prepared_step import PreparedRow, prepare_step
from rexrag.learner.token_metrics import TokenRecord, token_metrics
from rexrag.types import TrajectoryGroup


def rows_of(*groups: TrajectoryGroup, **correction: Any) -> list[PreparedRow]:  # noqa: ANN401
    normalized = correction.get("mixture") == "normalized"
    step = prepare_step(
        groups,
        rho=1.0,
        probe=probe_settings(filter="none"),
        correction=correction_settings(**correction),
        loss=loss_settings(train_prefix=normalized),
        hints=POOL,
        rates=BranchRates(),
    )
    return list(step.rows)


def records_of(
    rows: Sequence[PreparedRow],
    *,
    learner: float,
    version: int,
    chunk: int = 3,
    **correction: Any,  # noqa: ANN401
) -> list[TokenRecord]:
    """Of a learner to whom all tokens have one log-prob; in chunks that cut rows."""
    objective = Objective(
        rows,
        denominator=1.0,
        version=version,
        correction=correction_settings(**correction),
        loss=loss_settings(),
        reference_logprob=None,
        proximal_logprob=None,
        device=torch.device("cpu"),
    )
    num_tokens = sum(len(row.tokens.trained) for row in rows)
    for start in range(0, num_tokens, chunk):
        part = slice(start, min(start + chunk, num_tokens))
        values = torch.full((part.stop - part.start,), learner)
        objective.chunk_loss(values, torch.zeros_like(values), part)
    return objective.records


def test_probes_carry_their_share_each_hint_its_own() -> None:
    # A = ∓1/std of four rows of which two are right; probes have 4 and 5 trained tokens, targets 3 each.
    rows = rows_of(group(target(), target(), probe(1.0), probe(1.0, parent=1, hint_id=1)), mixture="none")
    metrics = token_metrics(records_of(rows, learner=-1.0, version=0), correction=correction_settings(mixture="none"))
    assert metrics[keys.GRADIENT_PROBE_SHARE] == pytest.approx(9 / 15)
    assert metrics[keys.hint_key(0)] == pytest.approx(4 / 15)
    assert metrics[keys.hint_key(1)] == pytest.approx(5 / 15)
    assert keys.hint_key(2) not in metrics


def test_without_an_advantage_nothing_is_carried() -> None:
    rows = rows_of(group(target(), target()), mixture="none")
    metrics = token_metrics(records_of(rows, learner=-1.0, version=0), correction=correction_settings(mixture="none"))
    assert metrics[keys.GRADIENT_PROBE_SHARE] is None


def test_older_tokens_owe_their_weight_to_staleness_and_those_of_the_version_to_mismatch() -> None:
    old, new = target(version=0, logprob=-1.0), target(1.0, version=1, logprob=-1.0)
    rows = rows_of(group(old, new), mixture="none")
    # Each of the three tokens of both rows is off by .2: half is staleness; a token cut off in a chunk counts once.
    metrics = token_metrics(records_of(rows, learner=-1.2, version=1), correction=correction_settings())
    assert metrics[keys.WEIGHT_BY_MIXTURE] == 0.0
    assert metrics[keys.WEIGHT_BY_STALENESS] == pytest.approx(0.5)
    assert metrics[keys.WEIGHT_BY_MISMATCH] == pytest.approx(0.5)


def test_what_is_owed_to_mixing_is_the_weight_of_the_row() -> None:
    rows = rows_of(group(target(), target(1.0), probe(1.0, logprob=-2.0, action_starts=[4])), mixture="normalized")
    assert rows[0].log_mixture == pytest.approx(math.log(1.5))  # 1/(1 − α), α = 1/3
    # The hint's two tokens have e⁻⁴ under the policy and ⅓ in the pool; φ of a place never seen is ½.
    assert rows[2].log_mixture == pytest.approx(-math.log(2 / 3 + 1 / 3 * math.exp(4) / 3 / 2), rel=1e-5)
    metrics = token_metrics(
        records_of(rows, learner=-1.0, version=0), correction=correction_settings(mixture="normalized")
    )
    # Targets were sampled with −1 per token, as the learner has them; of the probe's five tokens each is off by one.
    mixing, mismatch = sum(abs(row.log_mixture) for row in rows), 5.0
    assert metrics[keys.WEIGHT_BY_MIXTURE] == pytest.approx(mixing / (mixing + mismatch), rel=1e-5)
    assert metrics[keys.WEIGHT_BY_MISMATCH] == pytest.approx(mismatch / (mixing + mismatch), rel=1e-5)


def test_nothing_is_owed_where_all_weights_are_one() -> None:
    rows = rows_of(group(target(), target(1.0)), mixture="none")
    metrics = token_metrics(records_of(rows, learner=-1.0, version=0), correction=correction_settings())
    assert metrics[keys.WEIGHT_BY_MIXTURE] is None


def test_the_effective_sample_size_is_of_the_advantages_where_these_have_the_shares() -> None:
    """In a dead group the right probes share one weight: of two, the likelier one counts."""
    rows = rows_of(
        group(
            target(),
            target(),
            probe(1.0, logprob=-2.0, action_starts=[4]),
            probe(1.0, parent=1, hint_id=1, logprob=-9.0, action_starts=[4]),
        ),
        mixture="normalized",
    )
    assert rows[3].advantage < 1e-3 * rows[2].advantage
    records = [
        record
        for row in rows
        for record in records_of([row], learner=float(row.tokens.behavior_logprob[0]), version=0, mixture="normalized")
    ]
    metrics = token_metrics(records, correction=correction_settings(mixture="normalized"))
    # Of the probes' eleven tokens the five of the likelier one carry all.
    assert metrics[keys.WEIGHT_ESS_PROBE] == pytest.approx(5 / 11, rel=1e-2)
    assert metrics[keys.WEIGHT_ESS_TARGET] == pytest.approx(1.0)
