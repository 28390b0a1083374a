"""Answers to queries that were given last, as long as their texts are not too long together."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, TypeAlias

from rexrag.types import Passage

Key: TypeAlias = tuple[str, int]
"""A query, and how many passages of it."""
Passages: TypeAlias = tuple[Passage, ...]

_ENTRY_CHARS: Final = 256
"""What an entry, and each of its passages, weighs beside its texts."""


class AnswerCache:
    """The least recently used go first, from `max_chars` of passages on; with 0 nothing is kept.

    One instance belongs to one event loop.
    """

    def __init__(self, max_chars: int) -> None:
        self._left = max_chars
        self._entries: OrderedDict[Key, Passages] = OrderedDict()

    def get(self, key: Key) -> Passages | None:
        if (passages := self._entries.get(key)) is not None:
            self._entries.move_to_end(key)
        return passages

    def put(self, key: Key, passages: Passages) -> None:
        if key in self._entries:  # two have asked at once
            return
        self._entries[key] = passages
        self._left -= _weight(key, passages)
        while self._left < 0:
            self._left += _weight(*self._entries.popitem(last=False))

    def clear(self) -> None:
        while self._entries:
            self._left += _weight(*self._entries.popitem())


def _weight(key: Key, passages: Passages) -> int:
    query, _ = key
    return _ENTRY_CHARS + len(query) + sum(_ENTRY_CHARS + len(p.title) + len(p.text) for p in passages)
