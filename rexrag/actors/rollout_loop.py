"""The life of a rollout actor: lease groups, run them at once, append each when it is finished.

    lease ──▶ run_group (targets and probes, concurrently) ──▶ append
      │ waits for: a free slot here, admission by the buffer, the weights that a lease asks for
      └ unblocked by: a finished group, the learner taking groups, `update_weights`

Leases are renewed by what the groups and the engine have written, not by being alive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rexrag.actors.runner import EpisodeRunner, GroupFailedError
from rexrag.arrow import group_to_ipc
from rexrag.engine.protocol import Engine, EngineStats
from rexrag.errors import RetrieverSetupError, RunFailure, UnknownLeaseError, UserError
from rexrag.types import EpisodeScore, GroupLease, Question, WeightVersion

LOG = logging.getLogger(__name__)

LEASE_WAIT_S = 5.0
RENEW_EVERY_S = 5.0
MAX_CONSECUTIVE_FAILURES = 3
"""Groups that break one after the other without one that succeeds: then the engine is broken, not the groups."""


class BufferClient(Protocol):
    """The replay buffer as an actor sees it."""

    async def lease(self, actor_id: str, *, num: int, held: WeightVersion, wait_s: float) -> Sequence[GroupLease]: ...

    async def renew(self, actor_id: str, *, progress: Mapping[str, int]) -> Sequence[str]: ...

    async def append(self, actor_id: str, *, group_id: str, ipc: bytes) -> str: ...

    async def fail(self, actor_id: str, *, group_id: str, reason: str) -> None: ...


class RolloutLoop:
    """Runs groups until it is stopped; weights change and evaluations happen meanwhile.

    Args:
        num_groups: groups that run at once.
    """

    def __init__(
        self, runner: EpisodeRunner, *, actor_id: str, engine: Engine, buffer: BufferClient, num_groups: int
    ) -> None:
        self._runner = runner
        self._actor_id = actor_id
        self._engine = engine
        self._buffer = buffer
        self._num_groups = num_groups
        self._running: dict[str, asyncio.Task[None]] = {}
        self._tokens: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._weights_lock = asyncio.Lock()
        self._stopping = False
        self._failures = 0

    async def run(self) -> None:
        """Produce groups until `stop`.

        Raises:
            RunFailure: groups break one after the other, no search can be answered under the settings, or the buffer
                cannot store what is finished.
            UserError: something of the user's, such as a reward function, breaks.
        """
        renewals = asyncio.create_task(self._renew_forever())
        try:
            while not self._stopping:
                await self._lease_and_start()
                self._raise_failures(renewals)
        finally:
            renewals.cancel()
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(renewals, *self._running.values(), return_exceptions=True)

    def stop(self) -> None:
        self._stopping = True
        self._changed.set()

    async def update_weights(
        self, version: WeightVersion, weights: Mapping[str, npt.NDArray[np.generic]] | None
    ) -> None:
        """Switch between two decode steps; waits for a running evaluation to end first."""
        async with self._weights_lock:
            await self._engine.update_weights(version, weights)
        self._changed.set()

    async def evaluate(self, questions: Sequence[Question], *, version: WeightVersion) -> list[EpisodeScore]:
        """Greedy episodes under `version`, which the engine keeps until all have ended.

        Raises:
            RunFailure: the engine holds another version.
        """
        async with self._weights_lock:
            if self._engine.version != version:
                raise RunFailure(f"evaluation of {version} asked of an engine that holds {self._engine.version}")
            return await self._runner.evaluate(questions)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def _lease_and_start(self) -> None:
        self._changed.clear()
        free = self._num_groups - len(self._running)
        if free < 1:
            await self._wait_for_change()
            return
        held = self._engine.version
        leases = await self._buffer.lease(self._actor_id, num=free, held=held, wait_s=LEASE_WAIT_S)
        for lease in leases:
            self._tokens[lease.group_id] = 0
            self._running[lease.group_id] = asyncio.create_task(self._produce(lease))
        if not leases and self._engine.version == held:
            await self._wait_for_change(timeout_s=0.2)

    async def _wait_for_change(self, timeout_s: float = LEASE_WAIT_S) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return

    async def _produce(self, lease: GroupLease) -> None:
        def on_progress(num_tokens: int) -> None:
            self._tokens[lease.group_id] += num_tokens

        try:
            group = await self._runner.run_group(lease, on_progress=on_progress)
        except GroupFailedError as error:
            LOG.warning("group %s failed: %s", lease.group_id, error)
            await self._buffer.fail(self._actor_id, group_id=lease.group_id, reason="env_error")
        except (RetrieverSetupError, UserError):
            raise  # settings that no group can be produced under: they end the run
        except Exception as error:
            # Fault boundary: a broken rollout is data, and the buffer counts it and asks the question again.
            LOG.exception("group %s broke", lease.group_id)
            self._failures += 1
            if self._failures > MAX_CONSECUTIVE_FAILURES:
                raise RunFailure(f"{self._failures} groups in a row broke, the last with {error!r}") from error
            await self._buffer.fail(self._actor_id, group_id=lease.group_id, reason="invalid")
        else:
            self._failures = 0
            await self._append(lease, group_to_ipc(group))
        finally:
            self._changed.set()

    async def _append(self, lease: GroupLease, ipc: bytes) -> None:
        try:
            await self._buffer.append(self._actor_id, group_id=lease.group_id, ipc=ipc)
        except UnknownLeaseError:
            LOG.warning("group %s is not wanted any more: dropped here", lease.group_id)

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            if not self._tokens:
                continue
            written = self._engine.stats().sampled_tokens
            progress = {group_id: tokens + written for group_id, tokens in self._tokens.items()}
            for group_id in await self._buffer.renew(self._actor_id, progress=progress):
                if (task := self._running.get(group_id)) is not None:
                    task.cancel()

    def _raise_failures(self, renewals: asyncio.Task[None]) -> None:
        """Forget what has ended; what failed for good ends the loop."""
        for group_id in [group_id for group_id, task in self._running.items() if task.done()]:
            task = self._running.pop(group_id)
            del self._tokens[group_id]
            if not task.cancelled():
                task.result()
        if renewals.done():
            renewals.result()
