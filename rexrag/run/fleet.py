"""The rollout actors of a run: started, given weights, asked for evaluations, and replaced when they die.

start -> ready -> run ... (death -> lease back to the buffer, a new actor under a new id) ... -> stop
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayActorError, RayTaskError

from rexrag.actors.build import RolloutSettings
from rexrag.actors.rollout_actor import RolloutActor, start_rollout_actor
from rexrag.engine.protocol import EngineStats
from rexrag.errors import RetrieverSetupError, RunFailure, UserError
from rexrag.run.remote import Handle, Ref, call, value_of
from rexrag.types import EpisodeScore, Question, WeightVersion

LOG = logging.getLogger(__name__)

MAX_RESTARTS_IN_A_ROW = 5
"""Deaths of actors without a finished group between them: then the cause is not a passing one."""


Weights: TypeAlias = dict[str, npt.NDArray[np.generic]]


@dataclass(kw_only=True)
class _Member:
    actor_id: str
    handle: Handle[RolloutActor]
    run: Ref[None] | None = None
    updates: list[Ref[None]] = field(default_factory=list)


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
        on_death: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._num_groups = num_groups
        self._initial = version
        self._current: tuple[WeightVersion, Ref[Weights] | None] = (version, None)
        self._buffer = buffer
        self._on_death = on_death
        self._num_cpus = num_cpus
        self._num_gpus = num_gpus
        self._sampled = (time.monotonic(), 0)
        self._num_started = 0
        self._restarts = 0
        self._members = [self._start() for _ in range(num_actors)]

    def ready(self) -> list[Ref[int]]:
        """One reference per actor, resolved once it is built."""
        return [call(member.handle, RolloutActor.ready) for member in self._members]

    def run(self) -> None:
        """Let all actors lease and produce."""
        for member in self._members:
            member.run = call(member.handle, RolloutActor.run)

    def publish(self, version: WeightVersion, weights: Ref[Weights] | None) -> None:
        """Hand new weights to all actors without waiting for them; None: the weights did not change.

        The previous version's object is let go once every actor has switched.
        """
        self._current = (version, weights if weights is not None else self._current[1])
        for member in self._members:
            member.updates.append(_update(member.handle, version, weights))

    def pending_updates(self) -> list[Ref[None]]:
        """Weight updates that an actor has not confirmed yet."""
        return [ref for member in self._members for ref in member.updates]

    def evaluate(self, questions: Sequence[Question], *, version: WeightVersion) -> list[Ref[list[EpisodeScore]]]:
        """Greedy episodes under one version, questions dealt to the actors in turn."""
        shares = [questions[i :: len(self._members)] for i in range(len(self._members))]
        return [
            call(member.handle, RolloutActor.evaluate, share, version=version)
            for member, share in zip(self._members, shares, strict=True)
            if share
        ]

    def tokens_per_s(self) -> float | None:
        """Sampled tokens of all actors per second since the last call; None right after an actor was replaced."""
        now, sampled = time.monotonic(), sum(stats.sampled_tokens for stats in self._stats())
        before, self._sampled = self._sampled, (now, sampled)
        return (sampled - before[1]) / (now - before[0]) if sampled >= before[1] else None

    def _stats(self, *, timeout_s: float = 5.0) -> list[EngineStats]:
        """Counters of the actors that answer in time."""
        refs = [call(member.handle, RolloutActor.stats) for member in self._members]
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
        stats = []
        for ref in done:
            try:
                stats.append(ray.get(ref))
            except RayActorError:
                continue  # replaced by `check`, which is called all the time
        return stats

    def progressed(self) -> None:
        """A group has finished: deaths from here on count anew."""
        self._restarts = 0

    def check(self) -> None:
        """Replace actors that died, confirm weight updates.

        Raises:
            RunFailure: an actor ended with an error of its own, or actors die without a finished group between.
            UserError: an actor ended with a mistake of the user's.
        """
        for index, member in enumerate(self._members):
            try:
                self._check(member)
            except RayActorError as error:
                self._members[index] = self._replace(member, error)
            except RayTaskError as error:
                if isinstance(error.cause, RetrieverSetupError | UserError):
                    raise error.cause from None
                raise RunFailure(f"rollout actor {member.actor_id} failed: {error.cause!r}") from error

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Ask all actors to end, then end those that have not."""
        for member in self._members:
            call(member.handle, RolloutActor.stop)
        runs = [member.run for member in self._members if member.run is not None]
        ray.wait(runs, num_returns=len(runs), timeout=timeout_s) if runs else None
        for member in self._members:
            ray.kill(member.handle)

    def _check(self, member: _Member) -> None:
        if member.run is not None and ray.wait([member.run], timeout=0)[0]:
            ray.get(member.run)
        if member.updates:
            done, member.updates = ray.wait(member.updates, num_returns=len(member.updates), timeout=0)
            ray.get(done)

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
        return _Member(actor_id=actor_id, handle=handle)

    def _replace(self, member: _Member, error: RayActorError) -> _Member:
        self._restarts += 1
        if self._restarts > MAX_RESTARTS_IN_A_ROW:
            raise RunFailure(
                f"{self._restarts} rollout actors died without a finished group between them, the last one: {error}"
            ) from error
        LOG.warning("rollout actor %s died, a new one takes its groups: %s", member.actor_id, error)
        self._on_death(member.actor_id)
        new = self._start()
        version, weights = self._current
        if version != self._initial:
            new.updates.append(_update(new.handle, version, weights))
        if member.run is not None:
            new.run = call(new.handle, RolloutActor.run)
        return new


def _update(actor: Handle[RolloutActor], version: WeightVersion, weights: Ref[Weights] | None) -> Ref[None]:
    return call(actor, RolloutActor.update_weights, version, None if weights is None else value_of(weights))
