"""Queries that wait at the same time travel in one request: a server that answers slowly gets them in larger batches.

    ask ──▶ waiting ──one request at a time, with all that wait──▶ answers

One at a time, since servers that encode and search compute with all cores or a whole GPU: requests that come at once
then take longer than one after the other.

A server may take single queries alone, or refuse one of several, or break at it; then each is asked by itself, and a
server that answers all of them so gets no batch any more. One that does not answer in time gets smaller ones, for a
while.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from rexrag.errors import QueryRefusedError, RetrieverError, RetrieverSetupError
from rexrag.retrieval.answer_cache import Passages
from rexrag.retrieval.attempts import RetryableError

LOG = logging.getLogger(__name__)

_GROWS_AFTER: Final = 32
"""Requests, as large as may be and answered in time, after which they may be twice as large again."""

_Send = Callable[[Sequence[str], int], Awaitable[Sequence[Passages]]]


@dataclass(kw_only=True, eq=False)
class _Asked:
    query: str
    top_k: int
    answer: asyncio.Future[Passages] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """One instance belongs to one event loop.

    Args:
        name: of the server, for the log.
        send: one request: the passages of each of these queries, at most so many of each. Raises `RetryableError`,
            `QueryRefusedError` and `RetrieverSetupError`.
        max_batch: most queries of a request; with 1 each goes by itself, at once.
        timeout_s: bound of `ask`, seconds.
    """

    def __init__(self, name: str, *, send: _Send, max_batch: int, timeout_s: float) -> None:
        self._name = name
        self._send = send
        self._limit = self._max_batch = max_batch
        self._timeout_s = timeout_s
        self._num_full = 0
        self._is_closed = False
        self._waiting: deque[_Asked] = deque()
        self._requests: set[asyncio.Task[None]] = set()
        self._is_planned = False

    async def ask(self, query: str, top_k: int) -> Passages:
        """The passages of a query; errors are those of `send`, and one that passes where it took too long."""
        if self._is_closed:
            raise RetrieverError(f"{self._name}: is asked no more")
        asked = _Asked(query=query, top_k=top_k)
        self._waiting.append(asked)
        self._plan()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asked.answer
        except TimeoutError as error:
            raise RetryableError.late(self._timeout_s) from error

    async def close(self) -> None:
        """Give up what is under way: whoever waits for it gets an error."""
        self._is_closed = True
        for request in self._requests:
            request.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)
        for asked in self._waiting:
            _fail(asked, RetrieverError(f"{self._name}: is asked no more"))

    def _plan(self) -> None:
        """Those that ask in the same round of the event loop are seen together."""
        if not self._is_planned:
            self._is_planned = True
            asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        self._is_planned = False
        self._waiting = deque(asked for asked in self._waiting if not asked.answer.done())  # some have given up
        while self._waiting and (self._max_batch == 1 or not self._requests):
            request = asyncio.create_task(self._ask_together(self._taken()))
            self._requests.add(request)
            request.add_done_callback(self._ended)

    def _taken(self) -> list[_Asked]:
        """The first that wait; all of a request want as many passages."""
        batch = [self._waiting.popleft()]
        while self._waiting and len(batch) < self._max_batch and self._waiting[0].top_k == batch[0].top_k:
            batch.append(self._waiting.popleft())
        return batch

    def _ended(self, request: asyncio.Task[None]) -> None:
        self._requests.discard(request)
        if self._waiting and not request.cancelled():
            self._plan()

    async def _ask_together(self, batch: Sequence[_Asked]) -> None:
        try:
            found = await self._send([asked.query for asked in batch], batch[0].top_k)
        except Exception as error:  # noqa: BLE001  # fault boundary: whoever waits sees it
            if len(batch) > 1 and _may_be_of_one(error):
                await self._ask_one_by_one(batch)
                return
            if len(batch) > 1 and isinstance(error, RetryableError) and error.is_late:
                self._max_batch, self._num_full = min(self._max_batch, len(batch) // 2), 0
            _fail(batch[0], error)
            for asked in batch[1:]:
                _fail(asked, error.of_another() if isinstance(error, RetryableError) else error)
        else:
            for asked, passages in zip(batch, found, strict=True):
                _answer(asked, passages)
            self._note_size(len(batch))
        finally:
            for asked in batch:  # where this was cancelled: all others have an answer
                _fail(asked, RetrieverError(f"{self._name}: is asked no more"))

    def _note_size(self, size: int) -> None:
        self._num_full += size == self._max_batch
        if self._num_full >= _GROWS_AFTER:
            self._max_batch, self._num_full = min(self._limit, 2 * self._max_batch), 0

    async def _ask_one_by_one(self, batch: Sequence[_Asked]) -> None:
        singles = (self._send([asked.query], asked.top_k) for asked in batch)
        outcomes = await asyncio.gather(*singles, return_exceptions=True)
        for asked, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                _fail(asked, outcome)
            else:
                _answer(asked, outcome[0])
        if self._max_batch > 1 and not any(isinstance(outcome, BaseException) for outcome in outcomes):
            self._limit = self._max_batch = 1
            LOG.warning("%s takes one query a request, and gets no more at a time", self._name)


def _may_be_of_one(error: Exception) -> bool:
    """Whether a request may have failed for one of its queries, or for their being several."""
    is_answer = isinstance(error, RetryableError) and error.is_broken
    return is_answer or isinstance(error, QueryRefusedError | RetrieverSetupError)


def _answer(asked: _Asked, passages: Passages) -> None:
    if not asked.answer.done():
        asked.answer.set_result(passages)


def _fail(asked: _Asked, error: BaseException) -> None:
    if not asked.answer.done():
        asked.answer.set_exception(error)
