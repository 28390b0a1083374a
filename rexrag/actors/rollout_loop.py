"""The life of a rollout actor: lease groups, run them at once, append each when it is finished.

    lease ──▶ run_group (targets and probes, concurrently) ──▶ append
      │ waits for: a free slot here, a retriever that answers, admission by the buffer, the weights a lease asks for
      └ unblocked by: a finished group, the retriever's probe, the learner taking groups, `update_weights`

Leases are renewed by what the groups and the engine have written, not by being alive.

A group that breaks is data: it is counted, and the loop goes on. Groups that ran side by side when one broke are one
burst, since they mostly share its cause; only bursts one after the other without a group that comes through end it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rexrag.actors.delivery import deliver
from rexrag.actors.runner import EpisodeRunner, GroupFailedError
from rexrag.arrow import group_to_ipc
from rexrag.engine.protocol import Engine, EngineStats
from rexrag.errors import EngineBrokenError, EnginePassError, RunFailure, UnknownLeaseError, UserError
from rexrag.model.weight_proof import Delivery, WeightUpdate
from rexrag.retrieval.protocol import RetrieverState
from rexrag.types import AppendOutcome, EpisodeScore, GroupLease, LeaseKey, Question, WeightVersion

LOG = logging.getLogger(__name__)

LEASE_WAIT_S = 5.0
RENEW_EVERY_S = 5.0
OUTAGE_POLL_S = 0.5
MAX_BURSTS_IN_A_ROW = 3
"""Bursts of broken groups without a group that comes through: one more, and it is not the groups."""


class BufferClient(Protocol):
    """The replay buffer as an actor sees it."""

    async def lease(self, actor_id: str, *, num: int, held: WeightVersion, wait_s: float) -> Sequence[GroupLease]: ...

    async def renew(self, actor_id: str, *, progress: Mapping[LeaseKey, int]) -> Sequence[LeaseKey]: ...

    async def hand_back(self, actor_id: str, *, lease: LeaseKey) -> None: ...

    async def append(self, actor_id: str, *, lease: LeaseKey, ipc: bytes) -> AppendOutcome: ...

    async def fail(self, actor_id: str, *, lease: LeaseKey, reason: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ActorPulse:
    """How an actor does. `num_groups`: groups at hand; `node`, `node_id`: its node's address, and Ray's id of it."""

    stats: EngineStats
    version: WeightVersion
    num_groups: int
    node: str
    node_id: str


@dataclass(kw_only=True, eq=False)
class _Work:
    """A group on its way. `burst`: the last burst of failures before it began; `tokens`: written so far."""

    lease: GroupLease
    burst: int
    tokens: int = 0
    task: asyncio.Task[None] | None = None

    def add_tokens(self, num_tokens: int) -> None:
        self.tokens += num_tokens


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
        self._proven = engine.version  # groups are leased under weights that are proven
        self._running: dict[LeaseKey, _Work] = {}
        self._changed = asyncio.Event()
        self._weights_lock = asyncio.Lock()
        self._stopping = False
        self._draining = asyncio.Event()
        self._ending = asyncio.Event()  # set by `stop` and by `drain`
        self._ended = asyncio.Event()
        self._ended.set()
        self._burst = 0
        self._bursts_in_a_row = 0
        self._failed_evaluations_in_a_row = 0
        self._broken: EngineBrokenError | None = None
        self._abandoned: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Produce groups until `stop`, or until those at hand are finished after `drain`.

        Raises:
            EngineBrokenError: passes of the engine fail again and again; the groups went back.
            RunFailure: burst after burst of groups breaks in another way, or the buffer cannot store what is finished.
            UserError: in the way that it says.
        """
        renewals = asyncio.create_task(self._renew_forever())
        self._ended.clear()
        try:
            while not self._stopping and not (self._draining.is_set() and not self._running):
                await self._lease_and_start()
                self._raise_failures(renewals)
        finally:
            self._ended.set()
            renewals.cancel()
            if self._abandoned is not None:
                self._abandoned.cancel()  # whoever lets this actor go releases what it has
            tasks = [work.task for work in self._running.values() if work.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(renewals, *tasks, return_exceptions=True)

    def stop(self) -> None:
        self._stopping = True
        self._ending.set()
        self._changed.set()

    async def drain(self) -> None:
        """Lease nothing more; returns once the groups at hand are appended and no evaluation runs here."""
        self._draining.set()
        self._ending.set()
        self._changed.set()
        await self._ended.wait()
        async with self._weights_lock:
            return

    async def update_weights(self, version: WeightVersion, update: WeightUpdate | None) -> Delivery | None:
        """Switch between two decode steps, and prove it; waits for a running evaluation to end first.

        Args:
            update: None: the version's weights are those that the engine holds.

        Returns:
            What was seen of the new weights; None without new ones, or without a canary.

        Raises:
            EngineBrokenError: the engine holds other weights, twice given.
        """
        async with self._weights_lock:
            delivery = await deliver(self._engine, version, update, actor_id=self._actor_id)
            self._proven = version
        self._changed.set()
        return delivery

    async def evaluate(self, questions: Sequence[Question], *, version: WeightVersion) -> list[EpisodeScore]:
        """Greedy episodes under `version`, which the engine keeps until all have ended.

        Raises:
            RunFailure: the engine holds another version.
            EnginePassError, EngineBrokenError: the engine fails. If it does so for good, or the second time in a row,
                `run` ends with it, so that a new actor takes this one's place.
        """
        async with self._weights_lock:
            if self._engine.version != version:
                raise RunFailure(f"evaluation of {version} asked of an engine that holds {self._engine.version}")
            try:
                scores = await self._runner.evaluate(questions)
            except (EnginePassError, EngineBrokenError) as error:
                self._failed_evaluations_in_a_row += 1
                if isinstance(error, EngineBrokenError) or self._failed_evaluations_in_a_row > 1:
                    self._broken = EngineBrokenError(f"an evaluation in actor {self._actor_id} failed: {error}")
                    self._ending.set()  # a poll for a lease is not waited for
                    self._changed.set()
                raise
            self._failed_evaluations_in_a_row = 0
            return scores

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def pulse(self, *, node: str, node_id: str) -> ActorPulse:
        """How this loop does, on the node that its shell names."""
        return ActorPulse(
            stats=self._engine.stats(),
            version=self._engine.version,
            num_groups=len(self._running),
            node=node,
            node_id=node_id,
        )

    def searches(self) -> RetrieverState:
        return self._runner.searches()

    async def _lease_and_start(self) -> None:
        self._changed.clear()
        free = self._num_groups - len(self._running)
        if free < 1 or self._draining.is_set():
            await self._wait_for_change()
            return
        if self._runner.searches().is_down:
            await self._wait_for_change(timeout_s=OUTAGE_POLL_S)  # a group begun now would only wait for its searches
            return
        held = self._proven
        leases = await self._ask_for(free, held=held)
        if self._draining.is_set():  # since it asked
            for lease in leases:
                await self._buffer.hand_back(self._actor_id, lease=lease.key)
            return
        for lease in leases:
            self._cancel([key for key in self._running if key.group_id == lease.group_id])  # its lease had ended
            work = _Work(lease=lease, burst=self._burst)
            work.task = asyncio.create_task(self._produce(work))
            self._running[lease.key] = work
        if not leases and self._proven == held:
            await self._wait_for_change(timeout_s=0.2)

    async def _ask_for(self, num: int, *, held: WeightVersion) -> Sequence[GroupLease]:
        """Groups to work on; none once this loop is to end: it is not held up by a poll that nobody needs any more.

        What such a poll gets goes back.
        """
        asking = asyncio.ensure_future(self._buffer.lease(self._actor_id, num=num, held=held, wait_s=LEASE_WAIT_S))
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({asking, ending}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            asking.cancel()
            raise
        finally:
            ending.cancel()
        if asking.done():
            return asking.result()
        self._abandoned = asyncio.create_task(self._hand_back(asking))
        return []

    async def _hand_back(self, asking: Awaitable[Sequence[GroupLease]]) -> None:
        for lease in await asking:
            await self._buffer.hand_back(self._actor_id, lease=lease.key)

    async def _wait_for_change(self, timeout_s: float = LEASE_WAIT_S) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return

    async def _produce(self, work: _Work) -> None:
        lease = work.lease
        try:
            group = await self._runner.run_group(lease, on_progress=work.add_tokens)
        except GroupFailedError as error:
            LOG.warning("group %s failed: %s", lease.group_id, error)
            await self._fail(lease, "env_error")
        except Exception as error:
            # Fault boundary: a broken rollout is data, and the buffer counts it and asks the question again.
            cause = _cause_of(error)
            if isinstance(cause, RunFailure):
                raise cause from error
            LOG.exception("group %s broke", lease.group_id)
            await self._take_back(lease, cause)
            self._count_broken(work, cause)
        else:
            await self._append(work, group_to_ipc(group))
        finally:
            self._changed.set()

    async def _take_back(self, lease: GroupLease, cause: Exception) -> None:
        """The group is dropped, unless it only happened to be in a pass that failed."""
        if isinstance(cause, EnginePassError):
            await self._buffer.hand_back(self._actor_id, lease=lease.key)
        else:
            await self._fail(lease, "invalid")

    async def _fail(self, lease: GroupLease, reason: str) -> None:
        with contextlib.suppress(UnknownLeaseError):  # another actor has finished it, and it is over for the buffer
            await self._buffer.fail(self._actor_id, lease=lease.key, reason=reason)

    async def _append(self, work: _Work, ipc: bytes) -> None:
        group_id = work.lease.group_id
        try:
            outcome = await self._buffer.append(self._actor_id, lease=work.lease.key, ipc=ipc)
        except UnknownLeaseError:
            LOG.warning("group %s is not wanted any more: dropped here", group_id)
            return
        if outcome == "invalid":
            self._count_broken(work, RunFailure(f"the buffer refused group {group_id}; its own log record says why"))
        else:
            self._bursts_in_a_row = 0

    def _count_broken(self, work: _Work, cause: Exception) -> None:
        if work.burst != self._burst:
            return  # it ran when the last counted one broke
        self._burst += 1
        self._bursts_in_a_row += 1
        if self._bursts_in_a_row > MAX_BURSTS_IN_A_ROW:
            if isinstance(cause, UserError):
                raise cause
            kind = EngineBrokenError if isinstance(cause, EnginePassError) else RunFailure
            raise kind(
                f"{self._bursts_in_a_row} bursts of groups broke in actor {self._actor_id} without one that came "
                f"through, the last with {cause!r}"
            ) from cause

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            if not self._running:
                continue
            written = self._engine.stats().sampled_tokens
            progress = {key: work.tokens + written for key, work in self._running.items()}
            self._cancel(await self._buffer.renew(self._actor_id, progress=progress))

    def _cancel(self, keys: Sequence[LeaseKey]) -> None:
        for key in keys:
            work = self._running.get(key)
            if work is not None and work.task is not None:
                work.task.cancel()

    def _raise_failures(self, renewals: asyncio.Task[None]) -> None:
        """Forget what has ended; what failed for good ends the loop."""
        ended = [(key, work.task) for key, work in self._running.items() if work.task is not None and work.task.done()]
        for key, task in ended:
            del self._running[key]
            if not task.cancelled():
                task.result()
        if renewals.done():
            renewals.result()
        if self._broken is not None:
            raise self._broken


def _cause_of(error: Exception) -> Exception:
    """The one of a group's errors that says what to do: the user's mistake, a failed pass, else the first."""
    leaves = list(_leaves(error))
    for kind in (UserError, RunFailure, EnginePassError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
