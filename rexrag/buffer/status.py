"""What a replay buffer says of itself, for progress and stall reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rexrag.buffer.leases import LeaseTable
from rexrag.types import WeightVersion


@dataclass(frozen=True, kw_only=True)
class ActorStatus:
    """What one actor holds. `idle_s`: longest time without progress among its leases.

    `waits_for_version`: when it last asked for groups, it did not hold the published weights.
    """

    num_leased: int
    idle_s: float
    held: WeightVersion | None
    waits_for_version: bool


@dataclass(frozen=True, kw_only=True)
class BufferStatus:
    """Group counts now. `capacity` bounds waiting + leased + finished + assigned to unpublished steps.

    Since the buffer began `num_finished` groups were stored, and `num_flat` were dropped since `refill` is set.
    """

    published: WeightVersion | None
    last_step: int
    waiting: int
    leased: int
    finished: int
    assigned: int
    capacity: int
    questions_to_ask_again: int
    num_finished: int
    num_flat: int
    actors: Mapping[str, ActorStatus]


@dataclass(frozen=True, kw_only=True)
class BufferPosition:
    """Where the buffer stands. `last_step`: the last step that has a batch.

    `damages`: a sentence for the user about each thing that is wrong with the log that it began with.
    """

    incarnation: str
    last_step: int
    epoch: int
    damages: tuple[str, ...]


def is_current(held: WeightVersion | None, published: WeightVersion) -> bool:
    """Whether an actor that holds `held` may lease, once `published` is out."""
    return held is not None and held.incarnation == published.incarnation and held.step >= published.step


def actor_statuses(
    leases: LeaseTable, *, held: Mapping[str, WeightVersion | None], published: WeightVersion | None, now: float
) -> dict[str, ActorStatus]:
    """What each actor holds, of those that asked for groups or have some."""
    idle: dict[str, list[float]] = {actor_id: [] for actor_id in held}
    for lease in leases:
        idle.setdefault(lease.actor_id, []).append(now - lease.progressed_at)
    return {
        actor_id: ActorStatus(
            num_leased=len(times),
            idle_s=max(times, default=0.0),
            held=held.get(actor_id),
            waits_for_version=published is not None and not is_current(held.get(actor_id), published),
        )
        for actor_id, times in sorted(idle.items())
    }
