"""`rexrag.retrieval.batching`: searches that wait at the same time, in one request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from batch_indexes import answer_to

from rexrag.errors import QueryRefusedError, RetrieverError, RetrieverSetupError
from rexrag.retrieval.answer_cache import Passages
from rexrag.retrieval.attempts import RetryableError
from rexrag.retrieval.batching import Batcher


class Server:
    """Answers after a while, or as `fail` says of a request's queries."""

    def __init__(self, *, seconds: float = 0.01, fail: Callable[[Sequence[str]], None] = lambda _: None) -> None:
        self.requests: list[list[str]] = []
        self.at_once = 0
        self.most_at_once = 0
        self._seconds = seconds
        self._fail = fail

    async def __call__(self, queries: Sequence[str], top_k: int) -> Sequence[Passages]:
        self.requests.append(list(queries))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self._seconds)
            self._fail(queries)
        finally:
            self.at_once -= 1
        return [answer_to(query, top_k) for query in queries]

    @property
    def sizes(self) -> list[int]:
        return [len(queries) for queries in self.requests]


def batcher_of(send: Server, *, max_batch: int, name: str = "s", timeout_s: float = 20.0) -> Batcher:
    return Batcher(name, send=send, max_batch=max_batch, timeout_s=timeout_s)


async def ask(batcher: Batcher, names: Sequence[str], *, top_k: int = 2) -> list[Passages | BaseException]:
    return await asyncio.gather(*(batcher.ask(name, top_k) for name in names), return_exceptions=True)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


NAMES = [f"q{number}" for number in range(64)]


def test_those_that_ask_at_once_travel_together() -> None:
    async def scenario() -> None:
        server = Server()
        batcher = batcher_of(server, max_batch=40)
        assert await ask(batcher, NAMES) == [answer_to(name, 2) for name in NAMES]
        assert await ask(batcher, NAMES[:3]) == [answer_to(name, 2) for name in NAMES[:3]]
        assert (server.sizes, server.most_at_once) == ([40, 24, 3], 1)
        await batcher.close()

    run(scenario())


def test_while_a_server_is_busy_others_gather() -> None:
    async def scenario() -> None:
        server = Server(seconds=0.05)
        batcher = batcher_of(server, max_batch=10)
        asked = []
        for name in NAMES:
            asked.append(asyncio.create_task(batcher.ask(name, 1)))
            await asyncio.sleep(0)
        assert await asyncio.gather(*asked) == [answer_to(name, 1) for name in NAMES]
        assert server.sizes[0] == 1, "whoever comes first does not wait"
        assert 4 < max(server.sizes) <= 10
        assert server.most_at_once == 1
        await batcher.close()

    run(scenario())


