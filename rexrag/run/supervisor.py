"""Waiting with open eyes: every wait looks after the parts of the run, hears stop signals, and has a bound."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rexrag.errors import Interrupted, PartDiedError, RexragError, RunFailure
from rexrag.run.fleet import Fleet
from rexrag.run.remote import Handle, Ref, T
from rexrag.run.signals import StopSignal

POLL_S = 0.2
PING_EVERY_S = 5.0


class Supervisor:
    """Waits for results of buffer, learner and fleet.

    A pending ping per part tells of its death at once; a busy part answers late, which is no fault.
    """

    def __init__(self, *, fleet: Fleet, parts: Mapping[str, Handle[Any]], stop: StopSignal) -> None:
        self._fleet = fleet
        self._parts = parts
        self._stop = stop
        self._pings: dict[str, Ref[Any]] = {}
        self._last_ping = 0.0

    def wait(self, ref: Ref[T], *, what: str, timeout_s: float, interruptible: bool = True) -> T:
        """The value behind a reference.

        Raises:
            RunFailure: a part died or failed, or `timeout_s` passed; `what` says who waited for what.
            Interrupted: a stop signal came (where `interruptible`).
        """
        deadline = time.monotonic() + timeout_s
        while not ray.wait([ref], timeout=POLL_S)[0]:
            self.look(interruptible=interruptible)
            if time.monotonic() > deadline:
                raise RunFailure(f"{what}: nothing came in {timeout_s:.0f} s")
        return self._get(ref, what=what)

    def look(self, *, interruptible: bool = True) -> None:
        """Replace dead rollout actors, notice a dead buffer or learner, hear a stop signal."""
        if interruptible and self._stop.received is not None:
            raise Interrupted(f"stopped by {self._stop.received}")
        self._fleet.check()
        self._ping()

    def _ping(self) -> None:
        due = time.monotonic() - self._last_ping >= PING_EVERY_S
        for name, handle in self._parts.items():
            pending = self._pings.get(name)
            if pending is not None and ray.wait([pending], timeout=0)[0]:
                self._get(self._pings.pop(name), what=f"the {name}")
            if name not in self._pings and due:
                self._pings[name] = handle.__ray_ready__.remote()
        if due:
            self._last_ping = time.monotonic()

    @staticmethod
    def _get(ref: Ref[T], *, what: str) -> T:
        try:
            value: T = ray.get(ref)
            return value
        except RayActorError as error:
            raise PartDiedError(f"{what}: its process died: {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, RexragError):
                raise error.cause from None
            raise RunFailure(f"{what}: {error.cause!r}") from error
