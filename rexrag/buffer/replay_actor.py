"""Ray shell of the replay buffer: owns a `ReplayState`, and turns its answers into bounded long polls.

All methods run on one event loop and the state never awaits, so each call is one step of the state machine. What it
wrote is synced by another thread before it is answered; one sync serves all who wait for one. Those that poll are woken
by what lets them act alone: an actor by a group that it could lease, the controller by enough finished ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pickle import PickleBuffer
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rexrag.buffer.recovery import open_buffer
from rexrag.buffer.settings import ReplaySettings
from rexrag.buffer.status import BufferPosition, BufferStatus
from rexrag.reporting.log_file import log_process
from rexrag.types import AppendOutcome, GroupLease, LeaseKey, StepBatch, WeightVersion

LOOK_EVERY_S = 0.5
"""How often is looked for leases that are over; no call tells of them."""


class ReplayActor:
    """The buffer as rollout actors, learner and controller see it. Errors are those of `ReplayState`.

    It is not restarted by Ray: what a new one resumes at is the controller's decision.

        buffer = start_replay_actor(settings, resume_step=None)
        position = ray.get(buffer.open.remote())
        ray.get(buffer.publish.remote(version))
        if ray.get(buffer.assign.remote(1, rho=0.18, timeout_s=30.0)):
            batch = ray.get(buffer.take.remote(1))
    """

    def __init__(self, settings: ReplaySettings, *, resume_step: int | None, is_new: bool = False) -> None:
        self._settings = settings
        self._resume_step = resume_step
        self._is_new = is_new
        self._may_assign = asyncio.Event()
        self._idle: dict[asyncio.Future[None], None] = {}  # in the order of waiting
        self._num_woken = 0
        self._syncing: asyncio.Future[None] | None = None
        self._deaths: Counter[str] = Counter()

    async def open(self) -> BufferPosition:
        """Read the log and begin. Not done in the constructor, whose errors Ray hands on as text alone."""
        log_process(self._settings.log_file, part="buffer")
        self._state, self._log = open_buffer(
            self._settings, resume_step=self._resume_step, is_new=self._is_new, clock=time.monotonic
        )
        self._settings = self._settings.without_questions()  # the state has them, packed
        self._looking = asyncio.create_task(self._look_for_lost_leases())
        return self._state.position()

    async def lease(self, actor_id: str, *, num: int, held: WeightVersion | None, wait_s: float) -> list[GroupLease]:
        """Up to `num` groups, waiting at most `wait_s` seconds for the first.

        An actor that does not hold the published weights gets none at once: it has to fetch them first.
        """
        deadline, deaths = time.monotonic() + wait_s, self._deaths[actor_id]
        while not (leases := self._state.lease(actor_id, num=num, held=held)):
            if self._state.is_outdated(held) or not await self._wait_for_groups(deadline):
                break
            if self._deaths[actor_id] != deaths:
                self._wake()  # what woke this one is for another
                break
        return leases

    async def renew(self, actor_id: str, *, progress: Mapping[LeaseKey, int]) -> list[LeaseKey]:
        return self._state.renew(actor_id, progress=progress)

    async def hand_back(self, actor_id: str, *, lease: LeaseKey) -> None:
        self._state.hand_back(actor_id, lease=lease)
        self._wake()

    async def release(self, actor_id: str) -> None:
        self._deaths[actor_id] += 1  # a poll of the dead must not be given groups
        self._state.release(actor_id)
        self._wake()

    async def append(self, actor_id: str, *, lease: LeaseKey, ipc: bytes) -> AppendOutcome:
        """Store a finished group; it is durable when this returns."""
        outcome = self._state.append(actor_id, lease=lease, ipc=ipc)
        self._wake()
        await self._durable()
        return outcome

    async def fail(self, actor_id: str, *, lease: LeaseKey, reason: str) -> None:
        self._state.fail(actor_id, lease=lease, reason=reason)
        self._wake()
        await self._durable()

    async def assign(self, step: int, *, rho: float | None, timeout_s: float) -> bool:
        """Whether `step` has its batch, waiting at most `timeout_s` seconds for it."""
        deadline = time.monotonic() + timeout_s
        while not (done := self._state.assign(step, rho=rho)):
            if (remaining := deadline - time.monotonic()) <= 0:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._may_assign.wait(), remaining)
        self._wake()  # stale drops give admission
        await self._durable()
        return done

    async def take(self, step: int) -> StepBatch:
        """The batch of a step that has one; its groups lie in Ray's object store and are read there, without a copy."""
        batch = self._state.take(step)
        return replace(batch, groups=tuple(PickleBuffer(group) for group in batch.groups))

    async def outcome(self, step: int, *, applied: bool) -> None:
        self._state.outcome(step, applied=applied)
        await self._durable()

    async def publish(self, version: WeightVersion) -> None:
        self._state.publish(version)
        self._wake(all_actors=True)  # who does not hold it has to know

    async def settle(self, step: int) -> None:
        """No resume will go on from before `step`: segments of the log without a younger group are deleted."""
        first = self._state.settle(step)
        await self._durable()
        await asyncio.to_thread(self._log.delete_before, first)

    async def status(self) -> BufferStatus:
        return self._state.status()

    async def _durable(self) -> None:
        """Wait until what was written so far is on disk."""
        target = self._log.num_written
        while self._log.num_durable < target:
            if self._syncing is None or self._syncing.done():
                self._syncing = asyncio.ensure_future(asyncio.to_thread(self._log.sync))
            await asyncio.shield(self._syncing)

    def _wake(self, *, all_actors: bool = False) -> None:
        """Wake who can act now: actors, those that wait longest first, and whoever waits for a batch."""
        if self._state.has_enough:
            self._may_assign.set()
            self._may_assign = asyncio.Event()
        num = len(self._idle) if all_actors else max(0, self._state.num_leasable - self._num_woken)
        for woken in list(islice(self._idle, num)):
            del self._idle[woken]
            woken.set_result(None)
            self._num_woken += 1

    async def _wait_for_groups(self, deadline: float) -> bool:
        """Wait until there may be a group to lease; False at the deadline."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle[woken] = None
        try:
            await asyncio.wait_for(asyncio.shield(woken), deadline - time.monotonic())
        except TimeoutError:
            return woken.done()
        finally:
            self._idle.pop(woken, None)
            self._num_woken -= woken.done()
        return True

    async def _look_for_lost_leases(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._state.expire()
            self._wake()  # any call may have ended leases on its way


def start_replay_actor(
    settings: ReplaySettings, *, resume_step: int | None, is_new: bool = False, node_id: str | None = None
) -> ActorHandle[ReplayActor]:
    """A `ReplayActor` in its own process; see `open_buffer` for `resume_step` and `is_new`.

    Args:
        node_id: where it should be, if there is room; None: anywhere.
    """
    strategy = None if node_id is None else NodeAffinitySchedulingStrategy(node_id, soft=True)
    remote = ray.remote(ReplayActor).options(num_cpus=0, scheduling_strategy=strategy)
    handle = remote.remote(settings, resume_step=resume_step, is_new=is_new)
    return cast("ActorHandle[ReplayActor]", handle)