def test_requests_for_other_numbers_of_passages_are_others() -> None:
    async def scenario() -> None:
        server = Server()
        batcher = batcher_of(server, max_batch=32)
        wanted = [1 + number // 20 for number in range(60)]
        found = await asyncio.gather(*(batcher.ask(name, k) for name, k in zip(NAMES, wanted, strict=False)))
        assert [len(passages) for passages in found] == wanted
        await batcher.close()

    run(scenario())


def test_one_by_one_each_goes_at_once() -> None:
    async def scenario() -> None:
        server = Server()
        batcher = batcher_of(server, max_batch=1)
        assert await ask(batcher, NAMES) == [answer_to(name, 2) for name in NAMES]
        assert (server.sizes, server.most_at_once) == ([1] * 64, 64)
        await batcher.close()

    run(scenario())


def refuse_bad(queries: Sequence[str]) -> None:
    if "bad" in queries:
        raise QueryRefusedError("status 422")


def test_a_query_that_is_refused_is_refused_alone() -> None:
    async def scenario() -> None:
        server = Server(fail=refuse_bad)
        batcher = batcher_of(server, max_batch=32)
        *others, bad = await ask(batcher, [*NAMES[:19], "bad"])
        assert others == [answer_to(name, 2) for name in NAMES[:19]]
        assert isinstance(bad, QueryRefusedError)
        assert server.sizes == [20] + [1] * 20
        assert len(await ask(batcher, NAMES[:20])) == 20
        assert server.sizes[21:] == [20], "it takes several"
        await batcher.close()

    run(scenario())


@pytest.mark.parametrize(
    "error",
    [
        QueryRefusedError("status 422"),
        RetrieverSetupError("malformed answer"),
        RetryableError("status 500", is_broken=True),
    ],
)
def test_a_server_for_single_queries_is_found_out(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def fail(queries: Sequence[str]) -> None:
        if len(queries) > 1:
            raise error

    async def scenario() -> None:
        server = Server(fail=fail)
        batcher = batcher_of(server, name="the server", max_batch=32)
        for _ in range(2):
            assert await ask(batcher, NAMES) == [answer_to(name, 2) for name in NAMES]
        assert server.sizes[-64:] == [1] * 64
        await batcher.close()

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert [record.getMessage() for record in caplog.records] == [
        "the server takes one query a request, and gets no more at a time"
    ]


def test_no_server_of_this_kind_is_told_as_ever() -> None:
    def fail(_: Sequence[str]) -> None:
        raise RetrieverSetupError("malformed answer")

    async def scenario() -> None:
        batcher = batcher_of(Server(fail=fail), max_batch=32)
        assert all(isinstance(error, RetrieverSetupError) for error in await ask(batcher, NAMES))
        await batcher.close()

    run(scenario())


def test_a_failure_of_a_request_counts_once_and_slow_answers_make_smaller_ones() -> None:
    def fail(queries: Sequence[str]) -> None:
        if len(queries) > 4:
            raise RetryableError("no answer within 1 s", is_late=True)

    async def scenario() -> None:
        server = Server(fail=fail)
        batcher = batcher_of(server, max_batch=32)
        failures = [error for error in await ask(batcher, NAMES) if isinstance(error, RetryableError)]
        assert [len(failures), sum(not error.is_told for error in failures)] == [32 + 16 + 8, 3]
        rounds = 1
        while any(isinstance(one, BaseException) for one in await ask(batcher, NAMES)):
            rounds += 1
        assert rounds < 5
        assert max(server.sizes[-16:]) == 4
        await batcher.close()

    run(scenario())


def test_batches_grow_again_once_answers_come_in_time() -> None:
    slow = True

    def fail(queries: Sequence[str]) -> None:
        if slow and len(queries) > 1:
            raise RetryableError("no answer within 1 s", is_late=True)

    async def scenario() -> None:
        nonlocal slow
        server = Server(seconds=0.0, fail=fail)
        batcher = batcher_of(server, max_batch=16)
        while 1 not in server.sizes:
            await ask(batcher, NAMES)
        slow = False
        for _ in range(40):
            await ask(batcher, NAMES)
        assert server.sizes[-4:] == [16] * 4
        await batcher.close()

    run(scenario())


def test_a_server_that_hangs_is_left_by_all_in_time() -> None:
    async def scenario() -> None:
        batcher = batcher_of(Server(seconds=60.0), max_batch=4, timeout_s=0.05)
        began = time.monotonic()
        failures = [error for error in await ask(batcher, NAMES) if isinstance(error, RetryableError)]
        assert time.monotonic() - began < 10
        assert len(failures) == 64
        assert all(error.is_late and not error.is_told for error in failures)
        await batcher.close()

    run(scenario())


def test_who_waits_when_it_is_closed_is_told() -> None:
    async def scenario() -> None:
        batcher = batcher_of(Server(seconds=60.0), max_batch=4)
        waiting = asyncio.create_task(ask(batcher, NAMES))
        await asyncio.sleep(0.01)
        await batcher.close()
        outcomes = [*await waiting, *await ask(batcher, ["late"])]
        assert len(outcomes) == 65
        assert all(isinstance(error, RetrieverError) and "is asked no more" in str(error) for error in outcomes)

    run(scenario())


def test_searches_that_are_given_up_are_not_asked() -> None:
    async def scenario() -> None:
        server = Server(seconds=0.05)
        batcher = batcher_of(server, max_batch=2)
        asked = [asyncio.create_task(batcher.ask(name, 1)) for name in NAMES]
        await asyncio.sleep(0.01)
        for task in asked[8:62]:
            task.cancel()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert found[62:] == [answer_to(name, 1) for name in NAMES[62:]]
        assert sum(server.sizes) == 10
        before = asyncio.all_tasks()
        asyncio.create_task(batcher.ask("late", 1)).cancel()
        await asyncio.sleep(0)
        await batcher.close()
        assert asyncio.all_tasks() == before

    run(scenario())
