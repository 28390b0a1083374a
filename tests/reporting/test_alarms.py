from __future__ import annotations

import pytest

import rexrag.metrics as keys
from rexrag.reporting.alarms import Alarms


@pytest.mark.parametrize(
    ("key", "fine", "bad", "warning", "advice"),
    [
        (keys.WEIGHT_ESS_PROBE, 0.11, 0.09, keys.WARNING_ESS, 'method = "rex"'),
        (keys.WEIGHT_ESS_TARGET, 0.11, 0.09, keys.WARNING_ESS, "replay.max_staleness"),
        (keys.WEIGHT_TRUNCATED_SHARE, 0.1, 0.11, keys.WARNING_TRUNCATION, "replay.max_staleness"),
        (keys.TARGET_REFLECT_RATE, 0.2, 0.21, keys.WARNING_REFLECTING, "hint_free"),
        (keys.POLICY_MISMATCH_KL, 0.01, 0.011, keys.WARNING_MISMATCH, "rollout.dtype"),
    ],
)
def test_a_warning_begins_once_and_lasts(key: str, fine: float, bad: float, warning: str, advice: str) -> None:
    watch = Alarms()
    begun, flags = [], []
    for value in (None, fine, bad, bad, fine, bad):
        seen, started = watch.look({key: value})
        flags.append(seen[warning])
        begun.append([one.key for one in started])
        assert all(advice in one.text for one in started)
    assert flags == [0, 0, 1, 1, 0, 1]
    assert begun == [[], [], [warning], [], [], [warning]]


def test_few_probes_may_carry_all_where_weights_are_shares_of_their_question() -> None:
    metrics = {keys.WEIGHT_ESS_PROBE: 0.05, keys.WEIGHT_ESS_TARGET: 0.5}
    assert Alarms().look(metrics)[0][keys.WARNING_ESS] == 1
    assert Alarms(by_shares=True).look(metrics)[0][keys.WARNING_ESS] == 0
    assert Alarms(by_shares=True).look({**metrics, keys.WEIGHT_ESS_TARGET: 0.05})[0][keys.WARNING_ESS] == 1


def test_a_server_that_refuses_most_queries_is_told_of() -> None:
    def flag(refused: float, searches: float | None) -> float:
        metrics = {keys.SEARCH_REFUSED: refused, keys.TARGET_SEARCHES: searches, keys.TARGET_COUNT: 10.0}
        return Alarms().look(metrics)[0][keys.WARNING_REFUSED]

    assert [flag(0, 0.0), flag(0, None), flag(5, 0.5), flag(6, 0.5), flag(1, 0.0)] == [0, 0, 0, 1, 1]


def test_actors_that_die_one_after_the_other_are_told_of() -> None:
    alarms = Alarms()
    flags, begun = [], []
    for replaced in (0, 1, 2, 2, 3, *[3] * 8, 4):
        seen, started = alarms.look({keys.ROLLOUT_REPLACED: float(replaced)})
        flags.append(seen[keys.WARNING_LOSSES])
        begun += started
    assert flags == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    (told,) = begun
    assert told.text.startswith("3 rollout actors died within 5 steps and had to be replaced")


def test_correct_rows_that_become_unlikely() -> None:
    watch = Alarms()
    flags = [
        watch.look({keys.POLICY_CORRECT_LOGPROB: value})[0][keys.WARNING_FORGETTING]
        for value in (-0.2, -0.2, -0.22, -0.25, -0.35, -0.2, None)
    ]
    assert flags == [0, 0, 0, 0, 1, 0, 0]
    quiet = Alarms()
    tiny = [quiet.look({keys.POLICY_CORRECT_LOGPROB: value})[0] for value in (-0.01, -0.01, -0.01, -0.04)]
    assert not any(flags[keys.WARNING_FORGETTING] for flags in tiny)
