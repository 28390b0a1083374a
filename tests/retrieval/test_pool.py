"""`rexrag.retrieval.pool`: queries spread over members, and none lost when some of them die."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from batch_indexes import answer_to
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.errors import RetrievalIndexError, RetrieverError
from rexrag.retrieval import backoff
from rexrag.retrieval import pool as pool_module
from rexrag.retrieval.attempts import RetryableError
from rexrag.retrieval.pool import Member, PoolRetriever
from rexrag.types import Passage


class Echo:
    """A member that answers after a while, or is dead."""

    def __init__(self, *, seconds: float = 0.001) -> None:
        self.seconds = seconds
        self.is_dead = False
        self.num_asked = 0
        self.at_once = 0
        self.most_at_once = 0

    async def search(self, query: str, top_k: int) -> Sequence[Passage]:
        self.num_asked += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.at_once -= 1
        if self.is_dead:
            raise RetryableError("died")
        return answer_to(query, top_k)


def pool_of(*members: Member, timeout_s: float = 5.0, max_retries: int = 5) -> PoolRetriever:
    return PoolRetriever(members, timeout_s=timeout_s, max_retries=max_retries)


def test_queries_go_where_the_fewest_are_outstanding() -> None:
    async def scenario() -> None:
        members = [Echo(), Echo()]
        pool = pool_of(*members, timeout_s=60.0)
        await asyncio.gather(*(pool.search(str(number), top_k=1) for number in range(8)))
        assert [member.most_at_once for member in members] == [4, 4]

        for member in members:
            member.seconds = 60.0
        held = asyncio.create_task(pool.search("held", top_k=1))
        await asyncio.sleep(0)
        while not any(member.at_once for member in members):
            await asyncio.sleep(0.001)
        idle, busy = sorted(members, key=lambda member: member.at_once)
        idle.seconds = 0.001
        asked = (idle.num_asked, busy.num_asked)
        for number in range(30):
            assert tuple(await pool.search(str(number), top_k=2)) == answer_to(str(number), 2)
        assert (idle.num_asked, busy.num_asked) == (asked[0] + 30, asked[1])
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        await pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


@settings(deadline=None, max_examples=15)
@given(num_members=st.integers(2, 4), deaths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=3))
def test_no_query_is_lost_while_a_member_lives(num_members: int, deaths: list[tuple[int, int]]) -> None:
    async def scenario() -> None:
        members = [Echo() for _ in range(num_members)]
        pool = pool_of(*members)
        answers = [asyncio.create_task(pool.search(str(i), top_k=1)) for i in range(20)]
        for which, rounds in deaths[: num_members - 1]:
            for _ in range(rounds):
                await asyncio.sleep(0)
            members[which % num_members].is_dead = True
            answers += [asyncio.create_task(pool.search(str(len(answers) + i), top_k=1)) for i in range(10)]
        found = await asyncio.gather(*answers)
        assert [tuple(passages) for passages in found] == [answer_to(str(i), 1) for i in range(len(found))]
        assert not pool.state().is_down
        await pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_pool_that_is_gone_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 0.02)
    one, other = Echo(), Echo()

    async def scenario() -> None:
        pool = pool_of(one, other)
        one.is_dead = other.is_dead = True
        searches = [asyncio.create_task(pool.search(str(i), top_k=1)) for i in range(32)]
        while not pool.state().is_down:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.2)
        other.is_dead = False
        found = await asyncio.gather(*searches)
        assert [tuple(passages) for passages in found] == [answer_to(str(i), 1) for i in range(32)]
        assert pool.state().outages == 1
        await pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize("num_members", [1, 2])
def test_what_dead_members_were_asked_fails_late_and_is_no_outage(num_members: int) -> None:
    """Ray may say that a process died only when its successor has been answering for a while."""

    class Restarted(Echo):
        """The first calls are those of the dead: they fail when they are told to."""

        def __init__(self) -> None:
            super().__init__()
            self.is_back = False
            self.is_told = asyncio.Event()

        async def search(self, query: str, top_k: int) -> Sequence[Passage]:
            if self.is_back:
                return await super().search(query, top_k)
            self.num_asked += 1
            await self.is_told.wait()
            raise RetryableError("died")

    async def scenario() -> None:
        members = [Restarted() for _ in range(num_members)]
        pool = pool_of(*members, max_retries=1)
        lost = [asyncio.create_task(pool.search(f"lost {i}", top_k=1)) for i in range(32)]
        while sum(member.num_asked for member in members) < len(lost):
            await asyncio.sleep(0)
        for member in members:
            member.is_back = True
        await asyncio.gather(*(pool.search(str(i), top_k=1) for i in range(8)))
        for member in members:
            member.is_told.set()
        assert [tuple(passages) for passages in await asyncio.gather(*lost)] == [
            answer_to(f"lost {i}", 1) for i in range(32)
        ]
        assert (pool.state().outages, pool.state().failed) == (0, 0)
        await pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_lone_search_waits_for_a_large_pool_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not use up its attempts at members that say at once that they are gone."""
    monkeypatch.setattr(backoff, "FIRST_S", 0.05)
    members = [Echo() for _ in range(8)]
    for member in members:
        member.is_dead = True

    async def scenario() -> None:
        pool = pool_of(*members, max_retries=2)
        search = asyncio.create_task(pool.search("q", top_k=1))
        while sum(member.num_asked for member in members) < 8:
            await asyncio.sleep(0)
        for member in members:
            member.is_dead = False
        assert tuple(await search) == answer_to("q", 1)
        for member in members:
            member.is_dead = True
        with pytest.raises(RetrieverError, match="failed 3 times"):
            await pool.search("q", top_k=1)
        search = asyncio.create_task(pool.search("r", top_k=1))
        while not pool.state().is_down:  # five attempts in a row have failed
            await asyncio.sleep(0.001)
        for member in members:
            member.is_dead = False
        assert tuple(await search) == answer_to("r", 1)
        await pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_pool_whose_members_all_hang_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 0.001)
    monkeypatch.setattr(pool_module, "_SHUNNED_S", 0.0)

    async def scenario() -> None:
        pool = pool_of(Echo(seconds=60), Echo(seconds=60), timeout_s=0.02, max_retries=0)
        for _ in range(20):
            if pool.state().is_down:
                break
            with pytest.raises(RetrieverError):
                await pool.search("q", top_k=1)
        assert pool.state().is_down
        await pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_member_that_hangs_costs_an_attempt_and_what_ends_a_run_is_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 0.01)  # the second attempt begins in time for one

    class Broken:
        async def search(self, query: str, top_k: int) -> Sequence[Passage]:
            raise RetrievalIndexError("index it again")

    async def scenario() -> None:
        pool = pool_of(Echo(seconds=60), timeout_s=3, max_retries=1)
        with pytest.raises(RetrieverError, match=r"search actors failed 2 times, at last with: no answer within 3 s"):
            await pool.search("q", top_k=1)
        await pool.close()
        pool = pool_of(Broken())
        with pytest.raises(RetrievalIndexError, match="index it again"):
            await pool.search("q", top_k=1)
        await pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
