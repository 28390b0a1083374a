"""Ray shell of the replay buffer: owns a `ReplayState`, and turns its answers into bounded long polls.

All methods run on one event loop and the state never awaits, so each call is one step of the state machine. A call that
must be durable blocks the loop for one disk sync.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rexrag.buffer.recovery import open_buffer
from rexrag.buffer.settings import ReplaySettings
from rexrag.buffer.status import BufferPosition, BufferStatus
from rexrag.reporting.log_file import log_process
from rexrag.types import AppendOutcome, GroupLease, LeaseKey, StepBatch, WeightVersion

MAX_POLL_PAUSE_S = 0.5
"""Leases run out by themselves, so a poll looks again without being woken."""


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
        self._changed = asyncio.Event()
        self._deaths: Counter[str] = Counter()

    async def open(self) -> BufferPosition:
        """Read the log and begin. Not done in the constructor, whose errors Ray hands on as text alone."""
        log_process(self._settings.log_file, part="buffer")
        self._state = open_buffer(
            self._settings, resume_step=self._resume_step, is_new=self._is_new, clock=time.monotonic
        )
        return self._state.position()

    async def lease(self, actor_id: str, *, num: int, held: WeightVersion | None, wait_s: float) -> list[GroupLease]:
        """Up to `num` groups, waiting at most `wait_s` seconds for the first.

        An actor that does not hold the published weights gets none at once: it has to fetch them first.
        """
        deadline, deaths = time.monotonic() + wait_s, self._deaths[actor_id]
        while not (leases := self._state.lease(actor_id, num=num, held=held)):
            if self._state.is_outdated(held) or not await self._wait(deadline) or self._deaths[actor_id] != deaths:
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
        try:
            return self._state.append(actor_id, lease=lease, ipc=ipc)
        finally:
            self._wake()

    async def fail(self, actor_id: str, *, lease: LeaseKey, reason: str) -> None:
        self._state.fail(actor_id, lease=lease, reason=reason)
        self._wake()

    async def assign(self, step: int, *, rho: float | None, timeout_s: float) -> bool:
        """Whether `step` has its batch, waiting at most `timeout_s` seconds for it."""
        deadline = time.monotonic() + timeout_s
        while not (done := self._state.assign(step, rho=rho)):
            if not await self._wait(deadline):
                break
        self._wake()  # stale drops give admission
        return done

    async def take(self, step: int) -> StepBatch:
        """The batch of a step that has one."""
        return self._state.take(step)

    async def outcome(self, step: int, *, applied: bool) -> None:
        self._state.outcome(step, applied=applied)

    async def publish(self, version: WeightVersion) -> None:
        self._state.publish(version)
        self._wake()

    async def status(self) -> BufferStatus:
        return self._state.status()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, deadline: float) -> bool:
        """Wait for a change, or a little; False at the deadline."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), min(remaining, MAX_POLL_PAUSE_S))
        return True


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
