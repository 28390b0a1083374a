"""Who works on which group. Leases live in memory only: after a crash of the buffer all unfinished groups are free."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rexrag.types import LeaseKey


@dataclass(slots=True, kw_only=True)
class Lease:
    """Times are seconds of the buffer's clock; `version` is the step published when it was granted."""

    key: LeaseKey
    actor_id: str
    version: int
    granted_at: float
    progressed_at: float
    progress: int = 0


class LeaseTable:
    """At most one lease a group. Progress keeps a lease, until its hard deadline; being alive does not.

    A lease is a group and the number of its grant: who has lost a lease cannot renew, end or fail the next one, be it
    the same actor's.

    Args:
        timeout_s: a lease without progress for so long ends.
        deadline_s: a lease so old ends, progress or not.
    """

    def __init__(self, *, timeout_s: float, deadline_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._leases: dict[str, Lease] = {}
        self._grants: Counter[str] = Counter()
        self._none_before = math.inf

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._leases

    def get(self, group_id: str) -> Lease | None:
        return self._leases.get(group_id)

    def fair(self, actor_id: str, num: int, *, num_leasable: int, num_actors: int) -> int:
        """How many of `num` groups an actor should get, for all actors to come to equally many: at least one."""
        if num <= 1:
            return num
        share = math.ceil((len(self) + num_leasable) / num_actors)
        return min(num, max(1, share - sum(lease.actor_id == actor_id for lease in self)))

    def grant(self, group_id: str, *, actor_id: str, version: int, now: float) -> LeaseKey:
        assert group_id not in self._leases, f"group {group_id} is leased already"
        self._grants[group_id] += 1
        key = LeaseKey(group_id, self._grants[group_id])
        lease = Lease(key=key, actor_id=actor_id, version=version, granted_at=now, progressed_at=now)
        self._leases[group_id] = lease
        self._none_before = min(self._none_before, self._end_of(lease))
        return key

    def holds(self, actor_id: str, key: LeaseKey) -> bool:
        """Whether the actor has this very lease."""
        lease = self._leases.get(key.group_id)
        return lease is not None and lease.key == key and lease.actor_id == actor_id

    def renew(self, actor_id: str, *, progress: Mapping[LeaseKey, int], now: float) -> list[LeaseKey]:
        """Renew the leases whose progress grew; returns those that the actor does not hold."""
        gone = []
        for key, value in progress.items():
            if not self.holds(actor_id, key):
                gone.append(key)
            elif value > (lease := self._leases[key.group_id]).progress:
                lease.progress, lease.progressed_at = value, now
        return gone

    def hand_back(self, actor_id: str, key: LeaseKey) -> None:
        """The group waits for the next grant; nothing happens if the actor does not hold the lease any more."""
        if self.holds(actor_id, key):
            del self._leases[key.group_id]

    def end(self, group_id: str) -> None:
        """The group is finished or dropped: it is never granted again."""
        self._leases.pop(group_id, None)
        del self._grants[group_id]

    def release(self, actor_id: str) -> None:
        self._leases = {key: lease for key, lease in self._leases.items() if lease.actor_id != actor_id}

    def expire(self, now: float) -> None:
        """End the leases that are over. All are looked at only when one may be."""
        if now >= self._none_before:
            self._leases = {key: lease for key, lease in self._leases.items() if now < self._end_of(lease)}
            self._none_before = min(map(self._end_of, self._leases.values()), default=math.inf)

    def _end_of(self, lease: Lease) -> float:
        """When a lease is over, if it makes no progress until then."""
        return min(lease.progressed_at + self._timeout_s, lease.granted_at + self._deadline_s)
