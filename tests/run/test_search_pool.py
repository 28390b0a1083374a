"""The search actors of a run on a real Ray: killed under load, they come back and no question is lost."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rexrag.errors import Interrupted, RetrievalIndexError
from rexrag.processes import Share
from rexrag.retrieval.bm25 import BM25Retriever, build_bm25
from rexrag.retrieval.open import open_retriever
from rexrag.retrieval.search_actor import SearchActor
from rexrag.retrieval.settings import RetrieverSettings, SearchActorSettings
from rexrag.run.remote import call, result_of
from rexrag.run.search_pool import SearchPool
from rexrag.run.signals import StopSignal
from rexrag.types import Passage

pytestmark = pytest.mark.system
SHARE = Share(threads=1, cpus=0.25)
NUM_ACTORS = 2


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    rows = [{"id": str(i), "title": f"Town {i}", "text": f"Town {i} lies in land {i % 7}."} for i in range(200)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_bm25(folder / "corpus.jsonl", folder / "index")
    return folder / "index"


@pytest.fixture
def pool(ray_session: None, index: Path) -> Iterator[SearchPool]:
    settings = SearchActorSettings(path=index, encoder=None, num_gpus=0.0, num_threads=1, log_file=None)
    pool = SearchPool(settings, num_actors=NUM_ACTORS, share=SHARE)
    pool.await_ready(timeout_s=120.0, stop=StopSignal())
    yield pool
    pool.stop()


def retriever_settings(index: Path) -> RetrieverSettings:
    return RetrieverSettings(
        kind="ray",
        path=index,
        encoder=None,
        url=None,
        token_file=None,
        timeout_s=10.0,
        max_retries=5,
        batch_size=4,
        num_actors=NUM_ACTORS,
    )


def pids_of(pool: SearchPool) -> list[int]:
    return [result_of(call(actor, SearchActor.ready), what="the test") for actor in pool.actors]


@pytest.mark.parametrize("num_killed", [1, NUM_ACTORS])
def test_no_search_is_lost_when_actors_are_killed(
    pool: SearchPool, index: Path, num_killed: int, caplog: pytest.LogCaptureFixture
) -> None:
    num_callers, seconds = 64, 4.0
    victims = pids_of(pool)[:num_killed]
    own = BM25Retriever(index)

    async def ask(number: int, retriever: object, until: float) -> int:
        count = 0
        while time.monotonic() < until:
            query = f"town {(number * 31 + count) % 200} land {count % 7}"
            found: Sequence[Passage] = await retriever.search(query, top_k=3)  # type: ignore[attr-defined]
            assert tuple(found) == tuple(await own.search(query, top_k=3))
            count += 1
        return count

    async def scenario() -> list[int]:
        retriever = open_retriever(retriever_settings(index))
        await retriever.search("town", top_k=1)
        until = time.monotonic() + seconds
        callers = [asyncio.create_task(ask(number, retriever, until)) for number in range(num_callers)]
        await asyncio.sleep(0.5)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        counts = await asyncio.gather(*callers)
        assert retriever.state().retried > 0, "the kill came under load"
        # Whether Ray tells of the dead before their successors answer is chance: then there is no outage to see.
        assert retriever.state().outages <= (num_killed == NUM_ACTORS)
        await retriever.close()
        return counts

    counts = asyncio.run(asyncio.wait_for(scenario(), 120))
    assert min(counts) >= 1
    until = time.monotonic() + 60
    with caplog.at_level(logging.WARNING, logger="rexrag"):
        while pool.num_replaced < num_killed and time.monotonic() < until:
            pool.look()
            time.sleep(0.1)
    assert pool.num_replaced == num_killed
    assert "search actor search-0 died and is back" in caplog.text
    assert not set(victims) & set(pids_of(pool))


def test_an_actor_that_cannot_open_its_index_says_why(ray_session: None, tmp_path: Path) -> None:
    settings = SearchActorSettings(path=tmp_path, encoder=None, num_gpus=0.0, num_threads=1, log_file=None)
    pool = SearchPool(settings, num_actors=1, share=SHARE)
    with pytest.raises(RetrievalIndexError, match="no index there"):
        pool.await_ready(timeout_s=120.0, stop=StopSignal())
    pool.stop()


def test_a_stop_is_heard_while_the_pool_waits_for_a_place(ray_session: None, index: Path) -> None:
    settings = SearchActorSettings(path=index, encoder=None, num_gpus=0.0, num_threads=1, log_file=None)
    pool = SearchPool(settings, num_actors=1, share=Share(threads=1, cpus=1000.0))
    stop = StopSignal()
    stop.ask("SIGTERM")
    try:
        with pytest.raises(Interrupted, match="stopped by SIGTERM: the run waits for search-0 to open its index"):
            pool.await_ready(timeout_s=120.0, stop=stop)
    finally:
        pool.stop()
