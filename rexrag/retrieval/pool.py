"""Several search services as one retriever: queries go where the fewest are outstanding, and on where one fails."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from rexrag.retrieval.attempts import Attempts, RetryableError
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
    member: Member
    outstanding: int = 0
    shunned_until: float = 0.0


class PoolRetriever:
    """A `Retriever` over the members of a pool.

    A member that dies costs a search an attempt, which the others answer at once; when all are gone searches wait for
    the first that comes back, as `Attempts` has it. One instance belongs to one event loop.

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
        self._order = random.Random()

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """The best passages for a query, best first, at most `top_k`.

        Raises:
            RetrieverError: no member answered within the bound of a search.
            RetrievalIndexError: index or corpus changed under a member.
        """
        return await self._attempts.search(query, top_k)

    def state(self) -> RetrieverState:
        return self._attempts.state()

    async def close(self) -> None:
        await self._attempts.close()

    async def _attempt(self, query: str, top_k: int) -> Sequence[Passage]:
        place = self._choose()
        place.outstanding += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await place.member.search(query, top_k)
        except TimeoutError as error:
            raise self._shun(place, RetryableError(f"no answer within {self._timeout_s:g} s")) from error
        except RetryableError as error:
            raise self._shun(place, error) from error
        finally:
            place.outstanding -= 1
        place.shunned_until = 0.0
        return found

    def _choose(self) -> _Place:
        """The member with the fewest outstanding queries, any of several."""
        now = time.monotonic()
        return min(
            self._places,
            key=lambda place: (place.shunned_until > now, place.outstanding, self._order.random()),
        )

    def _shun(self, place: _Place, error: RetryableError) -> RetryableError:
        now = time.monotonic()
        place.shunned_until = now + _SHUNNED_S
        has_others = any(other.shunned_until <= now for other in self._places)
        return RetryableError(
            str(error), retry_after_s=error.retry_after_s, is_busy=error.is_busy, is_elsewhere=has_others
        )
