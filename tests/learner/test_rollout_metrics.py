from __future__ import annotations

import numpy as np
import pytest
from learner_builders import POOL, group, probe, target, trajectory
from plain_settings import correction_settings

import rexrag.metrics as keys
from rexrag.learner.rollout_metrics import reflects, rollout_metrics
from rexrag.learner.token_metrics import effective_sample_size, token_metrics
from rexrag.types import EndReason, Origin


def test_shares_of_rollouts_and_groups() -> None:
    solved = group(target(1.0), target(0.0, branch_point=1, num_malformed=1), name="a")
    rescued = group(target(0.0, branch_point=1), target(0.0), probe(1.0), probe(0.0, parent=1), name="b")
    dead = group(target(0.0), target(0.0, end_reason=EndReason.TURNS), name="c")
    masked = target(0.0, end_reason=EndReason.ENV_ERROR)
    broken = group(target(1.0), masked, name="d")
    got = rollout_metrics([solved, rescued, dead, broken], hints=POOL, version=2)
    expected = {
        keys.TARGET_COUNT: 7,
        keys.TARGET_EM: 2 / 7,
        keys.TARGET_DEAD_END_RATE: 5 / 7,
        keys.TARGET_UNPROBEABLE_RATE: 3 / 5,
        keys.TARGET_LIMIT_RATE: 1 / 7,
        keys.TARGET_VALID_ACTION_RATE: 1 - 1 / 7,
        keys.TARGET_TOKENS: 3,
        keys.TARGET_RETRIEVAL_RECALL: None,
        keys.PROBE_COUNT: 2,
        keys.PROBE_EM: 0.5,
        keys.PROBE_DEAD_END_RATE: 0.5,
        keys.ENV_ERROR_COUNT: 1,
        keys.GROUP_COUNT: 4,
        keys.GROUP_DEAD_END_RATE: 0.5,
        keys.GROUP_RESCUED: 0.25,
        keys.STALENESS_MEAN: 2,
        keys.STALENESS_MAX: 2,
    }
    assert {key: got[key] for key in expected} == pytest.approx(expected)


def test_refused_searches_of_targets_are_counted() -> None:
    rows = [target(num_refused=2), target(num_refused=1), target(num_refused=5, end_reason=EndReason.ENV_ERROR)]
    got = rollout_metrics([group(*rows, name="a")], hints=POOL, version=0)
    assert got[keys.SEARCH_REFUSED] == 3


def test_causes_of_dead_groups_and_who_rescued_them() -> None:
    groups = [
        group(target(gold_retrieved=False), target(gold_retrieved=False), probe(1.0), name="never, rescued"),
        group(target(gold_retrieved=False), target(gold_retrieved=False), probe(0.0), name="never"),
        group(target(gold_retrieved=True), target(gold_retrieved=True), target(gold_retrieved=False), name="not used"),
        group(target(end_reason=EndReason.TURNS, num_malformed=2), name="malformed"),
        group(target(end_reason=EndReason.LENGTH), probe(1.0), name="limit"),
        group(target(), name="unknown"),
        group(target(1.0), name="alive"),
    ]
    got = rollout_metrics(groups, hints=POOL, version=0)
    expected = {
        keys.DEAD_NEVER_RETRIEVED: 2 / 6,
        keys.DEAD_NOT_USED: 1 / 6,
        keys.DEAD_MALFORMED: 1 / 6,
        keys.DEAD_LIMIT: 1 / 6,
        keys.RESCUED_NEVER_RETRIEVED: 0.5,
        keys.RESCUED_NOT_USED: 0.0,
        keys.RESCUED_MALFORMED: 0.0,
        keys.RESCUED_LIMIT: 1.0,
    }
    assert {key: got[key] for key in expected} == pytest.approx(expected)
    assert got[keys.TARGET_RETRIEVAL_RECALL] == pytest.approx(2 / 7)


def test_reflecting_means_in_the_policys_own_words() -> None:
    assert reflects(trajectory([(Origin.POLICY, [10, 5, 6, 11])]), hints=POOL)
    assert not reflects(trajectory([(Origin.ENV, [5, 6])]), hints=POOL)
    assert not reflects(trajectory([(Origin.POLICY, [5]), (Origin.ENV, [6])]), hints=POOL)
    assert not reflects(trajectory([(Origin.POLICY, [10])], prompt=[5, 6]), hints=POOL)


def test_nothing_has_no_values() -> None:
    got = rollout_metrics([], hints=POOL, version=0)
    assert {got[key] for key in (keys.TARGET_EM, keys.GROUP_RESCUED, keys.DEAD_LIMIT, keys.STALENESS_MAX)} == {None}
    assert set(token_metrics([], correction=correction_settings()).values()) == {None}


def test_effective_sample_size() -> None:
    assert effective_sample_size(np.array([2.0, 2.0], np.float32)) == pytest.approx(1.0)
    assert effective_sample_size(np.array([1.0, 3.0], np.float32)) == pytest.approx(16 / 20)
    assert effective_sample_size(np.array([0.0], np.float32)) is None
