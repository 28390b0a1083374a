"""Which sequence, or which finished prefix, each cache slot holds."""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PrefixEntry:
    """Tokens whose keys and values a slot still holds, for requests of one salt."""

    salt: str
    token_ids: list[int]


class SlotTable:
    """Slots are taken, then given back as free or as a prefix entry; the least recently used entry makes room.

        free ──take──▶ taken ──retain──▶ entry ──take (evicted) or claim──▶ taken
          ▲──────────────┘ free                └──release──▶ free

    Free slots are taken from below, so that the taken ones lie close together.
    """

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))
        self._entries: dict[int, PrefixEntry] = {}

    def take(self, *, keep: int | None = None) -> int | None:
        """A free slot, else the oldest entry's but never `keep`; None if there is none."""
        if self._free:
            return heapq.heappop(self._free)
        victim = next((slot for slot in self._entries if slot != keep), None)
        if victim is not None:
            del self._entries[victim]
        return victim

    def claim(self, slot: int) -> None:
        """Take an entry's slot together with what it holds."""
        del self._entries[slot]

    def free(self, slot: int) -> None:
        heapq.heappush(self._free, slot)

    def retain(self, slot: int, entry: PrefixEntry) -> None:
        """Give a taken slot back as the newest entry."""
        self._entries[slot] = entry

    def touch(self, slot: int) -> None:
        """Make an entry the newest."""
        self._entries[slot] = self._entries.pop(slot)

    def release(self, salt: str | None = None) -> None:
        """Forget the entries of a salt; None: all."""
        for slot in [slot for slot, entry in self._entries.items() if salt in (None, entry.salt)]:
            del self._entries[slot]
            self.free(slot)

    def longest_match(self, salt: str, token_ids: list[int]) -> tuple[int, int]:
        """Slot and length of the entry of this salt that shares the longest prefix; length 0 if none does."""
        best = (-1, 0)
        for slot, entry in self._entries.items():
            if entry.salt == salt and (length := common_prefix(entry.token_ids, token_ids)) > best[1]:
                best = (slot, length)
        return best

    def entry(self, slot: int) -> PrefixEntry:
        return self._entries[slot]


def common_prefix(first: list[int], second: list[int]) -> int:
    """Number of leading tokens that two sequences share."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i in range(length) if first[i] != second[i])
