"""Several search services as one retriever: queries go where the fewest are outstanding, and on where one fails."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from rexrag.retrieval.attempts import Attempts, RetryableError
from rexrag.retrieval.outages import LatestAnswered
from rexrag.retrieval.protocol import RetrieverState
from rexrag.types import Passage

_SHUNNED_S: Final = 1.0
"""For so long a member that failed gets a query only where all others have failed, too."""


class Member(Protocol):
    """A search service elsewhere."""

    async def search(self, query: str, top_k: int) -> Sequence[Passage]:
        """The passages of a query.

        Raises:
            RetryableError: it died, or has no room.
        """


@dataclass(kw_only=True, eq=False)
class _Place:
    """A member; `is_out` from a failure to the next answer. A failure of a call that began before the latest answered
    one says nothing: what a process that died was asked may fail only when its successor has answered."""

    member: Member
    outstanding: int = 0
    shunned_until: float = 0.0
    is_out: bool = False
    answered: LatestAnswered = field(default_factory=LatestAnswered)


class PoolRetriever:
    """A `Retriever` over the members of a pool.

    What a member that dies was asked for the others answer in the same attempt; one that hangs costs the attempt. When
    all are gone searches wait for the first that comes back, as `Attempts` has it. One instance belongs to one event
    loop.

    Args:
        timeout_s: bound of one attempt, seconds.
        max_retries: attempts after the first.
    """

    def __init__(self, members: Sequence[Member], *, timeout_s: float, max_retries: int) -> None:
        assert members, "a pool has members"
        self._places = [_Place(member=member) for member in members]
        self._timeout_s = timeout_s
        self._attempts = Attempts(
            "the pool of search actors", attempt=self._attempt, timeout_s=timeout_s, max_retries=max_retries
        )
        self._num_elsewhere = 0
        self._order = random.Random()

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """The best passages for a query, best first, at most `top_k`.

        Raises:
            RetrieverError: no member answered within the bound of a search.
            RetrievalIndexError: index or corpus changed under a member.
        """
        return await self._attempts.search(query, top_k)

    def state(self) -> RetrieverState:
        state = self._attempts.state()
        return replace(state, retried=state.retried + self._num_elsewhere)

    async def close(self) -> None:
        await self._attempts.close()

    async def _attempt(self, query: str, top_k: int) -> Sequence[Passage]:
        began = time.monotonic()
        asked: list[_Place] = []
        failures: list[RetryableError] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                while (place := self._choose(besides=asked)) is not None:
                    self._num_elsewhere += bool(asked)
                    asked.append(place)
                    began = time.monotonic()
                    try:
                        return await self._ask(place, query, top_k, began=began)
                    except RetryableError as error:
                        failures.append(error)
        except TimeoutError as error:
            _shun(asked[-1], began=began, is_out=True)
            is_elsewhere = not all(place.is_out for place in self._places)
            raise RetryableError.late(self._timeout_s, is_elsewhere=is_elsewhere) from error
        # One that has no room does answer: the pool is not gone.
        raise next((failure for failure in failures if failure.is_busy), failures[-1])

    async def _ask(self, place: _Place, query: str, top_k: int, *, began: float) -> Sequence[Passage]:
        place.outstanding += 1
        try:
            found = await place.member.search(query, top_k)
        except RetryableError as error:
            _shun(place, began=began, is_out=not error.is_busy)
            raise
        finally:
            place.outstanding -= 1
        place.answered.note(began)
        place.shunned_until, place.is_out = 0.0, False
        return found

    def _choose(self, *, besides: Sequence[_Place]) -> _Place | None:
        """The member with the fewest outstanding queries, any of several; after the first that asks again none that
        has failed lately."""
        now = time.monotonic()
        places = [place for place in self._places if place not in besides]
        if besides:
            places = [place for place in places if place.shunned_until <= now]
        return min(
            places,
            key=lambda place: (place.shunned_until > now, place.outstanding, self._order.random()),
            default=None,
        )


def _shun(place: _Place, *, began: float, is_out: bool) -> None:
    """After a failure of a call that began then."""
    if not place.answered.is_after(began):
        place.shunned_until, place.is_out = time.monotonic() + _SHUNNED_S, is_out
