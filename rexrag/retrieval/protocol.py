"""What an episode needs of a retriever."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

from rexrag.types import Passage

PreparedT = TypeVar("PreparedT")
"""A query in the form that an index searches by: a vector float32[D], or its text."""


_COUNTED: Final = ("outages", "outage_s", "retried", "empty", "failed")


@dataclass(frozen=True, kw_only=True)
class RetrieverState:
    """How a retriever does.

    Attributes:
        is_down: it does not answer at the moment: no new question is begun.
        outages, outage_s: how often it did not, and for how many seconds together.
        retried: attempts of searches after their first.
        empty: searches that found nothing; failed: those that could not be made. Whoever searches counts them.
    """

    is_down: bool = False
    outages: int = 0
    outage_s: float = 0.0
    retried: int = 0
    empty: int = 0
    failed: int = 0


def added(states: Iterable[RetrieverState]) -> RetrieverState:
    """Several retrievers together; `is_down`: any of them."""
    told = list(states)
    sums = {name: sum(getattr(state, name) for state in told) for name in _COUNTED}
    return RetrieverState(is_down=any(state.is_down for state in told), **sums)


def since(before: RetrieverState, now: RetrieverState) -> RetrieverState:
    """What was counted between two looks."""
    return replace(now, **{name: getattr(now, name) - getattr(before, name) for name in _COUNTED})


class Retriever(Protocol):
    """A search back end. No search holds up the event loop, and every wait for another process has a bound."""

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """The best passages for a query, best first, at most `top_k`.

        Raises:
            QueryRefusedError: it does not take this query; another one may do.
            RetrieverSetupError: no query can be answered: the settings name something else than a retriever.
            RetrieverError: no result could be had in the end. Never an empty result in place of a failure.
        """

    def state(self) -> RetrieverState: ...

    async def close(self) -> None: ...


class BatchIndex(Protocol[PreparedT]):
    """An index that answers many queries in one call. Its calls block: a service makes them in threads of its own.

    The two stages are apart so that the next queries are encoded while those before them are searched for. Each is
    called by one thread at a time.
    """

    @property
    def num_passages(self) -> int: ...

    def prepare(self, queries: Sequence[str]) -> Sequence[PreparedT]:
        """The form of each query that `find` takes."""

    def find(self, prepared: Sequence[PreparedT], *, top_k: int) -> Sequence[Sequence[Passage]]:
        """For each query the best passages, best first, at most `top_k`.

        Raises:
            RetrievalIndexError: index or corpus changed under it.
        """

    def close(self) -> None: ...
