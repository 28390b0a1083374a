"""Where the replay buffer writes what must survive it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rexrag.buffer.records import Record


class Journal(Protocol):
    """Where records are written, all of a call or, with an error, none; they are durable when it is synced.

    It is written in segments, which have increasing numbers: once one `is_full`, `roll` begins the next.
    """

    @property
    def number(self) -> int: ...

    @property
    def is_full(self) -> bool: ...

    def write(self, records: Sequence[Record]) -> None: ...

    def roll(self, head: Record) -> None: ...
