"""`rexrag.retrieval.http` against real servers: good, failing, hanging, talking nonsense."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_servers import Answer, Request, passages, serve

from rexrag.errors import ConfigError, RetrieverError
from rexrag.retrieval import backoff
from rexrag.retrieval.http import HttpRetriever
from rexrag.retrieval.http import _parse as parse_answer
from rexrag.types import Passage


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 0.01)


def search(
    url: str, *, query: str = "q", top_k: int = 3, timeout_s: float = 5.0, retries: int = 3
) -> Sequence[Passage]:
    async def run() -> Sequence[Passage]:
        retriever = HttpRetriever(url, timeout_s=timeout_s, max_retries=retries)
        try:
            return await retriever.search(query, top_k=top_k)
        finally:
            await retriever.close()

    return asyncio.run(run())


def unused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_both_forms_of_an_answer() -> None:
    with_score = b'{"result": [[{"document": {"id": "a", "contents": "\\"T\\"\\nx", "url": "u"}, "score": 2}]]}'
    without = b'{"result": [[{"id": "a", "contents": "\\"T\\"\\nx"}]]}'
    bodies = [with_score, without]
    with serve(lambda _: (200, bodies[len(server.requests) - 1])) as server:
        assert search(server.url) == (Passage(id="a", title="T", text="x", score=2.0),)
        assert search(server.url) == (Passage(id="a", title="T", text="x"),)
        assert [(r.method, r.path) for r in server.requests] == [("POST", "/retrieve")] * 2
        assert server.requests[0].body == {"queries": ["q"], "topk": 3, "return_scores": True}


def test_other_documents_of_the_field() -> None:
    entries = [
        {"document": {"id": 5, "title": "T", "text": "x"}, "score": 1.5},
        {"document": {"contents": "no id"}, "score": 1.0},
        {"document": {"id": "filler", "contents": "x"}, "score": -3.4028234663852886e38},
    ]
    with serve(lambda _: (200, json.dumps({"result": [entries]}).encode())) as server:
        first, second = search(server.url)
        assert (first.id, first.title, first.text) == ("5", "T", "x")
        assert second.text == "no id"
        assert search(server.url)[1].id == second.id != ""


def test_no_passage_is_a_result_and_too_many_are_cut() -> None:
    with serve(lambda _: (200, b'{"result": [[]]}')) as server:
        assert search(server.url) == ()
    with serve(lambda _: (200, passages("a", "b", "c", "d"))) as server:
        assert [p.id for p in search(server.url, top_k=2)] == ["a", "b"]


def test_the_address_may_name_the_path() -> None:
    with serve(lambda _: (200, passages("a"))) as server:
        for url in (server.url + "/", server.url + "/retrieve", f" {server.url}/retrieve/ "):
            assert search(url)[0].id == "a"


def test_half_a_surrogate_pair_is_sent_as_a_question_mark() -> None:
    with serve(lambda _: (200, passages("a"))) as server:
        search(server.url, query="x \ud800 ü")
        assert server.requests[0].body["queries"] == ["x ? ü"]


@pytest.mark.parametrize("failure", [(500, b"no"), (503, b""), (429, b"slow down"), None])
def test_a_passing_failure_is_tried_again(failure: Answer) -> None:
    def answer(request: Request) -> Answer:
        return failure if len(server.requests) < 3 else (200, passages("a"))

    with serve(answer) as server:
        assert [p.id for p in search(server.url)] == ["a"]
        assert len(server.requests) == 3


def test_a_lasting_failure_is_an_error_in_the_end() -> None:
    with serve(lambda _: (500, b"index lost")) as server:
        with pytest.raises(RetrieverError, match=r"/retrieve failed 4 times.*500 \(index lost\)"):
            search(server.url)
        assert len(server.requests) == 4
    with pytest.raises(RetrieverError, match="failed 2 times"):
        search(unused_url(), retries=1)


@pytest.mark.parametrize("status", [400, 404, 422, 301, 204])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    with serve(lambda _: (status, b"" if status == 204 else b"queries: at most 8")) as server:
        with pytest.raises(RetrieverError, match=f"status {status}"):
            search(server.url)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>", b"\xff", b"[" * 50_000, b"[]", b"{}", b'{"result": []}', b'{"result": [[], []]}',
        b'{"result": [null]}',
        b'{"result": [["a"]]}', b'{"result": [[{"id": "a"}]]}', b'{"result": [[{"document": "a", "score": 1}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": ""}}]]}',
        b'{"result": [[{"document": {"id": [], "contents": "x"}}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": "x"}, "score": "1"}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": "x"}, "score": NaN}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": "\\ud800"}, "score": 1}]]}',
    ],
)  # fmt: skip
def test_another_form_is_an_error_never_an_empty_result(body: bytes) -> None:
    with serve(lambda _: (200, body)) as server, pytest.raises(RetrieverError, match="malformed answer"):
        search(server.url)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["result", "document", "id", "contents", "score", "title", "text"]), inner)
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(entries=st.lists(JSON_VALUES, max_size=3))
def test_parsing_gives_usable_passages_or_one_kind_of_error(entries: list[object]) -> None:
    try:
        parsed = parse_answer({"result": [entries]}, top_k=3)
    except ValueError:
        return
    assert len(parsed) <= len(entries)
    assert all(p.id and (p.text or p.title) and (p.score is None or p.score == p.score) for p in parsed)


def test_a_hanging_server_is_left_after_the_time_out() -> None:
    def answer(request: Request) -> Answer:
        request.stopped.wait(30)
        return None

    with serve(answer) as server:
        start = time.monotonic()
        with pytest.raises(RetrieverError, match=r"failed 2 times, at last with: no answer within 0\.2 s"):
            search(server.url, timeout_s=0.2, retries=1)
        assert 0.4 <= time.monotonic() - start < 5
        with pytest.raises(ConfigError, match="no usable search server"):
            HttpRetriever(server.url, timeout_s=0.2, max_retries=0).check()


def test_a_trickling_server_is_left_after_the_time_out() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    async def run() -> None:
        async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
            try:
                while True:
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.05)
            except ConnectionError:
                pass
            finally:
                writer.close()

        async with await asyncio.start_server(trickle, sock=listener):
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            retriever = HttpRetriever(url, timeout_s=0.3, max_retries=0)
            with pytest.raises(RetrieverError, match=r"no answer within 0\.3 s"):
                await asyncio.wait_for(retriever.search("q", top_k=1), timeout=5)
            await retriever.close()

    asyncio.run(run())


def test_the_whole_wait_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 0.25)
    assert HttpRetriever("http://x", timeout_s=10, max_retries=5).max_wait_s == 60 + 0.25 + 0.5 + 1 + 2 + 4
    assert HttpRetriever("http://x", timeout_s=1, max_retries=100).max_wait_s < 101 + 100 * 10


def test_searches_run_at_once() -> None:
    all_there = threading.Barrier(16, timeout=20)

    def answer(request: Request) -> Answer:
        all_there.wait()
        return 200, passages(str(request.body["queries"]))

    async def run(url: str) -> list[Sequence[Passage]]:
        retriever = HttpRetriever(url, timeout_s=30, max_retries=0)
        results = await asyncio.gather(*(retriever.search(str(i), top_k=1) for i in range(16)))
        await retriever.close()
        return results

    with serve(answer) as server:
        results = asyncio.run(run(server.url))
        assert [r[0].id for r in results] == [f"['{i}']" for i in range(16)]


def test_check_asks_health_or_else_a_question() -> None:
    with serve(lambda r: (200, b"ok") if r.path == "/health" else (500, b"")) as server:
        HttpRetriever(server.url, timeout_s=5, max_retries=0).check()
        assert [r.path for r in server.requests] == ["/health"]
    with serve(lambda r: (404, b"") if r.path == "/health" else (200, passages("a"))) as server:
        HttpRetriever(server.url, timeout_s=5, max_retries=0).check()
        assert [r.path for r in server.requests] == ["/health", "/retrieve"]


def test_check_works_inside_an_event_loop() -> None:
    async def run(url: str) -> Sequence[Passage]:
        retriever = HttpRetriever(url, timeout_s=5, max_retries=0)
        retriever.check()
        found = await retriever.search("q", top_k=1)
        await retriever.close()
        return found

    with serve(lambda _: (200, passages("a"))) as server:
        assert len(asyncio.run(run(server.url))) == 1


@pytest.mark.parametrize(
    "answer",
    [lambda r: (503, b"loading"), lambda r: (404, b""), lambda r: (404, b"") if r.method == "GET" else (200, b"{}")],
)
def test_check_refuses_what_is_no_search_server(answer: object) -> None:
    assert callable(answer)
    with serve(answer) as server, pytest.raises(ConfigError, match=rf"retriever\.url = {server.url}: no usable search"):
        HttpRetriever(server.url, timeout_s=5, max_retries=0).check()


def test_check_of_an_unreachable_address() -> None:
    url = unused_url()
    with pytest.raises(ConfigError, match=f"{url}: no usable search server there .*; start it, or correct"):
        HttpRetriever(url, timeout_s=5, max_retries=0).check()


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://x:port", "http://[::1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match=r"retriever\.url"):
        HttpRetriever(url, timeout_s=1, max_retries=0)


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", unused_url())
    monkeypatch.setenv("http_proxy", unused_url())
    with serve(lambda _: (200, passages("a"))) as server:
        HttpRetriever(server.url, timeout_s=5, max_retries=0).check()
        assert len(search(server.url, retries=0)) == 1
