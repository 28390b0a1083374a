"""Small indexes for tests of what stands in front of one: each answers a query with its own words."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from rexrag.types import Passage


def answer_to(query: str, top_k: int) -> tuple[Passage, ...]:
    """What `EchoIndex` finds: passages that say which query and which `top_k` they are for."""
    count = min(top_k, 3)
    return tuple(Passage(id=f"{i}", title="", text=f"{i}/{top_k} {query}", score=1.0 / (i + 1)) for i in range(count))


class EchoIndex:
    """Finds `answer_to` of each query; a query with `bad` in it breaks its batch.

    Attributes:
        gate: searches wait until it is set, in the stage that `gated` names.
        batches: the queries of each call of `prepare` so far.
    """

    num_passages = 3

    def __init__(self, *, gated: str = "") -> None:
        self.gate = threading.Event()
        self.gated = gated
        self.batches: list[list[str]] = []
        self.found: list[list[str]] = []
        self.is_closed = False
        self._stages = {"prepare": threading.Lock(), "find": threading.Lock()}

    def prepare(self, queries: Sequence[str]) -> list[tuple[str, int]]:
        with self._alone("prepare"):
            self.batches.append(list(queries))
            if any("bad encoding" in query for query in queries):
                raise LookupError("no such letter")
            return [(query, len(query)) for query in queries]

    def find(self, prepared: Sequence[tuple[str, int]], *, top_k: int) -> list[tuple[Passage, ...]]:
        with self._alone("find"):
            assert all(len(query) == length for query, length in prepared)
            self.found.append([query for query, _ in prepared])
            if any("bad search" in query for query, _ in prepared):
                raise LookupError("index lost")
            return [answer_to(query, top_k) for query, _ in prepared]

    def close(self) -> None:
        self.is_closed = True

    def _alone(self, stage: str) -> threading.Lock:
        lock = self._stages[stage]
        assert not lock.locked(), f"{stage} is called by two threads at a time"
        if self.gated == stage:
            assert self.gate.wait(10)
        return lock
