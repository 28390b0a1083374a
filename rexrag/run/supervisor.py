"""Waiting with open eyes: every wait looks after the parts of the run, hears stop signals, and has a bound.

A bound is on progress, not on the whole: a wait ends when nothing has moved for `train.stall_timeout_s`, and says who
waited for whom.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any, Final

import ray

from rexrag.errors import PartDiedError, RunFailure, StalledError
from rexrag.run.control import Desk
from rexrag.run.fleet import Fleet
from rexrag.run.nodes import draining_nodes
from rexrag.run.remote import Ref, T, result_of
from rexrag.run.search_pool import SearchPool
from rexrag.run.signals import StopSignal

POLL_S: Final = 0.2
PING_EVERY_S: Final = 5.0
NODES_EVERY_S: Final = 2.0
PROGRESS_EVERY_S: Final = 10.0


class Supervisor:
    """Waits for results of buffer, learner and fleet.

    A pending ping per part tells of its death at once; a busy part answers late, which is no fault.

    Args:
        parts: what each is asked again and again; it answers, sooner or later, or raises what it has failed with.
        stall_timeout_s: seconds without progress that end a wait.
        desk: where those outside ask for the run; None: nobody does.
        learner_nodes: where the learner is, by Ray's ids; none: on this machine, as all else, and no node can go.
        pool: search actors to look after, too.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        parts: Mapping[str, Callable[[], Ref[Any]]],
        stop: StopSignal,
        stall_timeout_s: float,
        desk: Desk | None = None,
        learner_nodes: Collection[str] = (),
        pool: SearchPool | None = None,
    ) -> None:
        self._fleet = fleet
        self._pool = pool
        self._parts = parts
        self._stop = stop
        self._stall_timeout_s = stall_timeout_s
        self._desk = desk
        self._learner_nodes = frozenset(learner_nodes)
        self._looked_at_nodes = 0.0
        self._pings: dict[str, Ref[Any]] = {}
        self._last_ping = 0.0
        self._is_ending = False

    def wait(
        self, ref: Ref[T], *, what: str, progress: Callable[[], object] | None = None, interruptible: bool = True
    ) -> T:
        """The value behind a reference.

        Args:
            what: who waits for what, for the message.
            progress: something that changes as long as the work goes on; None: it is one piece.

        Raises:
            RunFailure: a part died or failed; StalledError: there was no progress for too long.
            Interrupted: a stop signal came (where `interruptible`).
        """
        self.until(
            lambda: bool(ray.wait([ref], timeout=POLL_S)[0]),
            what=what,
            progress=progress,
            interruptible=interruptible,
            pause_s=0.0,
        )
        return result_of(ref, what=what)

    def until(
        self,
        is_done: Callable[[], bool],
        *,
        what: str | Callable[[], str],
        progress: Callable[[], object] | None = None,
        interruptible: bool = True,
        pause_s: float = POLL_S,
    ) -> None:
        """Wait until something is so; as `wait`.

        Args:
            what: for the message; as a function it says how it is by then.
            pause_s: between two looks; 0 where `is_done` itself takes its time.
        """
        bound = _Bound(self._stall_timeout_s, progress=progress)
        with nullcontext() if self._desk is None else self._desk.waiting(what):
            while not is_done():
                self.look(interruptible=interruptible)
                if bound.is_over():
                    waiting = what if isinstance(what, str) else what()
                    raise StalledError(
                        f"{waiting}: no progress in {self._stall_timeout_s:.0f} s; where it only needs longer, resume "
                        "with a larger train.stall_timeout_s"
                    )
                time.sleep(pause_s)

    def until_current(self, step: int) -> None:
        """Wait until the actors that there are hold the weights of a step, and there is one."""
        waiting = f"the run waits for its actors to take the weights of step {step}"
        self.until(
            lambda: self._fleet.is_current,
            what=lambda: waiting if self._fleet.num_working else f"{waiting}; none is at work",
            progress=self._fleet.num_tokens,
        )

    def end(self) -> None:
        """The run ends: what is still waited for is waited for, whatever has become of the other parts."""
        self._is_ending = True

    def look_for(self, seconds: float) -> None:
        """Look after the parts for a while."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.look()
            time.sleep(min(POLL_S, seconds))

    def look(self, *, interruptible: bool = True) -> None:
        """Replace dead rollout actors, notice a dead buffer or learner, hear a stop signal and what else is wanted."""
        if self._is_ending:
            return
        self._hear()
        self._leave_nodes()
        if interruptible:
            self._stop.heed()
        self._fleet.check()
        try:
            if self._pool is not None:
                self._pool.look()
            self._ping()
        except PartDiedError as error:  # to whoever waits it is not the part that he waits for
            raise RunFailure(str(error)) from error

    def _hear(self) -> None:
        wanted = None if self._desk is None else self._desk.look()
        if wanted is None:
            return
        if wanted.stop:
            self._stop.ask("rexrag stop")
        elif wanted.num_actors is not None:
            self._fleet.resize(wanted.num_actors, now=wanted.now)

    def _leave_nodes(self) -> None:
        """Let the parts on nodes that will go end in time: actors finish elsewhere, the run ends with a checkpoint."""
        now = time.monotonic()
        if not self._learner_nodes or now - self._looked_at_nodes < NODES_EVERY_S:
            return
        self._looked_at_nodes = now
        if draining := draining_nodes():
            self._fleet.leave(draining)
            if not self._learner_nodes.isdisjoint(draining):
                self._stop.ask("its learner's node, which will go")

    def _ping(self) -> None:
        due = time.monotonic() - self._last_ping >= PING_EVERY_S
        for name, ask in self._parts.items():
            pending = self._pings.get(name)
            if pending is not None and ray.wait([pending], timeout=0)[0]:
                result_of(self._pings.pop(name), what=f"the {name}")
            if name not in self._pings and due:
                self._pings[name] = ask()
        if due:
            self._last_ping = time.monotonic()


class _Bound:
    """Over when nothing has changed for `timeout_s`. Progress is asked for only now and then: it may be a call."""

    def __init__(self, timeout_s: float, *, progress: Callable[[], object] | None) -> None:
        self._timeout_s = timeout_s
        self._progress = progress
        self._seen: object = None
        self._asked_at = self._moved_at = time.monotonic()

    def is_over(self) -> bool:
        now = time.monotonic()
        if self._progress is not None and now - self._asked_at >= min(PROGRESS_EVERY_S, self._timeout_s / 2):
            self._asked_at = now
            if (seen := self._progress()) != self._seen:
                self._seen, self._moved_at = seen, time.monotonic()
        return now - self._moved_at > self._timeout_s
