"""One rollout actor as the fleet sees it: what is still to come from it, and how it does.

starting ──▶ stale ⇄ healthy ⇄ suspect ──▶ dead (replaced)          draining ──▶ gone
             weights not confirmed   silent, or no token while it has work
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import ray

from rexrag.actors.rollout_actor import Built, RolloutActor
from rexrag.actors.rollout_loop import ActorPulse
from rexrag.model.weight_proof import Delivery
from rexrag.run.remote import Handle, Ref, call
from rexrag.run.status import ActorReport

PULSE_EVERY_S: Final = 2.0
SUSPECT_AFTER_S: Final = 15.0
"""Seconds in which an actor with work at hand should have written a token, or at least have answered."""

State = Literal["starting", "healthy", "stale", "suspect", "draining"]


@dataclass(kw_only=True, eq=False)
class Member:
    """An actor of the fleet.

    Attributes:
        starting: its `ready` call, until that has ended.
        updates: weights that it has not confirmed.
        draining: its `drain` call, where it is to end.
        dtype: the precision that it samples in, once it has started.
        silent_s: seconds in which it had work, or did not answer, and nothing came of it.
    """

    actor_id: str
    handle: Handle[RolloutActor]
    starting: Ref[Built] | None
    started_at: float
    told_at: float
    ready_at: float | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    run: Ref[None] | None = None
    updates: list[Ref[Delivery | None]] = field(default_factory=list)
    draining: Ref[None] | None = None
    pulse: ActorPulse | None = None
    tokens_per_s: float | None = None
    silent_s: float = 0.0
    _looked_at: float = 0.0
    _asked: Ref[ActorPulse] | None = None
    _asked_at: float = 0.0
    _answered_at: float = 0.0

    @property
    def is_ready(self) -> bool:
        return self.starting is None

    @property
    def is_working(self) -> bool:
        """Built, and to stay."""
        return self.starting is None and self.draining is None

    @property
    def state(self) -> State:
        if self.starting is not None:
            return "starting"
        if self.silent_s > SUSPECT_AFTER_S:
            return "suspect"
        if self.draining is not None:
            return "draining"
        return "stale" if self.updates else "healthy"

    def lived_s(self, now: float) -> float:
        """For how long it has worked, until now or until it fell silent."""
        return 0.0 if self.ready_at is None else now - self.ready_at - self.silent_s

    def look(self) -> None:
        """Ask for its counters now and then, and note what it answers; waits for nothing.

        Raises:
            RayError: it died.
        """
        now = time.monotonic()
        # Where this process itself was held up, the actor is not to blame.
        self.silent_s += min(now - self._looked_at, PULSE_EVERY_S) if self._looked_at else 0.0
        self._looked_at = now
        if self._asked is not None:
            if not ray.wait([self._asked], timeout=0)[0]:
                return
            self._note(ray.get(self._asked), now=now)
            self._asked = None
        if now - self._asked_at >= PULSE_EVERY_S:
            self._asked, self._asked_at = call(self.handle, RolloutActor.pulse), now

    def _note(self, pulse: ActorPulse, *, now: float) -> None:
        before, elapsed = self.pulse, now - self._answered_at
        self.pulse, self._answered_at = pulse, now
        if before is None:
            self.silent_s = 0.0
            return
        self.tokens_per_s = (pulse.stats.sampled_tokens - before.stats.sampled_tokens) / elapsed
        if _computed(pulse) > _computed(before) or not pulse.stats.running + pulse.stats.waiting:
            self.silent_s = 0.0

    def report(self) -> ActorReport:
        pulse = self.pulse
        return ActorReport(
            actor_id=self.actor_id,
            state=self.state,
            node=None if pulse is None else pulse.node,
            version=None if pulse is None else pulse.version.step,
            num_groups=0 if pulse is None else pulse.num_groups,
            num_requests=0 if pulse is None else pulse.stats.running + pulse.stats.waiting,
            tokens_per_s=self.tokens_per_s,
            age_s=round(time.monotonic() - self.started_at, 1),
            silent_s=round(self.silent_s, 1),
        )


def new_member(actor_id: str, handle: Handle[Any]) -> Member:
    """An actor that has just been asked for."""
    now = time.monotonic()
    ready = call(handle, RolloutActor.ready)
    return Member(actor_id=actor_id, handle=handle, starting=ready, started_at=now, told_at=now)


def _computed(pulse: ActorPulse) -> int:
    return pulse.stats.sampled_tokens + pulse.stats.prefilled_tokens
