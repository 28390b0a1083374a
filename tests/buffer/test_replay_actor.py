from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias, cast

import pytest
import ray
from replay_helpers import make_ipc
from replay_helpers import make_settings as replay_settings

from rexrag.buffer import log_writer
from rexrag.buffer.log_writer import LogWriteError
from rexrag.buffer.recovery import accounting_from_log
from rexrag.buffer.replay_actor import ReplayActor, start_replay_actor
from rexrag.buffer.segments import segments
from rexrag.buffer.settings import ReplaySettings
from rexrag.errors import UnknownLeaseError
from rexrag.types import GroupLease, LeaseKey, WeightVersion

FIRST = WeightVersion(incarnation="run", step=0)


Handle: TypeAlias = Any
"""A Ray actor handle: its methods are made at run time."""


def start(replay: ReplaySettings, *, resume_step: int | None) -> Handle:
    handle: Handle = start_replay_actor(replay, resume_step=resume_step)
    get(handle.open.remote())
    return handle


def make_settings(folder: Path, **changes: float) -> ReplaySettings:
    """Leases that nobody renews last, however slow the machine."""
    return replay_settings(folder, **{"lease_timeout_s": 900.0, "lease_deadline_s": 900.0, **changes})


def get(ref: object) -> Any:  # noqa: ANN401
    return ray.get(cast("ray.ObjectRef[Any]", ref), timeout=300.0)


@pytest.fixture
def buffer(ray_session: None, tmp_path: Path) -> Iterator[Handle]:
    handle = start(make_settings(tmp_path), resume_step=None)
    get(handle.publish.remote(FIRST))
    yield handle
    ray.kill(handle)


def lease(handle: Handle, num: int) -> list[GroupLease]:
    leases: list[GroupLease] = get(handle.lease.remote("a", num=num, held=FIRST, wait_s=0.0))
    return leases


def append(handle: Handle, item: GroupLease) -> str:
    answer: str = get(handle.append.remote("a", lease=item.key, ipc=make_ipc(item)))
    return answer


