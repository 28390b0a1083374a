"""Rollout actors on a real Ray: what dies is replaced, what cannot be placed is waited for beside the rest."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from plain_settings import learner_settings
from replay_helpers import make_settings

from rexrag.actors.build import RolloutSettings
from rexrag.buffer.replay_actor import ReplayActor, start_replay_actor
from rexrag.config import Config
from rexrag.errors import EngineBrokenError, RunFailure
from rexrag.learner.learner_actor import LearnerActor, LearnerSpec, start_export, start_learner
from rexrag.preparation.tiny_model import make_tiny_model
from rexrag.processes import Share
from rexrag.recipe import flatten, make_config
from rexrag.retrieval.bm25 import build_bm25
from rexrag.run import fleet as fleet_module
from rexrag.run.fleet import Fleet
from rexrag.run.part_settings import rollout_settings
from rexrag.run.remote import Handle, call, result_of
from rexrag.run.signals import StopSignal
from rexrag.run.supervisor import Supervisor
from rexrag.types import Question, WeightVersion

pytestmark = pytest.mark.system
QUESTIONS = [Question(id="1", data_source="world", question="Who is it?", golden_answers=("a",))]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RolloutSettings:
    folder = tmp_path_factory.mktemp("parts")
    corpus = folder / "corpus.jsonl"
    corpus.write_text('{"id": "1", "contents": "Who\\nIt is a."}\n')
    build_bm25(corpus, folder / "index")
    make_tiny_model(["Who is it? It is a."], folder / "model", seed=0, width=16, num_layers=1)
    values = {"retriever.path": folder / "index", "model.path": str(folder / "model"), "env.max_turn_tokens": 8}
    values |= {"env.max_trajectory_tokens": 400, "rollout.dtype": "float32", "env.max_observation_tokens": 32}
    config = make_config({**flatten(Config()), **values}, sources={})
    return rollout_settings(config, model_path=str(folder / "model"), num_threads=1)


@pytest.fixture
def buffer(ray_session: None, tmp_path: Path) -> Iterator[Handle[ReplayActor]]:
    handle = start_replay_actor(make_settings(tmp_path), resume_step=None)
    yield handle
    ray.kill(handle)


class Rig:
    """A fleet whose supervisor gives up soon."""

    def __init__(self, settings: RolloutSettings, *, buffer: Handle[ReplayActor], num_actors: int) -> None:
        incarnation = result_of(call(buffer, ReplayActor.open), what="the test").incarnation
        self.first = WeightVersion(incarnation=incarnation, step=0)
        self.dead: list[str] = []
        self.fleet = Fleet(
            settings,
            num_actors=num_actors,
            num_groups=1,
            share=Share(threads=1, cpus=1.0),
            version=self.first,
            buffer=buffer,
            on_death=self.dead.append,
        )
        self.supervisor = Supervisor(fleet=self.fleet, parts={}, stop=StopSignal(), stall_timeout_s=400.0)
        self.until(lambda: self.fleet.is_ready)

    def until(self, is_done: Callable[[], bool]) -> None:
        self.supervisor.until(is_done, what="the test waits")

    def handle(self, number: int) -> Any:  # noqa: ANN401
        return self.fleet._members[number].handle

    def kill(self, number: int) -> None:
        self.hurt(number, signal.SIGKILL)

    def hurt(self, number: int, fault: signal.Signals) -> None:
        os.kill(ray.get(self.handle(number).ready.remote()).pid, fault)

    def version_of(self, number: int) -> WeightVersion:
        version: WeightVersion = ray.get(self.handle(number).__ray_call__.remote(lambda self: self._engine.version))
        return version


@pytest.fixture
def rig(settings: RolloutSettings, buffer: Handle[ReplayActor]) -> Iterator[Callable[[int], Rig]]:
    rigs = []

    def make(num_actors: int) -> Rig:
        rigs.append(Rig(settings, buffer=buffer, num_actors=num_actors))
        return rigs[-1]

    yield make
    for one in rigs:
        one.fleet.stop(timeout_s=1.0)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["died", "hangs"])
def test_a_push_goes_on_where_an_actor_has_gone_meanwhile(rig: Callable[[int], Rig], fault: signal.Signals) -> None:
    one = rig(1)
    one.fleet._hang_timeout_s = 4.0
    one.fleet.run()
    second = WeightVersion(incarnation=one.first.incarnation, step=1)
    one.hurt(0, fault)
    one.fleet.publish(second, None)  # to an actor that is no more
    one.until(lambda: bool(one.dead))
    one.fleet._hang_timeout_s = 400.0  # the next one may be slow
    one.until(lambda: one.fleet.is_ready and one.fleet.is_current)
    assert one.dead == ["rollout-0"]
    assert one.version_of(0) == second, "the new one holds the current weights"
    assert one.fleet.report().num_replaced == 1


def test_a_replacement_without_a_place_holds_up_nobody(
    rig: Callable[[int], Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = rig(2)  # all cores of this Ray
    one.fleet.run()
    monkeypatch.setattr(fleet_module, "TELL_EVERY_S", 0.5)
    taker: Any = ray.remote(num_cpus=1)(type("Taker", (), {"here": lambda self: True})).remote()
    waiting = taker.here.remote()
    one.kill(1)
    assert ray.get(waiting, timeout=200.0), "the place of the dead actor is taken"
    with caplog.at_level(logging.WARNING, logger="rexrag"):
        one.until(lambda: bool(one.dead))
        one.until(lambda: "rollout-2 has not started" in caplog.text)
    assert "a node with 1 CPU free" in caplog.text
    second = WeightVersion(incarnation=one.first.incarnation, step=1)
    one.fleet.publish(second, None)
    one.until(lambda: one.fleet.is_current)
    scores = [ray.get(ref, timeout=200.0) for ref in one.fleet.evaluate(QUESTIONS, version=second)]
    assert [len(share) for share in scores] == [1]
    assert one.fleet.report().num_ready == 1
    ray.kill(taker)
    one.until(lambda: one.fleet.is_ready and one.fleet.is_current)
    assert one.version_of(1) == second


def test_a_broken_engine_is_rebuilt_with_the_current_weights(rig: Callable[[int], Rig]) -> None:
    one = rig(1)
    second = WeightVersion(incarnation=one.first.incarnation, step=1)
    one.fleet.publish(second, None)
    one.until(lambda: one.fleet.is_current)

    def break_engine(self: Any) -> None:  # noqa: ANN401
        async def run() -> None:
            await asyncio.sleep(0.1)
            raise EngineBrokenError("the engine failed 3 times in a row")

        self._loop.run = run

    ray.get(one.handle(0).__ray_call__.remote(break_engine))
    one.fleet.run()
    one.until(lambda: bool(one.dead))
    one.until(lambda: one.fleet.is_ready and one.fleet.is_current)
    assert one.version_of(0) == second


def test_a_version_arrives_in_buckets_and_outlives_the_learner_that_made_it(
    rig: Callable[[int], Rig], settings: RolloutSettings, tmp_path: Path
) -> None:
    make_tiny_model(["Who is it? It is a."], tmp_path / "model", seed=1, width=16, num_layers=1)
    spec = LearnerSpec(
        model=tmp_path / "model",
        settings=learner_settings(),
        hints=[[1, 2]],
        kept=[0],
        threads=1,
        device="cpu",
        seed=0,
        evidence_folder=tmp_path,
        canary=(tuple(range(1, 30)), (5, 4, 3)),
        bucket_bytes=5_000,
    )
    one = rig(1)
    learner = start_learner(spec, share=Share(threads=1))
    loaded = result_of(call(learner, LearnerActor.ready), what="the test")
    assert loaded.num_buckets > 2
    published = start_export(learner, "float32", num_buckets=loaded.num_buckets)
    second = WeightVersion(incarnation=one.first.incarnation, step=1)
    one.fleet.publish(second, published)
    one.until(lambda: one.fleet.is_current)
    report = one.fleet.report()
    first_kl = report.canary_kl
    assert first_kl is not None
    assert first_kl < 1e-8
    assert report.switch_s is not None
    assert 0 < report.switch_s < 60
    assert one.version_of(0) == second

    ray.kill(learner)
    one.fleet.resize(2)
    one.until(lambda: one.fleet.is_ready and one.fleet.is_current)
    assert one.version_of(1) == second
    assert one.fleet.report().canary_kl == pytest.approx(first_kl, abs=1e-8), "and proves to hold the same weights"


def test_actors_that_die_again_and_again_end_the_run_with_the_cause(
    rig: Callable[[int], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "MAX_DEATHS_IN_A_ROW", 1)
    one = rig(1)
    one.fleet.run()
    with pytest.raises(RunFailure, match="rollout actors died 2 times in a row without a finished group between"):
        for _ in range(2):
            one.until(lambda: one.fleet.is_ready)
            one.kill(0)
            one.until(lambda: not one.fleet.is_ready)


def test_the_only_actor_is_replaced_without_a_pause(rig: Callable[[int], Rig]) -> None:
    one = rig(1)
    one.fleet._replacements._num_short = 9
    one.kill(0)
    one.until(lambda: bool(one.dead))
    one.fleet.check()
    assert [actor.state for actor in one.fleet.describe()] == ["starting"]


def test_actors_that_go_with_one_node_are_one_death(rig: Callable[[int], Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "MAX_DEATHS_IN_A_ROW", 1)
    one = rig(2)
    one.fleet.run()
    for number in range(2):
        one.kill(number)
    one.until(lambda: len(one.dead) == 2)
    one.until(lambda: one.fleet.is_ready)
    assert one.fleet.report().num_replaced == 2


def test_an_error_that_another_actor_would_meet_too_ends_the_run_as_what_it_is(rig: Callable[[int], Rig]) -> None:
    one = rig(1)

    def refuse(self: Any) -> None:  # noqa: ANN401
        async def run() -> None:
            raise RunFailure("the log cannot be written")

        self._loop.run = run

    ray.get(one.handle(0).__ray_call__.remote(refuse))
    one.fleet.run()
    with pytest.raises(RunFailure, match="the log cannot be written"):
        one.until(lambda: False)
    assert one.dead == []
