"""The loop of a rollout actor against a buffer, a runner and an engine that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import pytest
from replay_helpers import make_group

import rexrag.actors.rollout_loop as loop_module
from rexrag.actors.rollout_loop import RolloutLoop
from rexrag.actors.runner import EpisodeRunner, GroupFailedError
from rexrag.engine.protocol import Engine, EngineStats
from rexrag.errors import (
    ConfigError,
    EngineBrokenError,
    EnginePassError,
    RetrieverSetupError,
    RunFailure,
    UnknownLeaseError,
)
from rexrag.retrieval.protocol import RetrieverState
from rexrag.types import (
    AppendOutcome,
    GroupLease,
    LeaseKey,
    Question,
    TrajectoryGroup,
    WeightVersion,
)

VERSION = WeightVersion(incarnation="1", step=0)
TIMEOUT_S = 10.0


def make_lease(number: int, *, grant: int = 1) -> GroupLease:
    question = Question(id=str(number), data_source="world", question="q?", golden_answers=("a",))
    return GroupLease(group_id=f"1-{number}", question=question, epoch=0, attempt=0, version=VERSION, grant=grant)


class Buffer:
    """Gives out leases one call after another, and writes down what it is told."""

    def __init__(self, *rounds: Sequence[GroupLease], outcome: AppendOutcome = "accepted") -> None:
        self.rounds = list(rounds)
        self.outcome: AppendOutcome = outcome
        self.told: list[tuple[str, LeaseKey]] = []
        self.gone: list[LeaseKey] = []
        self.renewed: list[LeaseKey] = []

    async def lease(self, actor_id: str, *, num: int, held: WeightVersion, wait_s: float) -> Sequence[GroupLease]:
        await asyncio.sleep(0.001)
        return self.rounds.pop(0) if self.rounds else ()

    async def renew(self, actor_id: str, *, progress: Mapping[LeaseKey, int]) -> Sequence[LeaseKey]:
        self.renewed += list(progress)
        return [key for key in progress if key in self.gone]

    async def hand_back(self, actor_id: str, *, lease: LeaseKey) -> None:
        self.told.append(("back", lease))

    async def append(self, actor_id: str, *, lease: LeaseKey, ipc: bytes) -> AppendOutcome:
        self.told.append((self.outcome, lease))
        return self.outcome

    async def fail(self, actor_id: str, *, lease: LeaseKey, reason: str) -> None:
        self.told.append((reason, lease))


class Runner:
    """Ends each group as `end` says: with a group, an error, or never (None)."""

    def __init__(self, end: Callable[[GroupLease], Exception | str | None]) -> None:
        self.end = end
        self.is_down = False

    def searches(self) -> RetrieverState:
        return RetrieverState(is_down=self.is_down)

    async def run_group(
        self, lease: GroupLease, *, on_progress: Callable[[int], None] | None = None
    ) -> TrajectoryGroup:
        outcome = self.end(lease)
        if outcome is None:
            await asyncio.sleep(3600)
        if isinstance(outcome, Exception):
            await asyncio.sleep(0.002)
            raise ExceptionGroup("of a group's tasks", [outcome])
        return make_group(lease.group_id, lease.question.key)


class IdleEngine:
    version = VERSION

    def stats(self) -> EngineStats:
        return EngineStats(sampled_tokens=0, prefilled_tokens=0, reused_tokens=0, running=0, waiting=0, forward_s=0.0)


def make_loop(buffer: Buffer, end: Callable[[GroupLease], Exception | str | None]) -> RolloutLoop:
    return RolloutLoop(
        cast("EpisodeRunner", Runner(end)),
        actor_id="a",
        engine=cast("Engine", IdleEngine()),
        buffer=buffer,
        num_groups=8,
    )


def run_until(buffer: Buffer, loop: RolloutLoop, condition: Callable[[], bool]) -> None:
    async def scenario() -> None:
        running = asyncio.create_task(loop.run())
        while not condition() and not running.done():
            await asyncio.sleep(0.002)
        loop.stop()
        await running

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))


def test_a_newer_lease_of_a_group_ends_the_older_try_and_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "RENEW_EVERY_S", 0.01)
    old, new, other = make_lease(0), make_lease(0, grant=2), make_lease(1)
    buffer = Buffer([old, other], [new])
    loop = make_loop(buffer, lambda lease: "done" if lease is new else None)
    run_until(buffer, loop, lambda: bool(buffer.told) and buffer.renewed[-1:] == [other.key])
    assert buffer.told == [("accepted", new.key)]


def test_a_lost_lease_ends_its_own_try_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "RENEW_EVERY_S", 0.01)
    lost, kept = make_lease(0), make_lease(1)
    buffer = Buffer([lost, kept])
    buffer.gone = [lost.key]
    run_until(buffer, make_loop(buffer, lambda _: None), lambda: buffer.renewed[-2:] == [kept.key, kept.key])
    assert buffer.told == []


def test_one_failed_pass_is_one_failure_however_many_groups_were_in_it() -> None:
    failed = EnginePassError("a forward pass failed: OutOfMemoryError()")
    buffer = Buffer([make_lease(number) for number in range(8)], [make_lease(8)])
    loop = make_loop(buffer, lambda lease: "done" if lease.group_id == "1-8" else failed)
    run_until(buffer, loop, lambda: len(buffer.told) == 9)
    assert sorted(what for what, _ in buffer.told) == ["accepted"] + ["back"] * 8  # nobody's fault: no attempt is used


def test_an_engine_that_never_comes_through_is_said_to_be_broken() -> None:
    rounds = [[make_lease(4 * start + number) for number in range(4)] for start in range(200)]
    buffer = Buffer(*rounds)
    loop = make_loop(buffer, lambda lease: EnginePassError(f"a forward pass failed: {lease.group_id}"))
    with pytest.raises(EngineBrokenError, match=r"4 bursts of groups broke in actor a .*a forward pass failed: 1-"):
        run_until(buffer, loop, lambda: False)
    assert {what for what, _ in buffer.told} == {"back"}


def test_bursts_with_groups_between_that_come_through_go_on() -> None:
    rounds = [[make_lease(number)] for number in range(40)]
    buffer = Buffer(*rounds)
    loop = make_loop(buffer, lambda lease: LookupError("x") if int(lease.group_id[2:]) % 3 else "done")
    run_until(buffer, loop, lambda: len(buffer.told) == 40)
    assert sum(what == "invalid" for what, _ in buffer.told) == 26


def test_a_group_that_the_buffer_refuses_is_counted_and_the_loop_goes_on() -> None:
    buffer = Buffer([make_lease(0)], [make_lease(1)], outcome="invalid")
    run_until(buffer, make_loop(buffer, lambda _: "done"), lambda: len(buffer.told) == 2)
    buffer = Buffer(*[[make_lease(number)] for number in range(200)], outcome="invalid")
    with pytest.raises(RunFailure, match=r"4 bursts .*the buffer refused group"):
        run_until(buffer, make_loop(buffer, lambda _: "done"), lambda: False)


def test_a_mistake_of_the_users_that_all_groups_meet_is_told_as_such() -> None:
    buffer = Buffer(*[[make_lease(number)] for number in range(200)])
    loop = make_loop(buffer, lambda _: ConfigError("reward.kind = 'mine:reward' returned nan"))
    with pytest.raises(ConfigError, match="returned nan"):
        run_until(buffer, loop, lambda: False)


def test_an_outage_of_the_retriever_is_not_counted() -> None:
    buffer = Buffer(*[[make_lease(number)] for number in range(200)])

    class FailingRunner:
        def searches(self) -> RetrieverState:
            return RetrieverState()

        async def run_group(self, lease: GroupLease, *, on_progress: object = None) -> TrajectoryGroup:
            raise GroupFailedError("0 of 5 targets ended without an outage")

    loop = make_loop(buffer, lambda _: None)
    loop._runner = cast("EpisodeRunner", FailingRunner())
    run_until(buffer, loop, lambda: len(buffer.told) == 200)
    assert {what for what, _ in buffer.told} == {"env_error"}


def test_a_wrong_set_up_ends_the_run_at_once() -> None:
    error = RetrieverSetupError("http://x/retrieve: status 401 (who?)")
    buffer = Buffer([make_lease(0)])
    with pytest.raises(RetrieverSetupError) as raised:
        run_until(buffer, make_loop(buffer, lambda _: error), lambda: False)
    assert raised.value is error
    assert buffer.told == []


@pytest.mark.parametrize(
    "errors", [[EngineBrokenError("a worker died")], [EnginePassError("a pass failed")] * 2], ids=["broken", "again"]
)
def test_an_idle_actor_whose_engine_fails_evaluations_is_said_to_be_broken(errors: list[Exception]) -> None:
    """Nothing is leased before the first step and after the last, so that nothing else would tell."""
    left = list(errors)

    async def evaluate(questions: Sequence[Question]) -> None:
        raise left.pop(0)

    async def scenario() -> None:
        loop = make_loop(Buffer(), lambda _: None)
        loop._runner.evaluate = evaluate  # type: ignore[method-assign, assignment]
        running = asyncio.create_task(loop.run())
        while left:
            assert not running.done()
            with pytest.raises(type(errors[0])):
                await loop.evaluate([], version=VERSION)
        with pytest.raises(EngineBrokenError, match="an evaluation in actor a failed"):
            await running

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))


def test_no_group_is_begun_while_the_retriever_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "OUTAGE_POLL_S", 0.01)
    buffer = Buffer([make_lease(0)], [make_lease(1)])
    loop = make_loop(buffer, lambda _: "done")
    runner = cast("Runner", loop._runner)
    runner.is_down = True
    looks = 0

    def is_done() -> bool:
        nonlocal looks
        looks += 1
        if looks == 50:
            assert len(buffer.rounds) == 2, "nothing was leased"
            runner.is_down = False
        return len(buffer.told) == 2

    run_until(buffer, loop, is_done)
    assert looks >= 50
    assert [what for what, _ in buffer.told] == ["accepted", "accepted"]


@pytest.mark.parametrize("way", ["stop", "drain"])
def test_a_loop_that_is_to_end_waits_for_no_poll(way: str) -> None:
    class Silent(Buffer):
        async def lease(self, actor_id: str, *, num: int, held: WeightVersion, wait_s: float) -> Sequence[GroupLease]:
            await asyncio.sleep(3600)
            return []

    async def scenario() -> None:
        loop = make_loop(Silent(), lambda _: None)
        running = asyncio.create_task(loop.run())
        await asyncio.sleep(0.01)
        if way == "stop":
            loop.stop()
        else:
            await loop.drain()
        await running

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))


def test_what_a_poll_gets_that_nobody_waits_for_any_more_goes_back() -> None:
    """The actor drains, with a group at hand; the buffer would wait for the new one's lease to run out."""
    late = make_lease(1)

    class Late(Buffer):
        async def lease(self, actor_id: str, *, num: int, held: WeightVersion, wait_s: float) -> Sequence[GroupLease]:
            if self.rounds:
                return self.rounds.pop(0)
            await draining.wait()
            await asyncio.sleep(0.01)
            return [late]

    async def scenario() -> None:
        loop = make_loop(buffer, lambda _: None)
        running = asyncio.create_task(loop.run())
        while buffer.rounds:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        drained = asyncio.create_task(loop.drain())
        draining.set()
        while not buffer.told:
            await asyncio.sleep(0.001)
        assert buffer.told == [("back", late.key)]
        loop.stop()
        await asyncio.gather(running, drained)

    buffer, draining = Late([make_lease(0)]), asyncio.Event()
    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))


@pytest.mark.parametrize("error", [GroupFailedError("no search"), ValueError("broken")])
def test_a_failure_of_a_group_that_is_over_for_the_buffer_is_nobodys_business(error: Exception) -> None:
    class Settled(Buffer):
        async def fail(self, actor_id: str, *, lease: LeaseKey, reason: str) -> None:
            await super().fail(actor_id, lease=lease, reason=reason)
            raise UnknownLeaseError("it is settled")

    class Failing(Runner):
        async def run_group(
            self, lease: GroupLease, *, on_progress: Callable[[int], None] | None = None
        ) -> TrajectoryGroup:
            if lease.key == second.key:
                return make_group(lease.group_id, lease.question.key)
            raise error

    second = make_lease(1)
    buffer = Settled([make_lease(0)], [second])
    loop = make_loop(buffer, lambda _: "done")
    loop._runner = cast("EpisodeRunner", Failing(lambda _: None))
    run_until(buffer, loop, lambda: len(buffer.told) == 2)
    assert [what for what, _ in buffer.told][1] == "accepted"