@pytest.mark.system
def test_a_killed_buffer_is_recovered_by_a_new_one(ray_session: None, tmp_path: Path) -> None:
    replay = make_settings(tmp_path)
    first = start(replay, resume_step=None)
    get(first.publish.remote(FIRST))
    done, also_done, unfinished = lease(first, 3)
    assert [append(first, item) for item in (done, also_done, done)] == ["accepted", "accepted", "duplicate"]
    counts = accounting_from_log(tmp_path)
    os.kill(get(first.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        get(first.status.remote())
    assert accounting_from_log(tmp_path) == counts

    second = start(replay, resume_step=0)
    get(second.publish.remote(FIRST))
    assert accounting_from_log(tmp_path) == counts
    assert append(second, done) == "duplicate"
    assert lease(second, 1)[0].group_id == unfinished.group_id
    assert get(second.assign.remote(1, rho=0.18, timeout_s=10.0))
    batch = get(second.take.remote(1))
    groups = [memoryview(group) for group in batch.groups]
    assert groups == [make_ipc(done), make_ipc(also_done)]
    assert not any(isinstance(group.obj, bytes) for group in groups), "they are read in the object store"
    ray.kill(second)


@pytest.mark.system
def test_polls_wait_and_are_woken(buffer: Handle) -> None:
    started = time.monotonic()
    is_there = buffer.assign.remote(1, rho=None, timeout_s=60.0)
    items = lease(buffer, 6)
    blocked = buffer.lease.remote("b", num=1, held=FIRST, wait_s=60.0)
    for item in items:
        append(buffer, item)
    assert get(is_there)
    assert len(get(buffer.take.remote(1)).groups) == 2
    get(buffer.outcome.remote(1, applied=True))
    assert ray.wait([blocked], timeout=0.3)[0] == []
    get(buffer.publish.remote(WeightVersion(incarnation="run", step=1)))
    assert get(blocked) == []  # "b" has to fetch the new weights first
    newer = get(buffer.lease.remote("c", num=1, held=WeightVersion(incarnation="run", step=1), wait_s=60.0))
    assert newer[0].version.step == 1
    assert time.monotonic() - started < 30.0
    assert get(buffer.assign.remote(2, rho=None, timeout_s=0.1))
    assert get(buffer.assign.remote(3, rho=None, timeout_s=0.1))
    assert not get(buffer.assign.remote(4, rho=None, timeout_s=0.1))


@pytest.mark.system
def test_errors_reach_the_caller_as_what_they_are(buffer: Handle, tmp_path: Path) -> None:
    (item,) = lease(buffer, 1)
    with pytest.raises(UnknownLeaseError, match="9-9"):
        get(buffer.append.remote("a", lease=LeaseKey("9-9", 1), ipc=make_ipc(item)))
    assert get(buffer.append.remote("a", lease=item.key, ipc=b"nothing")) == "invalid"
    assert accounting_from_log(tmp_path)["dropped"] == {"invalid": 1}


def test_the_poll_of_a_dead_actor_gets_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        actor = ReplayActor(make_settings(tmp_path), resume_step=None)
        await actor.open()
        poll = asyncio.create_task(actor.lease("a", num=1, held=FIRST, wait_s=20.0))
        await asyncio.sleep(0)
        await actor.release("a")
        await actor.publish(FIRST)
        assert await poll == []
        assert (await actor.status()).leased == 0
        assert len(await actor.lease("a", num=1, held=FIRST, wait_s=0.0)) == 1

    asyncio.run(scenario())


def test_a_lost_lease_reaches_a_waiting_actor_by_itself(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = make_settings(tmp_path, groups_per_step=1, max_staleness=0, lease_timeout_s=0.2)
        actor = ReplayActor(settings, resume_step=None)
        await actor.open()
        await actor.publish(FIRST)
        (first,) = await actor.lease("a", num=1, held=FIRST, wait_s=0.0)
        (second,) = await actor.lease("b", num=1, held=FIRST, wait_s=20.0)
        assert second.group_id == first.group_id

    asyncio.run(scenario())


def test_who_cannot_act_is_not_woken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 actors wait while others work: an append wakes none of them, a freed group exactly one."""

    async def scenario() -> None:
        actor = ReplayActor(make_settings(tmp_path, num_questions=40, groups_per_step=4), resume_step=None)
        await actor.open()
        await actor.publish(FIRST)
        items = await actor.lease("a", num=12, held=FIRST, wait_s=0.0)
        assert len(items) == 12
        polls = [asyncio.create_task(actor.lease(f"{i}", num=1, held=FIRST, wait_s=60.0)) for i in range(64)]
        batch = asyncio.create_task(actor.assign(1, rho=None, timeout_s=60.0))
        await asyncio.sleep(0)
        tries = Counter[str]()
        ask, choose = actor._state.lease, actor._state.assign
        monkeypatch.setattr(actor._state, "lease", lambda *a, **k: tries.update(["lease"]) or ask(*a, **k))
        monkeypatch.setattr(actor._state, "assign", lambda *a, **k: tries.update(["assign"]) or choose(*a, **k))
        for item in items[:4]:
            await actor.append("a", lease=item.key, ipc=make_ipc(item))
        assert await batch
        assert tries == {"assign": 1}
        await actor.hand_back("a", lease=items[5].key)
        await actor.fail("a", lease=items[6].key, reason="env_error")
        await asyncio.sleep(0.05)
        assert tries == {"assign": 1, "lease": 2}
        assert [len(poll.result()) for poll in polls if poll.done()] == [1, 1]
        assert all(poll.done() for poll in polls[:2]), "those that wait longest"
        await actor.outcome(1, applied=True)
        await actor.publish(WeightVersion(incarnation="run", step=1))
        assert await asyncio.gather(*polls[2:]) == [[]] * 62, "all others have to fetch the new weights"

    asyncio.run(scenario())


def test_one_sync_serves_all_who_wait_for_one_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[float] = []
    go_on = threading.Event()

    def slowly(fd: int) -> None:
        assert go_on.wait(30)
        os.fsync(fd)
        syncs.append(time.monotonic())

    async def scenario() -> None:
        actor = ReplayActor(make_settings(tmp_path, num_questions=40, groups_per_step=10), resume_step=None)
        await actor.open()
        await actor.publish(FIRST)
        items = await actor.lease("a", num=30, held=FIRST, wait_s=0.0)
        monkeypatch.setattr(log_writer, "_sync_data", slowly)
        appends = [asyncio.create_task(actor.append("a", lease=i.key, ipc=make_ipc(i))) for i in items]
        await asyncio.sleep(0.02)
        assert (await actor.status()).finished == 30
        assert not syncs, "the loop answers while the disk is busy"
        assert not any(append.done() for append in appends), "nobody is answered before"
        go_on.set()
        assert await asyncio.gather(*appends) == ["accepted"] * 30
        assert len(syncs) <= 3
        assert accounting_from_log(tmp_path)["pending"] == 30

    asyncio.run(scenario())


def test_a_failed_sync_reaches_all_who_waited_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def scenario() -> None:
        actor = ReplayActor(make_settings(tmp_path, num_questions=40), resume_step=None)
        await actor.open()
        await actor.publish(FIRST)
        items = await actor.lease("a", num=4, held=FIRST, wait_s=0.0)
        await actor.append("a", lease=items[0].key, ipc=make_ipc(items[0]))
        monkeypatch.setattr(log_writer, "_sync_data", fail)
        appends = [actor.append("a", lease=i.key, ipc=make_ipc(i)) for i in items[1:3]]
        errors = await asyncio.gather(*appends, return_exceptions=True)
        assert all(isinstance(error, LogWriteError) for error in errors)
        with pytest.raises(LogWriteError, match="check the disk"):
            await actor.append("a", lease=items[3].key, ipc=make_ipc(items[3]))
        with pytest.raises(LogWriteError, match="check the disk"):
            await actor.assign(1, rho=None, timeout_s=1.0)

    asyncio.run(scenario())
    assert accounting_from_log(tmp_path)["pending"] == 4, "what was acknowledged is there, and the issues before it"


def test_what_is_settled_leaves_the_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        actor = ReplayActor(make_settings(tmp_path, num_questions=9, segment_bytes=9000), resume_step=None)
        await actor.open()
        for step in range(12):
            version = WeightVersion(incarnation="run", step=step)
            await actor.publish(version)
            for item in await actor.lease("a", num=2, held=version, wait_s=0.0):
                await actor.append("a", lease=item.key, ipc=make_ipc(item))
            assert await actor.assign(step + 1, rho=None, timeout_s=1.0)
            await actor.outcome(step + 1, applied=True)
            await actor.settle(step)
        assert len(segments(tmp_path)) <= 3 < int(segments(tmp_path)[0].stem[-6:])

    asyncio.run(scenario())
