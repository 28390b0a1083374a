"""What status, scale and stop say of a run that begins, ends, or loses its control meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.exceptions import ActorUnavailableError, NodeDiedError, OutOfMemoryError

from rexrag.buffer.status import BufferStatus
from rexrag.errors import ConfigError, PartDiedError, RunFailure
from rexrag.run import remote_control
from rexrag.run.control import Desk
from rexrag.run.control_actor import RunControl
from rexrag.run.remote import result_of
from rexrag.run.remote_control import Place, RemoteRun, find_place, remote_run
from rexrag.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return RunFolder.create(tmp_path / "run", recipe="mine.toml", seed=0, config="")


def test_a_run_that_is_being_started_is_told_from_one_that_was_killed(run: RunFolder) -> None:
    run.cluster.write_text(json.dumps({"address": "192.0.2.7:6379"}))  # of a start that was killed
    with run:
        with pytest.raises(ConfigError, match="is being started, and says nothing yet"):
            find_place(str(run.root), address=None)
        record = (run.root / "run.json").read_text()
    (run.root / "run.json").write_text(record)  # as a kill leaves it
    with pytest.raises(ConfigError, match=r"does not go on \(it was killed\); start it with: rexrag train"):
        find_place(str(run.root), address=None)


def test_who_asks_whether_a_run_goes_on_keeps_none_from_it(run: RunFolder) -> None:
    with run:
        assert run.is_in_use()
    assert not run.is_in_use()
    with run:
        assert run.is_in_use()


def test_a_run_whose_ray_is_gone_has_ended(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(address: str) -> AbstractContextManager[None]:
        raise ConfigError(f"RAY_ADDRESS = {address}: cannot be reached")

    monkeypatch.setattr(remote_control, "joined", joined)
    with run:
        run.cluster.write_text(json.dumps({"address": "192.0.2.7:6379"}))
        place = find_place(str(run.root), address=None)
        with pytest.raises(RunFailure, match="ended meanwhile, or was killed"), remote_run(place):
            pass
    with pytest.raises(ConfigError, match="cannot be reached"), remote_run(Place(address="192.0.2.7:6379", name=None)):
        pass


@pytest.mark.system
def test_a_run_that_ends_between_two_questions_has_ended(monkeypatch: pytest.MonkeyPatch, ray_session: None) -> None:
    @contextmanager
    def joined(address: str) -> Iterator[None]:
        yield

    monkeypatch.setattr(remote_control, "joined", joined)
    monkeypatch.setattr(remote_control, "_running", lambda: ["rexrag-gone"])
    with (
        pytest.raises(RunFailure, match="run rexrag-gone: ended meanwhile"),
        remote_run(Place(address="auto", name=None)),
    ):
        pass


def test_a_control_that_is_started_anew_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([ActorUnavailableError("not now", None), None])
    asked: list[int] = []

    def get(ref: object, *, timeout: float) -> object:
        answer = next(answers)
        if answer is not None:
            raise answer
        return answer

    def ask(*_: object, **__: object) -> object:
        asked.append(1)
        return object()

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(remote_control, "call", ask)
    RemoteRun("first", cast("Any", None)).stop()
    assert len(asked) == 2


def test_what_is_wanted_of_a_control_that_was_started_anew_is_new() -> None:
    before, anew = RunControl(), RunControl()
    for control in (before, anew):
        control._change(stop=True)
    assert anew._wanted.revision > before._wanted.revision


@pytest.mark.parametrize("kind", [OutOfMemoryError, NodeDiedError])
def test_a_process_that_was_killed_for_its_memory_or_with_its_node_has_died(
    kind: Callable[[str], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(ref: object) -> object:
        raise kind("gone")

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(PartDiedError, match="the run waits for scores: its process died"):
        result_of(cast("Any", None), what="the run waits for scores")


def test_groups_that_finish_in_any_wait_show_that_actors_work(tmp_path: Path) -> None:
    progressed: list[bool] = []
    fleet = SimpleNamespace(progressed=lambda: progressed.append(True))
    desk = Desk(
        cast("Any", None),
        run_folder=tmp_path,
        num_steps=1,
        reporter=cast("Any", None),
        fleet=cast("Any", fleet),
        buffer=cast("Any", None),
        retriever="bm25",
        on_scale=lambda _: None,
    )
    counts = dict.fromkeys(("last_step", "waiting", "leased", "finished", "assigned", "capacity"), 0)
    none = BufferStatus(published=None, **counts, questions_to_ask_again=0, num_finished=0, num_flat=0, actors={})
    told = iter([none, replace(none, num_finished=3), replace(none, num_finished=3), None])
    desk._buffer_status = cast("Any", SimpleNamespace(value=lambda: next(told)))
    desk._exchange = cast("Any", SimpleNamespace(value=lambda: None, is_due=lambda _: False))
    for expected in (0, 1, 1, 1):
        desk.look()
        assert len(progressed) == expected
