"""One index behind many callers: their queries are searched for in batches, equal ones once.

    search ──▶ waiting ──batch──▶ prepare (thread 1) ──▶ find (thread 2) ──▶ every caller its own answer
                  │                                          a full batch is prepared meanwhile
                  └ full: `Overloaded`, with the seconds after which there should be room

A batch is what waits when the one before it is over, at most `max_batch` queries. Where as many wait already, it is
prepared while the one before it is found; a smaller one would only part from those who come back with the answers.
The next one waits a little for them. A single caller never waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeAlias

from rexrag.errors import Overloaded, SearchTimeoutError, counted
from rexrag.retrieval.answer_cache import AnswerCache, Passages
from rexrag.retrieval.protocol import BatchIndex, PreparedT, RetrieverState
from rexrag.types import Passage

_LEAST_RETRY_S: Final = 0.05
_FIRST_SECONDS_PER_QUERY: Final = 0.01
_SMOOTHING: Final = 0.2
_WAIT_SHARE: Final = 0.05
"""Of the seconds of a batch, for those who come back: more queries in one pass over the vectors cost little more."""


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """How a service batches, and how much it takes on.

    Attributes:
        max_batch: most queries of one call of the index.
        max_wait_s: seconds that a query waits for company at most, or a twentieth of what the last batch took.
        max_waiting: most distinct queries that wait; one more is refused.
        cache_chars: characters of passages that the answers kept for repeated queries may have together; 0: none.
    """

    max_batch: int = 64
    max_wait_s: float = 0.003
    max_waiting: int = 16_384
    cache_chars: int = 16_000_000


@dataclass(kw_only=True)
class ServiceCounters:
    """What a service has done since its start; `waiting` is what waits at the moment.

    Attributes:
        requests: queries that were asked, by whatever they were answered.
        searched: queries that the index was asked for; with `batches` the mean size of a batch.
        batch_sizes: how many batches had each size.
        coalesced: queries that shared the search of an equal one; cached: answered from an earlier one's.
        refused: for want of room; timed_out: whose time was over; failed: distinct queries whose batch broke.
        abandoned: distinct queries that nobody waited for any more when their turn came.
        prepare_s, find_s: seconds that the index has worked on each stage.
    """

    requests: int = 0
    searched: int = 0
    batches: int = 0
    coalesced: int = 0
    cached: int = 0
    refused: int = 0
    timed_out: int = 0
    failed: int = 0
    abandoned: int = 0
    waiting: int = 0
    prepare_s: float = 0.0
    find_s: float = 0.0
    batch_sizes: dict[int, int] = field(default_factory=dict)


class _Key(NamedTuple):
    query: str
    top_k: int


@dataclass(kw_only=True, eq=False)
class _Entry:
    """A distinct query on its way, and how many callers want its answer."""

    key: _Key
    since: float
    answer: asyncio.Future[Passages]
    num_callers: int = 0


_Batch: TypeAlias = list[_Entry]


class SearchService(Generic[PreparedT]):
    """A `Retriever` over an index whose calls block.

        service = SearchService(index)
        passages = await service.search("currency of Gabon", top_k=3)
        await service.close()

    An index that raises fails the queries of that batch, with what it raised, and no others. A caller that is
    cancelled takes nothing from those who asked the same. One instance belongs to one event loop; it starts with the
    first search.
    """

    def __init__(self, index: BatchIndex[PreparedT], *, settings: ServiceSettings | None = None) -> None:
        self._index = index
        self._settings = settings or ServiceSettings()
        self._counters = ServiceCounters()
        self._cache = AnswerCache(self._settings.cache_chars)
        self._waiting: deque[_Entry] = deque()
        self._on_way: dict[_Key, _Entry] = {}
        self._changed = asyncio.Event()
        """A query came, or a batch is over."""
        self._prepared: asyncio.Queue[tuple[_Batch, Sequence[PreparedT], float]] = asyncio.Queue()
        self._num_batches = 0
        """On their way: one is found and one prepared at a time. A third would begin before its company has come."""
        self._wanted = 0
        """Queries of the next batch once all are back that have their answers."""
        self._threads = [
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"search-{stage}") for stage in ("prepare", "find")
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self._seconds_per_query = _FIRST_SECONDS_PER_QUERY
        self._last_found_at = 0.0
        self._batch_s = 0.0
        self._may_be_abandoned = False
        self._is_closing = False

    @property
    def num_passages(self) -> int:
        return self._index.num_passages

    @property
    def counters(self) -> ServiceCounters:
        """As they are now; the object goes on counting."""
        self._counters.waiting = len(self._waiting)
        return self._counters

    async def search(self, query: str, *, top_k: int, timeout_s: float | None = None) -> Sequence[Passage]:
        """The best passages for a query, best first, at most `top_k`.

        Args:
            timeout_s: seconds after which the caller has no use for an answer; None: it waits for as long as it takes.

        Raises:
            Overloaded: too many queries wait, or the service ends.
            SearchTimeoutError: no answer within `timeout_s`.
            Exception: what the index raised.
        """
        [passages] = await self.search_many([query], top_k=top_k, timeout_s=timeout_s)
        return passages

    async def search_many(
        self, queries: Sequence[str], *, top_k: int, timeout_s: float | None = None
    ) -> list[Sequence[Passage]]:
        """The passages of each query; all of them or an error, as `search`."""
        assert top_k >= 1, f"top_k must be at least 1, got {top_k}"
        if self._is_closing:
            raise Overloaded("the search service ends and takes no more queries", retry_after_s=1.0)
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._prepare_forever()), asyncio.create_task(self._find_forever())]
        keys = [_Key(query, top_k) for query in queries]
        self._counters.requests += len(keys)
        known = {key: passages for key in keys if (passages := self._cache.get(key)) is not None}
        self._counters.cached += sum(key in known for key in keys)
        entries = self._join([key for key in keys if key not in known])
        try:
            # One after the other costs no time: a failure of any ends the call as it is met.
            async with asyncio.timeout(timeout_s):
                for key, entry in entries.items():
                    known[key] = await asyncio.shield(entry.answer)
        except TimeoutError:
            self._counters.timed_out += len(entries)
            raise SearchTimeoutError(f"no answer within {timeout_s:g} s; {self._load()}") from None
        finally:
            for entry in entries.values():
                entry.num_callers -= 1
                self._may_be_abandoned |= entry.num_callers == 0
        return [known[key] for key in keys]

    def state(self) -> RetrieverState:
        return RetrieverState()

    async def close(self) -> None:
        """Answer what was accepted, then end the threads and close the index."""
        self._is_closing = True
        self._changed.set()  # nobody comes any more
        if self._on_way:
            await asyncio.wait([entry.answer for entry in self._on_way.values()])
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for threads in self._threads:
            threads.shutdown()  # they are idle, so that this waits for nothing
        self._cache.clear()
        self._index.close()

    def _join(self, keys: Sequence[_Key]) -> dict[_Key, _Entry]:
        """An entry for each distinct key: that of an equal query on its way, else a new one."""
        new = [key for key in dict.fromkeys(keys) if key not in self._on_way]
        if new and len(self._waiting) + len(new) > self._settings.max_waiting:
            self._drop_abandoned()
            new = [key for key in dict.fromkeys(keys) if key not in self._on_way]
        if new and len(self._waiting) + len(new) > self._settings.max_waiting:
            self._counters.refused += len(keys)
            retry_after_s = max(_LEAST_RETRY_S, len(self._waiting) * self._seconds_per_query)
            raise Overloaded(f"the search service is full: {self._load()}", retry_after_s=retry_after_s)
        self._counters.coalesced += len(keys) - len(new)
        now, loop = time.monotonic(), asyncio.get_running_loop()
        for key in new:
            self._on_way[key] = entry = _Entry(key=key, since=now, answer=loop.create_future())
            self._waiting.append(entry)
        entries = {key: self._on_way[key] for key in keys}
        for entry in entries.values():
            entry.num_callers += 1
        if new:
            self._changed.set()
        return entries

    def _load(self) -> str:
        return f"{counted(len(self._waiting), 'query', 'queries')} wait, at most {self._settings.max_waiting} may"

    async def _prepare_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._until_due()
            batch = self._take()
            if not batch:
                continue
            self._num_batches += 1
            queries = [entry.key.query for entry in batch]
            began = time.monotonic()
            try:
                prepared = await loop.run_in_executor(self._threads[0], self._index.prepare, queries)
                assert len(prepared) == len(batch), f"an index prepared {len(prepared)} of {len(batch)} queries"
            except Exception as error:  # noqa: BLE001  # fault boundary: it is those callers' to see
                self._fail(batch, error)
                self._end_batch(batch, began=began)
            else:
                self._counters.prepare_s += time.monotonic() - began
                self._prepared.put_nowait((batch, prepared, began))

    async def _until_due(self) -> None:
        """Until a batch should begin: alone it waits for its company."""
        while not self._is_due():
            self._changed.clear()
            await self._changed.wait()
        if self._num_batches:
            return
        least_s = self._settings.max_wait_s
        until = max(self._waiting[0].since + least_s, self._last_found_at + max(least_s, _WAIT_SHARE * self._batch_s))
        while len(self._waiting) < self._wanted and not self._is_closing and (left_s := until - time.monotonic()) > 0:
            self._changed.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _is_due(self) -> bool:
        if self._num_batches == 0:
            return bool(self._waiting)
        return self._num_batches == 1 and len(self._waiting) >= self._settings.max_batch

    def _end_batch(self, batch: _Batch, *, began: float) -> None:
        self._num_batches -= 1
        self._wanted = min(self._settings.max_batch, len(self._waiting) + len(batch))
        self._last_found_at = time.monotonic()
        self._batch_s = self._last_found_at - began
        self._changed.set()

    def _take(self) -> _Batch:
        """The next batch, in order of arrival, without what nobody waits for any more."""
        batch: _Batch = []
        while self._waiting and len(batch) < self._settings.max_batch:
            entry = self._waiting.popleft()
            if entry.num_callers:
                batch.append(entry)
            else:
                self._abandon(entry)
        return batch

    def _drop_abandoned(self) -> None:
        """Make room: what nobody waits for any more is no load."""
        if not self._may_be_abandoned:
            return
        self._may_be_abandoned = False
        waiting = list(self._waiting)
        self._waiting.clear()
        for entry in waiting:
            if entry.num_callers:
                self._waiting.append(entry)
            else:
                self._abandon(entry)

    def _abandon(self, entry: _Entry) -> None:
        self._counters.abandoned += 1
        self._forget(entry)
        entry.answer.cancel()

    async def _find_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch, prepared, began_at = await self._prepared.get()
            self._counters.batches += 1
            self._counters.searched += len(batch)
            self._counters.batch_sizes[len(batch)] = self._counters.batch_sizes.get(len(batch), 0) + 1
            began = time.monotonic()
            by_top_k: dict[int, list[int]] = {}
            for number, entry in enumerate(batch):
                by_top_k.setdefault(entry.key.top_k, []).append(number)
            for top_k, numbers in by_top_k.items():
                part = [batch[number] for number in numbers]
                find = _bound_find(self._index, [prepared[number] for number in numbers], top_k)
                try:
                    found = await loop.run_in_executor(self._threads[1], find)
                    assert len(found) == len(part), f"an index found {len(found)} results for {len(part)} queries"
                except Exception as error:  # noqa: BLE001  # fault boundary: it is those callers' to see
                    self._fail(part, error)
                else:
                    self._answer(part, found)
            self._counters.find_s += time.monotonic() - began
            self._note_speed(len(batch), began=began_at)
            self._end_batch(batch, began=began_at)

    def _answer(self, entries: Sequence[_Entry], found: Sequence[Passages]) -> None:
        for entry, passages in zip(entries, found, strict=True):
            self._forget(entry)
            self._cache.put(entry.key, passages)
            entry.answer.set_result(passages)

    def _fail(self, entries: Sequence[_Entry], error: Exception) -> None:
        self._counters.failed += len(entries)
        for entry in entries:
            self._forget(entry)
            entry.answer.set_exception(error)
            entry.answer.exception()  # seen: a caller that has gone leaves no complaint behind

    def _forget(self, entry: _Entry) -> None:
        del self._on_way[entry.key]

    def _note_speed(self, size: int, *, began: float) -> None:
        now = time.monotonic()
        # Under load batches follow one another: from the end of one to the end of the next is what a batch takes.
        seconds = now - max(self._last_found_at, began - self._settings.max_wait_s)
        self._seconds_per_query += _SMOOTHING * (seconds / size - self._seconds_per_query)


def _bound_find(
    index: BatchIndex[PreparedT], prepared: Sequence[PreparedT], top_k: int
) -> Callable[[], list[Passages]]:
    return lambda: [tuple(passages) for passages in index.find(prepared, top_k=top_k)]
