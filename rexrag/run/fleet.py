"""The rollout actors of a run: started, given weights, asked for evaluations, and replaced when they die.

    starting ──ready──▶ at work ──death, or a broken engine──▶ replaced: its leases go back, a new one is starting
                           ▲ current weights first                a place for it may have to be waited for

What the run waits for is asked of the members that there are, never of those that were: `is_current` and `is_ready`
are looked at again after each `check`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from ray.exceptions import RayError, RayTaskError

from rexrag.actors.build import RolloutSettings
from rexrag.actors.rollout_actor import RolloutActor, start_rollout_actor
from rexrag.engine.protocol import EngineStats
from rexrag.errors import EngineBrokenError, RexragError, RunFailure, counted
from rexrag.model.weight_proof import Delivery, WeightUpdate
from rexrag.retrieval.protocol import RetrieverState, added, since
from rexrag.run.remote import Handle, Ref, T, call, peek, value_of
from rexrag.types import EpisodeScore, FleetReport, Question, WeightVersion

LOG = logging.getLogger(__name__)

MAX_DEATHS_IN_A_ROW: Final = 5
"""Deaths of actors without a finished group between them: then the cause is not a passing one."""
TELL_EVERY_S: Final = 60.0


@dataclass(kw_only=True)
class _Member:
    """An actor. `starting` is its `ready` call, until that has ended; `updates` are those that it has not confirmed."""

    actor_id: str
    handle: Handle[RolloutActor]
    starting: Ref[int] | None
    started_at: float
    told_at: float
    run: Ref[None] | None = None
    updates: list[Ref[Delivery | None]] = field(default_factory=list)


class Fleet:
    """Rollout actors behind one buffer.

    Args:
        version: what the weights in `settings.model_path` are called.
        num_cpus, num_gpus: what Ray reserves for each actor.
        on_death: called with the id of an actor that died, so that its leases go back at once.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        *,
        num_actors: int,
        num_groups: int,
        num_cpus: float,
        num_gpus: float,
        version: WeightVersion,
        buffer: Handle[Any],
        on_death: Callable[[str], object],
    ) -> None:
        self._settings = settings
        self._num_groups = num_groups
        self._num_cpus = num_cpus
        self._num_gpus = num_gpus
        self._initial = version
        self._current: tuple[WeightVersion, Ref[WeightUpdate] | None] = (version, None)
        self._buffer = buffer
        self._on_death = on_death
        self._is_running = False
        self._num_started = 0
        self._num_replaced = 0
        self._deaths = 0
        self._sampled = (time.monotonic(), 0)
        self._deliveries: list[Delivery] = []
        self._searches: dict[str, RetrieverState] = {}
        self._told_searches = RetrieverState()
        self._members = [self._start() for _ in range(num_actors)]

    def run(self) -> None:
        """Let all actors lease and produce, those that are still to come too."""
        self._is_running = True
        for member in self._ready_members():
            member.run = call(member.handle, RolloutActor.run)

    def publish(self, version: WeightVersion, weights: Ref[WeightUpdate] | None) -> None:
        """Hand new weights to all actors without waiting for them; None: the weights did not change.

        An actor that is still starting gets the current ones when it is ready. The previous version's object is let
        go once every actor has switched.
        """
        self._current = (version, weights if weights is not None else self._current[1])
        for member in self._ready_members():
            member.updates.append(_update(member.handle, version, weights))

    @property
    def is_ready(self) -> bool:
        """Whether every actor has been built."""
        return all(member.starting is None for member in self._members)

    @property
    def is_current(self) -> bool:
        """Whether there is an actor at work, and all of them have confirmed the current weights."""
        ready = self._ready_members()
        return bool(ready) and not any(member.updates for member in ready)

    def evaluate(self, questions: Sequence[Question], *, version: WeightVersion) -> list[Ref[list[EpisodeScore]]]:
        """Greedy episodes under one version, questions dealt to the actors at work in turn."""
        ready = self._ready_members()
        shares = [questions[i :: len(ready)] for i in range(len(ready))]
        return [
            call(member.handle, RolloutActor.evaluate, share, version=version)
            for member, share in zip(ready, shares, strict=True)
            if share
        ]

    def num_tokens(self) -> int:
        """Tokens that the actors' engines have computed: it grows as long as one of them works."""
        return sum(stats.sampled_tokens + stats.prefilled_tokens for stats in self._stats())

    def report(self) -> FleetReport:
        """How the actors have done since the last report."""
        now, sampled = time.monotonic(), sum(stats.sampled_tokens for stats in self._stats())
        before, self._sampled = self._sampled, (now, sampled)
        rate = (sampled - before[1]) / (now - before[0]) if sampled >= before[1] else None
        deliveries, self._deliveries = self._deliveries, []
        return FleetReport(
            num_ready=len(self._ready_members()),
            num_replaced=self._num_replaced,
            tokens_per_s=rate,
            canary_kl=max((delivery.canary_kl for delivery in deliveries), default=None),
            num_unproven=sum(not delivery.is_told_apart for delivery in deliveries),
        )

    def searches(self) -> RetrieverState:
        """What the searches of all actors have come to since the last call; `is_down`: of any of them."""
        members = self._ready_members()
        for member, state in zip(members, self._ask(members, RolloutActor.searches), strict=True):
            if state is not None:
                self._searches[member.actor_id] = state  # of an actor that dies the last that was heard counts
        now = added(self._searches.values())
        before, self._told_searches = self._told_searches, now
        return since(before, now)

    def progressed(self) -> None:
        """A group has finished: deaths from here on count anew."""
        self._deaths = 0

    def check(self) -> None:
        """Let actors that are ready begin, replace those that died or whose engine broke, confirm weight updates.

        Raises:
            RunFailure: an actor ended for a reason that another one would meet too, or actors die without a finished
                group between.
        """
        for index, member in enumerate(self._members):
            try:
                self._check(member)
            except RayTaskError as error:
                if isinstance(error.cause, RexragError) and not isinstance(error.cause, EngineBrokenError):
                    raise error.cause from None
                self._members[index] = self._replace(member, error.cause)
            except RayError as error:
                self._members[index] = self._replace(member, error)

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Ask all actors to end, then end those that have not."""
        for member in self._members:
            call(member.handle, RolloutActor.stop)
        runs = [member.run for member in self._members if member.run is not None]
        if runs:
            ray.wait(list(runs), num_returns=len(runs), timeout=timeout_s)
        for member in self._members:
            ray.kill(member.handle)

    def _ready_members(self) -> list[_Member]:
        return [member for member in self._members if member.starting is None]

    def _stats(self) -> list[EngineStats]:
        """Counters of the actors that answer in time."""
        return [stats for stats in self._ask(self._ready_members(), RolloutActor.stats) if stats is not None]

    def _ask(
        self, members: Sequence[_Member], method: Callable[[RolloutActor], Awaitable[T]], *, timeout_s: float = 5.0
    ) -> list[T | None]:
        """What each answers in time; None of one that does not. One that has died `check` replaces."""
        refs = [call(member.handle, method) for member in members]
        done = set(ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)[0]) if refs else set()
        return [peek(ref) if ref in done else None for ref in refs]

    def _check(self, member: _Member) -> None:
        if member.starting is not None:
            self._check_start(member)
        if member.run is not None and ray.wait([member.run], timeout=0)[0]:
            ray.get(member.run)
        if member.updates:
            done, member.updates = ray.wait(member.updates, num_returns=len(member.updates), timeout=0)
            self._deliveries += [delivery for delivery in ray.get(done) if delivery is not None]

    def _check_start(self, member: _Member) -> None:
        assert member.starting is not None, "it is starting"
        if not ray.wait([member.starting], timeout=0)[0]:
            now = time.monotonic()
            if now - member.told_at > TELL_EVERY_S:
                member.told_at = now
                LOG.warning(
                    "rollout actor %s has not started in %.0f s: it waits for a node with %s and %s free, or loads its "
                    "model; at work: %s",
                    *(member.actor_id, now - member.started_at),
                    *(counted(self._num_cpus, "CPU"), counted(self._num_gpus, "GPU")),
                    counted(len(self._ready_members()), "other actor"),
                )
            return
        ray.get(member.starting)
        member.starting = None
        version, weights = self._current
        if version != self._initial:
            member.updates.append(_update(member.handle, version, weights))
        if self._is_running:
            member.run = call(member.handle, RolloutActor.run)

    def _start(self) -> _Member:
        actor_id = f"rollout-{self._num_started}"
        self._num_started += 1
        handle = start_rollout_actor(
            actor_id,
            settings=self._settings,
            version=self._initial,
            num_groups=self._num_groups,
            buffer=self._buffer,
            num_cpus=self._num_cpus,
            num_gpus=self._num_gpus,
        )
        now = time.monotonic()
        ready = call(handle, RolloutActor.ready)
        return _Member(actor_id=actor_id, handle=handle, starting=ready, started_at=now, told_at=now)

    def _replace(self, member: _Member, error: BaseException) -> _Member:
        self._deaths += 1
        if self._deaths > MAX_DEATHS_IN_A_ROW:
            raise RunFailure(
                f"{counted(self._deaths, 'rollout actor')} died without a finished group between them, the last "
                f"one: {error}"
            ) from error
        LOG.warning("rollout actor %s died, a new one takes its groups: %s", member.actor_id, error)
        self._num_replaced += 1
        ray.kill(member.handle)  # one whose engine broke is still there
        self._on_death(member.actor_id)
        return self._start()


def _update(
    actor: Handle[RolloutActor], version: WeightVersion, weights: Ref[WeightUpdate] | None
) -> Ref[Delivery | None]:
    return call(actor, RolloutActor.update_weights, version, None if weights is None else value_of(weights))
