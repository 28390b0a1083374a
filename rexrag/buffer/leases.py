"""Who works on which group. Leases live in memory only: after a crash of the buffer all unfinished groups are free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Lease:
    """Times are seconds of the buffer's clock; `version` is the step published when it was granted."""

    group_id: str
    actor_id: str
    version: int
    granted_at: float
    progressed_at: float
    progress: int = 0


class LeaseTable:
    """At most one lease a group. Progress keeps a lease, until its hard deadline; being alive does not.

    Args:
        timeout_s: a lease without progress for so long ends.
        deadline_s: a lease so old ends, progress or not.
    """

    def __init__(self, *, timeout_s: float, deadline_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._leases: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._leases

    def get(self, group_id: str) -> Lease | None:
        return self._leases.get(group_id)

    def grant(self, group_id: str, *, actor_id: str, version: int, now: float) -> None:
        assert group_id not in self._leases, f"group {group_id} is leased already"
        self._leases[group_id] = Lease(
            group_id=group_id, actor_id=actor_id, version=version, granted_at=now, progressed_at=now
        )

    def renew(self, actor_id: str, *, progress: Mapping[str, int], now: float) -> list[str]:
        """Renew the leases whose progress grew; returns the groups that the actor does not hold."""
        gone = []
        for group_id, value in progress.items():
            lease = self._leases.get(group_id)
            if lease is None or lease.actor_id != actor_id:
                gone.append(group_id)
            elif value > lease.progress:
                lease.progress, lease.progressed_at = value, now
        return gone

    def end(self, group_id: str) -> None:
        self._leases.pop(group_id, None)

    def release(self, actor_id: str) -> None:
        self._leases = {key: lease for key, lease in self._leases.items() if lease.actor_id != actor_id}

    def expire(self, now: float) -> None:
        self._leases = {key: lease for key, lease in self._leases.items() if not self._is_over(lease, now)}

    def _is_over(self, lease: Lease, now: float) -> bool:
        return now - lease.progressed_at >= self._timeout_s or now - lease.granted_at >= self._deadline_s
