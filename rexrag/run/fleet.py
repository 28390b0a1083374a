"""The rollout actors of a run: started, given weights, asked for evaluations, replaced when they die, let go.

    starting ──ready──▶ at work ──death, a broken or hung engine──▶ replaced: its leases go back, a new one is starting
                           │ ▲ current weights first                    a place for it may have to be waited for
                           └─fewer are wanted──▶ draining: what it has begun is finished ──▶ gone

What the run waits for is asked of the members that there are, never of those that were: `is_current` and `is_ready`
are looked at again after each `check`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Final

import ray
from ray.exceptions import RayError, RayTaskError

from rexrag.actors.build import RolloutSettings
from rexrag.actors.rollout_actor import RolloutActor, start_rollout_actor
from rexrag.errors import EngineBrokenError, RexragError, RunFailure, counted
from rexrag.learner.learner_actor import Published
from rexrag.model.weight_proof import Delivery
from rexrag.processes import Share, in_words
from rexrag.retrieval.protocol import RetrieverState, added, since
from rexrag.run.member import Member, new_member
from rexrag.run.remote import Handle, Ref, T, call, peek, value_of
from rexrag.run.replacements import Replacements
from rexrag.run.status import ActorReport
from rexrag.types import EpisodeScore, FleetReport, Question, WeightVersion

LOG = logging.getLogger(__name__)

MAX_DEATHS_IN_A_ROW: Final = 5
"""Deaths of actors without a finished group between them: then the cause is not a passing one."""
BEGIN_WITHOUT_AFTER_S: Final = 60.0
"""Seconds without another actor that has started after which a run begins with those that there are."""
TELL_EVERY_S: Final = 60.0
HANG_TIMEOUT_S: Final = 300.0


class Fleet:
    """Rollout actors behind one buffer.

    Args:
        version: what the weights in `settings.model_path` are called.
        share: what each actor computes with, and what Ray reserves for it.
        on_death: called with the id of an actor that died or is let go, so that its leases go back at once.
        num_fitting: actors for which there is room at first; the others are not waited for. None: all.
        hang_timeout_s: seconds that an actor may be silent, or write nothing though it has work, until it counts as
            dead.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        *,
        num_actors: int,
        num_groups: int,
        share: Share,
        version: WeightVersion,
        buffer: Handle[Any],
        on_death: Callable[[str], object],
        num_fitting: int | None = None,
        hang_timeout_s: float = HANG_TIMEOUT_S,
    ) -> None:
        self._settings = settings
        self._num_groups = num_groups
        self._share = share
        self._initial = version
        self._current: tuple[WeightVersion, Published | None] = (version, None)
        self._buffer = buffer
        self._on_death = on_death
        self._num_first = num_actors if num_fitting is None else min(num_actors, num_fitting)
        self._hang_timeout_s = hang_timeout_s
        self._is_running = False
        self._num_started = 0
        self._num_replaced = 0
        self._replacements = Replacements()
        self._deaths = 0
        self._ready_at = 0.0  # when an actor was built last
        self._counted_at = 0.0  # when the last of them was
        self._reported_at = time.monotonic()
        self._sampled: dict[str, int] = {}
        self._deliveries: list[Delivery] = []
        self._searches: dict[str, RetrieverState] = {}
        self._told_searches = RetrieverState()
        self._members = [self._start() for _ in range(num_actors)]

    def run(self) -> None:
        """Let all actors lease and produce, those that are still to come too."""
        self._is_running = True
        for member in self._working():
            member.run = call(member.handle, RolloutActor.run)

    def resize(self, num_actors: int, *, now: bool = False) -> None:
        """Have so many actors: start new ones, or let some go once they have finished what they have begun.

        New ones join with the current weights. Those that have not started go first, then the newest.

        Args:
            now: those that go, and those that are on their way, give back what they have begun.
        """
        assert num_actors >= 1, "a fleet has an actor"
        staying = [member for member in self._members if member.draining is None]
        for _ in range(num_actors - len(staying) - self._replacements.keep(num_actors - len(staying))):
            self._members.append(self._start())
        staying.sort(key=lambda member: member.is_ready, reverse=True)
        leaving = staying[num_actors:]
        if now:
            leaving += [member for member in self._members if member.draining is not None]
        for member in leaving:
            LOG.info("rollout actor %s is let go%s", member.actor_id, ", its groups go back" if now else "")
            if now or not member.is_ready:
                self._let_go(member)
            else:
                member.draining = call(member.handle, RolloutActor.drain)

    def leave(self, node_ids: Collection[str]) -> None:
        """Finish what was begun on nodes that will go, and start as many actors elsewhere."""
        for member in self._working():
            if member.pulse is not None and member.pulse.node_id in node_ids:
                LOG.warning("rollout actor %s finishes: its node %s will go", member.actor_id, member.pulse.node)
                member.draining = call(member.handle, RolloutActor.drain)
                self._members.append(self._start())

    @property
    def num_wanted(self) -> int:
        """Actors that are there to stay, those that are starting or to be started included."""
        return sum(member.draining is None for member in self._members) + len(self._replacements)

    def publish(self, version: WeightVersion, weights: Published | None) -> None:
        """Hand new weights to all actors without waiting for them; None: the weights did not change.

        An actor that is still starting gets the current ones when it is ready. The previous version's objects are let
        go once every actor has switched.
        """
        self._current = (version, weights if weights is not None else self._current[1])
        for member in self._ready():
            member.updates.append(_update(member.handle, version, weights))

    @property
    def dtypes(self) -> frozenset[str]:
        """The precisions that the actors sample in, of those that have started."""
        return frozenset(member.dtype for member in self._members if member.dtype is not None)

    @property
    def is_ready(self) -> bool:
        """Whether every actor has been built."""
        return not self._replacements and all(member.is_ready for member in self._members)

    @property
    def can_begin(self) -> bool:
        """Whether the actors for which there was room at first have been built, or some, and for long no more."""
        missing = min(self._num_first, self.num_wanted) - self.num_working
        is_slow = time.monotonic() - self._ready_at > BEGIN_WITHOUT_AFTER_S
        return missing <= 0 or (self.num_working > 0 and is_slow)

    @property
    def num_working(self) -> int:
        """Actors that are built, and to stay."""
        return len(self._working())

    @property
    def is_current(self) -> bool:
        """Whether there is an actor at work, and all that are built have confirmed the current weights."""
        return bool(self._working()) and not any(member.updates for member in self._ready())

    def evaluate(self, questions: Sequence[Question], *, version: WeightVersion) -> list[Ref[list[EpisodeScore]]]:
        """Greedy episodes under one version, questions dealt to the actors at work in turn."""
        working = self._working()
        shares = [questions[i :: len(working)] for i in range(len(working))]
        return [
            call(member.handle, RolloutActor.evaluate, share, version=version)
            for member, share in zip(working, shares, strict=True)
            if share
        ]

    def num_tokens(self) -> int:
        """Tokens that the actors' engines have computed: it grows as long as one of them works."""
        return sum(stats.sampled_tokens + stats.prefilled_tokens for _, stats in self._answers(RolloutActor.stats))

    def report(self) -> FleetReport:
        """How the actors have done since the last report."""
        now, before = time.monotonic(), self._reported_at
        self._reported_at = now
        deliveries, self._deliveries = self._deliveries, []
        return FleetReport(
            num_ready=len(self._ready()),
            num_wanted=self.num_wanted,
            num_replaced=self._num_replaced,
            tokens_per_s=self._newly_sampled() / (now - before),
            canary_kl=max((delivery.canary_kl for delivery in deliveries), default=None),
            switch_s=max((delivery.switch_s for delivery in deliveries), default=None),
            proof_s=max((delivery.proof_s for delivery in deliveries), default=None),
            num_unproven=sum(not delivery.is_told_apart for delivery in deliveries),
        )

    def describe(self) -> tuple[ActorReport, ...]:
        """Each actor as it was when it last answered; asks nobody."""
        return tuple(member.report() for member in self._members)

    def searches(self) -> RetrieverState:
        """What the searches of all actors have come to since the last call; `is_down`: of any of them."""
        for member, state in self._answers(RolloutActor.searches):
            self._searches[member.actor_id] = state  # of an actor that dies the last that was heard counts
        now = added(self._searches.values())
        before, self._told_searches = self._told_searches, now
        return since(before, now)

    def progressed(self) -> None:
        """A group has finished: deaths from here on count anew."""
        self._deaths = 0

    def check(self) -> None:
        """Let actors that are ready begin, replace those that died or whose engine broke or hangs, confirm weight
        updates, let those go that have drained.

        Raises:
            RunFailure: an actor ended for a reason that another one would meet too, or actors die without a finished
                group between.
        """
        due = self._replacements.take(time.monotonic() if self._working() else math.inf)
        self._members += [self._start() for _ in range(due)]
        for member in list(self._members):
            try:
                self._check(member)
            except RayTaskError as error:
                if isinstance(error.cause, RexragError) and not isinstance(error.cause, EngineBrokenError):
                    raise error.cause from None
                self._bury(member, error.cause)
            except RayError as error:
                self._bury(member, error)

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Ask all actors to end, then end those that have not."""
        for member in self._members:
            call(member.handle, RolloutActor.stop)
        runs = [member.run for member in self._members if member.run is not None]
        if runs:
            ray.wait(list(runs), num_returns=len(runs), timeout=timeout_s)
        for member in self._members:
            ray.kill(member.handle)

    def _ready(self) -> list[Member]:
        return [member for member in self._members if member.is_ready]

    def _working(self) -> list[Member]:
        return [member for member in self._members if member.is_working]

    def _newly_sampled(self) -> int:
        """Tokens since it was asked last; those of an actor that does not answer count when it does again."""
        num_new = 0
        for member, stats in self._answers(RolloutActor.stats):
            num_new += stats.sampled_tokens - self._sampled.get(member.actor_id, 0)
            self._sampled[member.actor_id] = stats.sampled_tokens
        return num_new

    def _answers(
        self, method: Callable[[RolloutActor], Awaitable[T]], *, timeout_s: float = 5.0
    ) -> list[tuple[Member, T]]:
        """What each ready actor answers, of those that do in time. One that has died `check` replaces."""
        asked = [(member, call(member.handle, method)) for member in self._ready()]
        refs = [ref for _, ref in asked]
        done = set(ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)[0]) if refs else set()
        answers = [(member, peek(ref)) for member, ref in asked if ref in done]
        return [(member, answer) for member, answer in answers if answer is not None]

    def _check(self, member: Member) -> None:
        if not member.is_ready:
            self._check_start(member)
            return
        member.look()
        if member.run is not None and ray.wait([member.run], timeout=0)[0]:
            ray.get(member.run)
        if member.updates:
            done, member.updates = ray.wait(member.updates, num_returns=len(member.updates), timeout=0)
            self._deliveries += [delivery for delivery in ray.get(done) if delivery is not None]
        if member.draining is not None and ray.wait([member.draining], timeout=0)[0]:
            ray.get(member.draining)
            self._let_go(member)
        elif member.silent_s > self._hang_timeout_s:
            self._bury(member, RunFailure(f"it has work and wrote nothing for {member.silent_s:.0f} s"))

    def _check_start(self, member: Member) -> None:
        assert member.starting is not None, "it is starting"
        if not ray.wait([member.starting], timeout=0)[0]:
            now = time.monotonic()
            if now - member.told_at > max(TELL_EVERY_S, member.told_at - member.started_at):  # seldomer and seldomer
                member.told_at = now
                LOG.warning(
                    "rollout actor %s has not started in %.0f s: it waits for a node with %s free, or loads its model; "
                    "at work: %s",
                    *(member.actor_id, now - member.started_at, in_words(self._share.bundle)),
                    counted(len(self._ready()), "other actor"),
                )
            return
        member.dtype = ray.get(member.starting).dtype
        member.starting, member.ready_at = None, time.monotonic()
        self._ready_at = time.monotonic()
        version, weights = self._current
        if version != self._initial:
            member.updates.append(_update(member.handle, version, weights))
        if self._is_running:
            member.run = call(member.handle, RolloutActor.run)

    def _start(self) -> Member:
        actor_id = f"rollout-{self._num_started}"
        self._num_started += 1
        handle = start_rollout_actor(
            actor_id,
            settings=self._settings,
            version=self._initial,
            num_groups=self._num_groups,
            buffer=self._buffer,
            share=self._share,
        )
        return new_member(actor_id, handle)

    def _bury(self, member: Member, error: BaseException) -> None:
        """Take a dead actor out; another is started in its place at the next `check`, or later, unless it was to go."""
        was_wanted = member.draining is None
        self._let_go(member)  # one whose engine broke or hangs is still there
        if not was_wanted:
            LOG.warning("rollout actor %s died before it had finished, its groups go back: %s", member.actor_id, error)
            return
        now = time.monotonic()
        is_another = member.started_at > self._counted_at  # what goes with one node, or of one cause, counts once
        if is_another:
            self._deaths += 1
            self._counted_at = now
        if self._deaths > MAX_DEATHS_IN_A_ROW:
            raise RunFailure(
                f"rollout actors died {counted(self._deaths, 'time')} in a row without a finished group between, the "
                f"last one: {error}"
            ) from error
        pause_s = self._replacements.ask(lived_s=member.lived_s(now), is_another=is_another, now=now)
        LOG.warning(
            "rollout actor %s died%s, its groups go to others; a new one is started %s: %s",
            member.actor_id,
            "" if member.pulse is None else f" on {member.pulse.node}",
            f"in {pause_s:.0f} s, since they die soon after their start" if pause_s and self._working() else "at once",
            error,
        )
        self._num_replaced += 1

    def _let_go(self, member: Member) -> None:
        self._members.remove(member)
        ray.kill(member.handle)
        self._on_death(member.actor_id)


def _update(actor: Handle[RolloutActor], version: WeightVersion, weights: Published | None) -> Ref[Delivery | None]:
    if weights is None:
        return call(actor, RolloutActor.update_weights, version, None)
    return call(actor, RolloutActor.update_weights, version, value_of(weights.proof), *map(value_of, weights.buckets))
