"""The breaker in virtual time, and outages of a back end waited for in a little real time."""

from __future__ import annotations

import asyncio
import logging
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.retrieval import backoff
from rexrag.retrieval.breaker import Breaker
from rexrag.retrieval.outages import Outages

EVENTS = st.lists(st.tuples(st.booleans(), st.floats(0.0, 50.0, allow_subnormal=False)), max_size=60)


@given(events=EVENTS, max_failures=st.integers(1, 5))
def test_it_is_open_from_the_nth_failure_in_a_row_to_the_next_success(
    events: list[tuple[bool, float]], max_failures: int
) -> None:
    breaker = Breaker(max_failures=max_failures)
    now, in_a_row, outages, open_s = 0.0, 0, 0, 0.0
    for is_success, pause_s in events:
        was_open = in_a_row >= max_failures
        now += pause_s
        open_s += pause_s if was_open else 0.0
        assert breaker.is_open is was_open
        assert breaker.outage_s(now) == pytest.approx(open_s)
        if is_success:
            lasted_s = breaker.succeeded(now)
            assert (lasted_s is not None) is was_open
            in_a_row = 0
        else:
            in_a_row += 1
            assert breaker.failed(now) is (in_a_row == max_failures)
            outages += in_a_row == max_failures
        assert breaker.outages == outages


def test_probes_back_off_with_jitter_and_begin_anew_with_each_outage() -> None:
    bounds: list[float] = []

    def jitter(bound_s: float) -> float:
        bounds.append(bound_s)
        return bound_s / 2

    breaker = Breaker(max_failures=1, jitter=jitter)
    for _ in range(2):
        assert breaker.failed(0.0)
        pauses = [breaker.next_pause_s() for _ in range(8)]
        assert bounds == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
        assert pauses == [bound / 2 for bound in bounds]
        bounds.clear()
        breaker.succeeded(1.0)
    drawn = Breaker(max_failures=1)
    drawn.failed(0.0)
    assert len({drawn.next_pause_s() for _ in range(20)}) == 20


def test_without_a_bound_it_never_opens() -> None:
    breaker = Breaker(max_failures=None)
    assert not any(breaker.failed(float(now)) for now in range(1000))


def test_those_who_wait_are_let_go_together_and_one_probe_at_a_time_asks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 0.02)
    asked, at_once = [0.0], [0]

    async def probe() -> None:
        at_once[0] += 1
        assert at_once[0] == 1
        await asyncio.sleep(0.005)
        at_once[0] -= 1
        asked.append(time.monotonic())
        if len(asked) < 5:
            raise ConnectionError("refused")

    async def scenario() -> None:
        outages = Outages(
            "the server",
            breaker=Breaker(max_failures=2),
            probe=probe,
            is_silence=lambda error: isinstance(error, ConnectionError),
        )
        assert await outages.wait(until=0.0), "it is up: nobody waits"
        for _ in range(4):
            outages.failed(ConnectionError("refused"), began=time.monotonic())
        impatient = asyncio.create_task(outages.wait(until=time.monotonic() + 0.001))
        patient = [asyncio.create_task(outages.wait(until=time.monotonic() + 10)) for _ in range(20)]
        assert not await impatient
        assert all(await asyncio.gather(*patient))
        assert (outages.is_open, outages.outages, len(asked)) == (False, 1, 5)
        assert 0.02 < outages.outage_s < 5
        await outages.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    first, second = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert first == "the server does not answer: searches wait, and no new questions are begun (refused)"
    assert re.match(r"the server answers again, after \d+\.\d", second)


def test_an_outage_soon_after_another_is_probed_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe of the first still sleeps when a search that was under way is answered, and the next ones are not."""
    monkeypatch.setattr(backoff, "FIRST_S", 10.0)

    async def scenario() -> None:
        outages = Outages(
            "x", breaker=Breaker(max_failures=1), probe=lambda: asyncio.sleep(60), is_silence=lambda _: True
        )
        before = asyncio.all_tasks()
        for _ in range(3):
            outages.failed(ConnectionError(), began=time.monotonic())
            await asyncio.sleep(0)
            assert len(asyncio.all_tasks()) == len(before) + 1
            outages.succeeded(began=0.0)
        await outages.close()
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_failure_of_a_call_older_than_one_that_was_answered_opens_nothing() -> None:
    async def scenario() -> None:
        outages = Outages(
            "x", breaker=Breaker(max_failures=2), probe=lambda: asyncio.sleep(60), is_silence=lambda _: True
        )
        outages.succeeded(began=5.0)
        states = []
        for began in (4.0, 4.5, 4.9, 5.0, 6.0):
            outages.failed(ConnectionError(), began=began)
            states.append(outages.is_open)
        assert states == [False, False, False, False, True]
        await outages.close()

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_an_end_in_an_outage_leaves_no_probe_behind() -> None:
    async def scenario() -> None:
        outages = Outages(
            "x", breaker=Breaker(max_failures=1), probe=lambda: asyncio.sleep(60), is_silence=lambda _: True
        )
        before = asyncio.all_tasks()
        outages.failed(ConnectionError(), began=0.0)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == len(before) + 1
        await outages.close()
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(scenario(), 10))
