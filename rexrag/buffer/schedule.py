"""Which question comes next, and which groups a step gets. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A finished group. `version` bounds its tokens' versions from below; `order` is that of admission."""

    version: int
    order: int
    group_id: str


def issue_order(keys: Iterable[str], *, seed: int, epoch: int) -> list[str]:
    """The questions of an epoch in a shuffle that depends on nothing but (seed, epoch, questions)."""

    def digest(key: str) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()

    return sorted(keys, key=digest)


def select_batch(
    finished: Sequence[Candidate], *, leased_versions: Sequence[int], version: int, size: int, max_staleness: int
) -> tuple[str, ...] | None:
    """The `size` groups that the step after `version` takes, or None where it has to wait.

    A group of lease version L has its last chance in the batch taken at version L + S. The oldest groups come first,
    which is the order of admission unless a lease was lost. The step waits while, for some k ≥ 0, more than k · size of
    the groups left behind would have their last chance within the k batches after it, and one that is not finished
    could still take the place of a group with more time. So slow and long groups are not selected away.
    """
    if len(finished) < size:
        return None
    batch = sorted(finished)[:size]
    for k in range(max_staleness):
        oldest = version + k - max_staleness
        # Where the batch has a younger group, the older ones left behind are all leased.
        if batch[-1].version > oldest and sum(lease <= oldest for lease in leased_versions) > k * size:
            return None
    return tuple(candidate.group_id for candidate in sorted(batch, key=lambda candidate: candidate.order))
