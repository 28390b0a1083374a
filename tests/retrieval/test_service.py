"""`rexrag.retrieval.service`: every caller its own answer, whatever the others do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pytest
from batch_indexes import EchoIndex, answer_to
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.errors import Overloaded, SearchTimeoutError
from rexrag.retrieval.protocol import Retriever
from rexrag.retrieval.service import SearchService, ServiceSettings
from rexrag.types import Passage

T = TypeVar("T")
TIMEOUT_S = 200.0


def run(scenario: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(scenario(), TIMEOUT_S)

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@dataclass(frozen=True)
class Call:
    """A caller: it comes at a time and maybe goes before its answer is there. Times in event-loop rounds."""

    query: str
    top_k: int
    comes: int
    goes: int | None


CALLS = st.lists(
    st.builds(
        Call,
        query=st.sampled_from(["a", "b", "c", "d ", "bad search", "bad encoding", "\ud800"]),
        top_k=st.sampled_from([1, 2, 5]),
        comes=st.integers(0, 30),
        goes=st.none() | st.integers(0, 20),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(calls=CALLS, max_batch=st.integers(1, 8), cache_chars=st.sampled_from([0, 2_000, 1_000_000]))
def test_every_caller_gets_its_own_answer(calls: list[Call], max_batch: int, cache_chars: int) -> None:
    index = EchoIndex()

    async def ask(service: SearchService[tuple[str, int]], call: Call) -> Sequence[Passage] | LookupError | None:
        for _ in range(call.comes):
            await asyncio.sleep(0)
        task = asyncio.create_task(service.search(call.query, top_k=call.top_k))
        for _ in range(call.goes or 0):
            await asyncio.sleep(0)
        if call.goes is not None:
            task.cancel()
        try:
            return await task
        except LookupError as error:
            return error
        except asyncio.CancelledError:
            return None

    async def scenario() -> list[Sequence[Passage] | LookupError | None]:
        service = SearchService(
            index, settings=ServiceSettings(max_batch=max_batch, max_wait_s=0.001, cache_chars=cache_chars)
        )
        answers = await asyncio.gather(*(ask(service, call) for call in calls))
        await service.close()
        counters = service.counters
        assert (counters.requests, counters.waiting) == (
            sum(a is not None or c.goes != 0 for c, a in zip(calls, answers, strict=True)),
            0,
        )
        assert counters.searched == sum(size * count for size, count in counters.batch_sizes.items())
        return answers

    answers = run(scenario)
    assert all(len(batch) <= max_batch for batch in index.batches)
    assert index.is_closed
    broken = {query for batch in [*index.batches, *index.found] if any("bad" in q for q in batch) for query in batch}
    for call, answer in zip(calls, answers, strict=True):
        if isinstance(answer, LookupError):
            assert call.query in broken, "only a batch with a bad query in it fails"
        elif answer is None:
            assert call.goes is not None
        else:
            assert tuple(answer) == answer_to(call.query, call.top_k)


def test_it_is_a_retriever_and_answers_with_what_the_index_finds() -> None:
    async def scenario() -> None:
        service = SearchService(EchoIndex())
        retriever: Retriever = service
        assert tuple(await retriever.search("q", top_k=2)) == answer_to("q", 2)
        assert [tuple(p) for p in await service.search_many(["x", "y", "x"], top_k=1)] == [
            answer_to("x", 1), answer_to("y", 1), answer_to("x", 1)
        ]  # fmt: skip
        assert await service.search_many([], top_k=1) == []
        await retriever.close()

    run(scenario)


def test_those_who_come_together_are_answered_together_and_equal_ones_once() -> None:
    index = EchoIndex(gated="prepare")

    async def scenario() -> None:
        service = SearchService(index)
        first = asyncio.create_task(service.search("first", top_k=1))
        await until(lambda: service.counters.waiting == 0)
        await asyncio.sleep(0.01)
        callers = [asyncio.create_task(service.search(f"q{i % 10}", top_k=1)) for i in range(100)]
        await until(lambda: service.counters.waiting == 10)
        index.gate.set()
        await asyncio.gather(first, *callers)
        assert [caller.result() for caller in callers] == [answer_to(f"q{i % 10}", 1) for i in range(100)]
        assert [len(batch) for batch in index.batches] == [1, 10]
        assert (service.counters.coalesced, service.counters.searched) == (90, 11)
        await service.search("q3", top_k=1)
        assert (len(index.batches), service.counters.cached) == (2, 1)
        await service.close()

    run(scenario)


def test_a_full_batch_is_prepared_while_one_is_found_and_no_third_begins() -> None:
    index = EchoIndex(gated="find")

    async def scenario() -> None:
        service = SearchService(index, settings=ServiceSettings(max_batch=2))
        callers = [asyncio.create_task(service.search(f"q{i}", top_k=1)) for i in range(7)]
        await until(lambda: len(index.batches) == 2)
        await asyncio.sleep(0.02)
        assert [len(batch) for batch in index.batches] == [2, 2]
        assert index.found == []
        index.gate.set()
        await asyncio.gather(*callers)
        await service.close()

    run(scenario)


def test_a_batch_that_is_not_full_waits_for_those_who_come_back_with_the_answers() -> None:
    index = EchoIndex(gated="find")

    async def scenario() -> None:
        service = SearchService(index, settings=ServiceSettings(max_batch=8, max_wait_s=30, cache_chars=0))

        async def caller(number: int) -> None:
            for turn in range(3):
                assert await service.search(f"{number}-{turn}", top_k=1) == answer_to(f"{number}-{turn}", 1)

        early = [asyncio.create_task(caller(number)) for number in range(3)]
        await until(lambda: len(index.batches) == 1)
        late = [asyncio.create_task(caller(number)) for number in range(3, 5)]
        await until(lambda: service.counters.waiting == 2)
        await asyncio.sleep(0.02)
        assert [len(batch) for batch in index.batches] == [3]
        index.gate.set()
        await until(lambda: all(task.done() for task in early))
        assert [len(batch) for batch in index.batches] == [3, 5, 5]
        for task in late:
            task.cancel()
        await asyncio.gather(*early, *late, return_exceptions=True)
        await service.close()

    run(scenario)


def test_waiting_for_company_is_bounded_and_a_single_caller_never_waits() -> None:
    async def scenario() -> None:
        service = SearchService(EchoIndex(), settings=ServiceSettings(max_wait_s=4.0, cache_chars=0))
        clock = asyncio.get_running_loop().time
        began = clock()
        for number in range(20):
            await service.search(str(number), top_k=1)
        assert clock() - began < 20, "twenty waits would be eighty seconds"
        await asyncio.gather(*(service.search(str(number), top_k=1) for number in range(5)))
        began = clock()
        await service.search("after company", top_k=1)
        assert 3.9 < clock() - began < 60
        began = clock()
        await service.search("alone again", top_k=1)
        assert clock() - began < 3.9
        await service.close()

    run(scenario)


def test_one_query_too_many_is_refused_and_says_when_to_come_back() -> None:
    index = EchoIndex(gated="prepare")

    async def scenario() -> None:
        service = SearchService(index, settings=ServiceSettings(max_waiting=3))
        first = asyncio.create_task(service.search("first", top_k=1))
        await asyncio.sleep(0.01)
        callers = [asyncio.create_task(service.search(f"q{i}", top_k=1)) for i in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="is full: 3 queries wait, at most 3 may") as raised:
            await service.search("one more", top_k=1)
        assert 0 < raised.value.retry_after_s < 10
        same = asyncio.create_task(service.search("q2", top_k=1))  # costs nothing, and is let in
        await asyncio.sleep(0.01)
        index.gate.set()
        await asyncio.gather(first, *callers, same)
        assert service.counters.refused == 1
        await service.close()

    run(scenario)


def test_a_caller_whose_time_is_over_is_told_and_its_query_is_not_searched_for() -> None:
    index = EchoIndex(gated="prepare")

    async def scenario() -> None:
        service = SearchService(index)
        first = asyncio.create_task(service.search("first", top_k=1))
        await asyncio.sleep(0.01)
        with pytest.raises(SearchTimeoutError, match=r"no answer within 0\.02 s"):
            await service.search("late", top_k=1, timeout_s=0.02)
        patient = asyncio.create_task(service.search("shared", top_k=1))
        with pytest.raises(SearchTimeoutError):
            await service.search("shared", top_k=1, timeout_s=0.02)
        index.gate.set()
        assert tuple(await patient) == answer_to("shared", 1)
        await first
        assert index.batches == [["first"], ["shared"]]
        assert (service.counters.timed_out, service.counters.abandoned) == (2, 1)
        await service.close()

    run(scenario)


def test_callers_that_have_gone_take_no_room() -> None:
    index = EchoIndex(gated="prepare")

    async def scenario() -> None:
        service = SearchService(index, settings=ServiceSettings(max_waiting=2))
        first = asyncio.create_task(service.search("first", top_k=1))
        await asyncio.sleep(0.01)
        gone = [asyncio.create_task(service.search(f"gone {i}", top_k=1)) for i in range(2)]
        await asyncio.sleep(0.01)
        for task in gone:
            task.cancel()
        await asyncio.sleep(0.01)
        # One of those that were given up is wanted again, together with a new one.
        callers = asyncio.create_task(service.search_many(["gone 1", "new"], top_k=1))
        await asyncio.sleep(0.01)
        index.gate.set()
        assert [tuple(found) for found in await callers] == [answer_to("gone 1", 1), answer_to("new", 1)]
        await first
        assert sorted(index.batches[1]) == ["gone 1", "new"]
        await service.close()

    run(scenario)


def test_an_end_finishes_what_was_accepted_and_takes_nothing_more() -> None:
    index = EchoIndex(gated="find")

    async def scenario() -> None:
        service = SearchService(index, settings=ServiceSettings(max_batch=2))
        callers = [asyncio.create_task(service.search(f"q{i}", top_k=1)) for i in range(9)]
        await asyncio.sleep(0.01)
        ending = asyncio.create_task(service.close())
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="ends and takes no more"):
            await service.search("late", top_k=1)
        assert not index.is_closed
        index.gate.set()
        assert [tuple(p) for p in await asyncio.gather(*callers)] == [answer_to(f"q{i}", 1) for i in range(9)]
        await ending
        assert index.is_closed

    run(scenario)


def test_an_index_with_too_few_results_is_an_error_and_not_another_callers_answer() -> None:
    class ForgetfulIndex(EchoIndex):
        def prepare(self, queries: Sequence[str]) -> list[tuple[str, int]]:
            return super().prepare(queries)[1:]

    class ShortIndex(EchoIndex):
        def find(self, prepared: Sequence[tuple[str, int]], *, top_k: int) -> list[tuple[Passage, ...]]:
            return super().find(prepared, top_k=top_k)[1:]

    async def scenario() -> None:
        for index, told in ((ShortIndex(), "found 0 results for 1"), (ForgetfulIndex(), "prepared 0 of 1")):
            service = SearchService(index)
            for _ in range(3):
                with pytest.raises(AssertionError, match=told):
                    await service.search("q", top_k=1)
            await service.close()

    run(scenario)
