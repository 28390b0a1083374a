"""A collapse is told from noise, from a way out of a dead end, and from an end that was never better."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rexrag.metrics as keys
from rexrag.config import Config
from rexrag.errors import CollapsedError, RunFailure
from rexrag.files import read_jsonl
from rexrag.run.guard import LEAST_HISTORY, WINDOW, Guard, Trip
from rexrag.run.plan import TrainRequest
from rexrag.run.rewind import MAX_REWINDS, go_back, note_collapse, rate_factor
from rexrag.run_folder import RunFolder

HEALTHY: dict[str, float | None] = {
    keys.TARGET_REWARD: 0.6,
    keys.TARGET_VALID_ACTION_RATE: 0.99,
    keys.TARGET_SEARCHES: 2.0,
    keys.TARGET_LIMIT_RATE: 0.01,
    keys.TARGET_REFLECT_RATE: 0.0,
    keys.POLICY_ENTROPY: 0.12,
    keys.POLICY_CORRECT_LOGPROB: -0.1,
    keys.GRAD_NORM: 0.2,
    keys.WEIGHT_ESS_TARGET: 0.98,
}


def play(steps: list[dict[str, float | None]]) -> Trip | None:
    """The first trip."""
    guard = Guard()
    trips = [trip for step, metrics in enumerate(steps, start=1) if (trip := guard.look(step, metrics))]
    return trips[0] if trips else None


@pytest.mark.parametrize(
    ("sign", "value"),
    [
        (keys.TARGET_VALID_ACTION_RATE, 0.3),
        (keys.TARGET_SEARCHES, 0.1),
        (keys.TARGET_LIMIT_RATE, 0.9),
        (keys.TARGET_REFLECT_RATE, 0.95),
        (keys.POLICY_ENTROPY, 2.5),
        (keys.POLICY_ENTROPY, 0.01),
        (keys.POLICY_CORRECT_LOGPROB, -1.5),
        (keys.GRAD_NORM, 9.0),
        (keys.WEIGHT_ESS_TARGET, 0.1),
    ],
)
def test_a_lost_reward_with_a_second_sign_is_a_collapse(sign: str, value: float) -> None:
    broken = {**HEALTHY, keys.TARGET_REWARD: 0.05, sign: value}
    trip = play([HEALTHY] * 10 + [broken] * 10)
    assert trip is not None
    assert trip.step <= 10 + WINDOW
    assert trip.first_bad <= 11 <= trip.step
    assert any(sign in reason for reason in trip.reasons)
    assert "target/reward" in trip.reasons[0]


@pytest.mark.parametrize(
    "steps",
    [
        [HEALTHY] * 40,
        [HEALTHY] * 10 + [{**HEALTHY, keys.TARGET_REWARD: 0.0}] * 20,  # other questions, perhaps: it writes as before
        [HEALTHY] * 10 + [{**HEALTHY, keys.TARGET_VALID_ACTION_RATE: 0.5}] * 20,  # and is right all the same
        [HEALTHY] * 10 + [{**HEALTHY, keys.TARGET_REWARD: 0.0, keys.TARGET_LIMIT_RATE: 1.0}] * 2 + [HEALTHY] * 20,
        [{**HEALTHY, keys.TARGET_REWARD: 0.02}] * 8 + [{**HEALTHY, keys.TARGET_REWARD: 0.0, keys.GRAD_NORM: 9.0}] * 9,
        [dict.fromkeys(HEALTHY, None)] * 30,
        [],
    ],
    ids=["healthy", "reward alone", "a sign alone", "a dip", "never better", "no values", "no step"],
)
def test_what_is_no_collapse(steps: list[dict[str, float | None]]) -> None:
    assert play(steps) is None


@given(
    st.lists(st.dictionaries(st.sampled_from(sorted(HEALTHY)), st.none() | st.floats(-9, 9), max_size=9), max_size=40)
)
def test_it_looks_at_anything(steps: list[dict[str, float | None]]) -> None:
    trip = play(steps)
    assert trip is None or trip.step >= WINDOW + LEAST_HISTORY


def test_what_was_seen_before_a_resume_counts() -> None:
    broken = {**HEALTHY, keys.TARGET_REWARD: 0.05, keys.GRAD_NORM: 9.0}
    guard = Guard([HEALTHY] * 10)
    assert any(guard.look(10 + number, broken) for number in range(1, WINDOW + 1))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "run", recipe="mine", seed=0, config="")
    (run.identity).write_text(json.dumps({"files": {}, "checkpoint": None, "step": 0}))
    for step in (2, 4, 6, 8):
        folder = run.checkpoints / f"step-{step:06d}"
        folder.mkdir()
        (folder / "COMMIT").write_text("")
    run.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 10)))
    return run


def test_a_run_that_is_killed_while_it_goes_back_has_good_checkpoints_alone(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    request = TrainRequest(config=Config(), run=run, start_step=0, checkpoint=None, resumed=False)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with run, pytest.raises(KeyboardInterrupt):
        go_back(request, CollapsedError("it breaks", 5))
    assert sorted(run.committed_checkpoints()) == [2, 4]


def test_a_run_goes_back_before_the_window_and_gives_up_after_two_times(run: RunFolder) -> None:
    request = TrainRequest(config=Config(), run=run, start_step=0, checkpoint=None, resumed=False)
    assert rate_factor(run) == 1.0
    with run:
        told = note_collapse(run, Trip(step=9, first_bad=5, reasons=("a", "b")), action="rewind")
        after = go_back(request, CollapsedError(told, 5))
        assert (after.start_step, after.resumed) == (4, True)
        assert after.checkpoint == run.checkpoints / "step-000004"
        assert sorted(run.committed_checkpoints()) == [2, 4]
        assert [line["step"] for line in read_jsonl(run.metrics)] == [1, 2, 3, 4]
        assert run.record().steps == 4
        assert rate_factor(run) == 0.5
        note_collapse(run, Trip(step=4, first_bad=1, reasons=("a",)), action="rewind")
        assert go_back(after, CollapsedError("it breaks", 1)).checkpoint is None, "from the start"
        assert rate_factor(run) == 0.25
        note_collapse(run, Trip(step=6, first_bad=2, reasons=("a",)), action="rewind")
        with pytest.raises(RunFailure, match=f"gone back {MAX_REWINDS} times already"):
            go_back(after, CollapsedError("it breaks", 2))
