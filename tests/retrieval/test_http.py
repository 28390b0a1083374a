"""`rexrag.retrieval.http` against real servers: good, failing, hanging, talking nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence

import httpx
import pytest
from free_ports import free_ports
from hypothesis import given, settings
from hypothesis import strategies as st
from search_servers import Answer, Request, passages, serve

from rexrag.errors import ConfigError, QueryRefusedError, RetrieverError, RetrieverSetupError
from rexrag.retrieval import answers, backoff
from rexrag.retrieval.http import HttpRetriever
from rexrag.types import Passage


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 0.01)


def search(
    url: str, *, query: str = "q", top_k: int = 3, timeout_s: float = 5.0, retries: int = 3
) -> Sequence[Passage]:
    async def run() -> Sequence[Passage]:
        retriever = HttpRetriever(url, batch_size=4, timeout_s=timeout_s, max_retries=retries)
        try:
            return await retriever.search(query, top_k=top_k)
        finally:
            await retriever.close()

    return asyncio.run(run())


def unused_url() -> str:
    (port,) = free_ports(1)
    return f"http://127.0.0.1:{port}"


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


@pytest.mark.parametrize("status", [400, 413, 414, 422, 431])
def test_a_refused_query_is_the_models_doing_and_not_tried_again(status: int) -> None:
    with serve(lambda _: (status, b"queries: at most 8 words")) as server:
        with pytest.raises(QueryRefusedError, match=rf"{server.url}/retrieve: status {status} \(queries: at most"):
            search(server.url)
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 204, 401, 403, 404, 405, 410])
def test_no_access_and_no_such_path_are_a_wrong_set_up(status: int) -> None:
    body = b"" if status == 204 else b"<html>\n  <h1>not\nhere</h1>"
    with serve(lambda _: (status, body)) as server:
        with pytest.raises(
            RetrieverSetupError, match=rf"{server.url}/retrieve: status {status} \((<html> <h1>not here)?"
        ):
            search(server.url)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>", b"\xff", b"[" * 50_000, b"[]", b"{}", b'{"result": []}', b'{"result": [[], []]}',
        b'{"result": [null]}',
        b'{"result": [[1]]}', b'{"result": [[{"id": "a"}]]}', b'{"result": [[{"document": 1, "score": 1}]]}',
        b'{"result": [[{"document": {"id": [], "contents": "x"}}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": "x"}, "score": "1"}]]}',
    ],
)  # fmt: skip
def test_another_form_is_an_error_never_an_empty_result(body: bytes) -> None:
    with serve(lambda _: (200, body)) as server, pytest.raises(RetrieverSetupError, match="malformed answer") as error:
        search(server.url)
    assert "status 200" in str(error.value)


def test_plain_texts_are_passages() -> None:
    entries = ['"T"\nx', {"document": '"U"\ny', "score": 2}]
    with serve(lambda _: (200, json.dumps({"result": [entries]}).encode())) as server:
        found = search(server.url)
    assert [(p.title, p.text, p.score) for p in found] == [("T", "x", None), ("U", "y", 2.0)]
    assert all(p.id for p in found)


def test_what_one_passage_lacks_ends_no_run() -> None:
    """Half a character where the server has cut the text, and a score that is no number."""
    body = b'{"result": [[{"document": {"id": "a", "contents": "x \\ud83d"}, "score": NaN}, {"contents": "y"}]]}'
    with serve(lambda _: (200, body)) as server:
        found = search(server.url)
    assert [(p.text, p.score) for p in found] == [("x ?", None), ("y", None)]


def test_a_passage_without_text_is_left_out_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    entries = [
        {"document": {"id": "a", "contents": ""}, "score": 2},
        {"document": {"id": "b", "text": "x"}, "score": 1},
    ]

    async def run(url: str) -> list[Sequence[Passage]]:
        retriever = HttpRetriever(url, batch_size=4, timeout_s=5, max_retries=0)
        found = [await retriever.search("q", top_k=3) for _ in range(2)]
        await retriever.close()
        return found

    with serve(lambda _: (200, json.dumps({"result": [entries]}).encode())) as server:
        assert [[p.id for p in found] for found in asyncio.run(run(server.url))] == [["b"], ["b"]]
    assert [record.getMessage() for record in caplog.records if "without text" in record.getMessage()] == [
        f"{server.url}/retrieve: passages without text are left out, 1 in this answer"
    ]


def test_filler_and_repeats_are_no_passages() -> None:
    documents = [("a", 0.3), ("b", 0.9), ("b", 3.4028234663852886e38), ("b", -3.4028234663852886e38), ("b", 0.8)]
    entries = [{"document": {"id": i, "contents": f"text {i}"}, "score": score} for i, score in documents]
    with serve(lambda _: (200, json.dumps({"result": [entries]}).encode())) as server:
        assert [p.id for p in search(server.url, top_k=5)] == ["a", "b"]
    plain = json.dumps({"result": [[{"id": i, "contents": f"text {i}"} for i, _ in documents]]}).encode()
    with serve(lambda _: (200, plain)) as server:
        assert [p.id for p in search(server.url, top_k=5)] == ["a", "b"]


@pytest.mark.parametrize("status", [307, 308, 302])
def test_a_redirect_on_the_same_server_is_followed_and_remembered(status: int) -> None:
    def answer(request: Request) -> Answer:
        if request.path == "/retrieve":
            return status, b"", {"Location": "/retrieve/"}
        return 200, passages(str(request.body["queries"]))

    async def run(url: str) -> list[Sequence[Passage]]:
        retriever = HttpRetriever(url, batch_size=4, timeout_s=5, max_retries=0)
        found = [await retriever.search(query, top_k=1) for query in "ab"]
        await retriever.close()
        return found

    with serve(answer) as server:
        first, second = asyncio.run(run(server.url))
        assert (first[0].id, second[0].id) == ("['a']", "['b']")
        assert [(r.method, r.path) for r in server.requests] == [
            ("POST", "/retrieve"), ("POST", "/retrieve/"), ("POST", "/retrieve/")
        ]  # fmt: skip


@pytest.mark.parametrize(("location", "told"), [("http://example.org/x", "another server"), ("/retrieve", "redirects")])
def test_other_redirects_are_told(location: str, told: str) -> None:
    with (
        serve(lambda _: (307, b"", {"Location": location})) as server,
        pytest.raises(RetrieverSetupError, match=rf"{server.url}/retrieve: .*{told}"),
    ):
        search(server.url)


@pytest.mark.parametrize(
    ("url", "location", "is_followed"),
    [
        ("https://s/retrieve", "/retrieve/", True),
        ("http://s:8000/retrieve", "https://s/retrieve", True),
        ("https://s/retrieve", "http://s/retrieve", False),
        ("https://s/retrieve", "https://s:8443/retrieve", False),
        ("http://s:8000/retrieve", "http://s:8080/retrieve", False),
        ("http://s/retrieve", "https://t/retrieve", False),
    ],
)
def test_a_redirect_leads_a_query_and_its_token_to_no_other_service(url: str, location: str, is_followed: bool) -> None:
    retriever = HttpRetriever(url, batch_size=4, timeout_s=5, max_retries=0)
    if is_followed:
        assert retriever._redirected(url, location) == str(httpx.URL(url).join(location))
        return
    with pytest.raises(RetrieverSetupError, match="another server"):
        retriever._redirected(url, location)


@contextlib.contextmanager
def closing_server(*answers: bytes) -> Iterator[str]:
    """A server of one answer a connection, which ends where the connection does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    while b'"topk"' not in connection.recv(1 << 16):
                        pass
                    connection.sendall(answer)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join(timeout=30)


def test_an_answer_that_was_cut_off_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 0.01)
    head, zipped = b"HTTP/1.0 200 OK\r\n", gzip.compress(passages("a"))
    whole = head + b"\r\n" + passages("a")
    with closing_server(whole[:-9], whole) as url:
        assert search(url, retries=1)[0].id == "a"
    cut = head + b"Content-Encoding: gzip\r\n\r\n" + zipped[:-9]
    with closing_server(cut, whole) as url:
        assert search(url, retries=1)[0].id == "a"
    with serve(lambda _: (200, passages("a")[:-9])) as server, pytest.raises(RetrieverSetupError, match="malformed"):
        search(server.url)


def test_a_server_that_refuses_so_many_passages_is_told_before_a_run() -> None:
    def answer(request: Request) -> Answer:
        return (422, b"topk is 30, at most 20") if request.body.get("topk", 0) == 30 else (200, passages("a"))

    with serve(answer) as server:
        retriever = HttpRetriever(server.url, batch_size=4, timeout_s=5, max_retries=0)
        retriever.check(top_k=20)
        with pytest.raises(ConfigError, match=r"refuses a query for 30 passages \(env.top_k\).*at most 20"):
            retriever.check(top_k=30)


def test_compressed_answers_are_read() -> None:
    with serve(lambda _: (200, gzip.compress(passages("a")), {"Content-Encoding": "gzip"})) as server:
        assert search(server.url)[0].id == "a"
    with serve(lambda _: (200, zlib.compress(passages("a")), {"Content-Encoding": "deflate"})) as server:
        assert search(server.url)[0].id == "a"


@pytest.mark.parametrize(("body", "encoding"), [(b"x", "br"), (b"not gzip", "gzip")])
def test_compressed_answers_that_cannot_be_read(body: bytes, encoding: str) -> None:
    with (
        serve(lambda _: (200, body, {"Content-Encoding": encoding})) as server,
        pytest.raises(RetrieverSetupError, match=encoding),
    ):
        search(server.url)


@pytest.mark.parametrize("encoding", ["gzip", ""])
def test_an_answer_without_end_is_never_held_whole(encoding: str) -> None:
    huge = b'{"result": [[' + b" " * (80 << 20)
    headers = {"Content-Encoding": encoding} if encoding else {}
    body = gzip.compress(huge, 1) if encoding else huge
    with serve(lambda _: (200, body, headers)) as server:
        tracemalloc.start()
        try:
            with pytest.raises(RetrieverSetupError, match=f"has more than {answers.MAX_BODY_BYTES} bytes"):
                search(server.url)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 4 * answers.MAX_BODY_BYTES


def test_a_long_answer_is_parsed_beside_the_event_loop() -> None:
    entries = [{"document": {"id": str(i), "contents": f"{i} " + "x" * 1000}} for i in range(100)]
    threads: list[str] = []
    parse = answers.parse

    def parse_and_note(value: object, **bounds: int) -> tuple[list[tuple[Passage, ...]], int]:
        threads.append(threading.current_thread().name)
        return parse(value, **bounds)

    with (
        pytest.MonkeyPatch.context() as patch,
        serve(lambda _: (200, json.dumps({"result": [entries]}).encode())) as server,
    ):
        patch.setattr(answers, "parse", parse_and_note)
        assert len(search(server.url, top_k=100)) == 100
    assert "MainThread" not in threads


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
        (parsed,), _ = answers.parse({"result": [entries]}, top_k=3, num_queries=1)
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
        with pytest.raises(RetrieverError, match=r"failed 2 times, at last with: no answer within 3 s"):
            search(server.url, timeout_s=3, retries=1)
        assert 6.0 <= time.monotonic() - start < 60
        with pytest.raises(ConfigError, match="no usable search server"):
            HttpRetriever(server.url, batch_size=4, timeout_s=0.2, max_retries=0).check(top_k=1)


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
            retriever = HttpRetriever(url, batch_size=4, timeout_s=0.3, max_retries=0)
            with pytest.raises(RetrieverError, match=r"no answer within 0\.3 s"):
                await asyncio.wait_for(retriever.search("q", top_k=1), timeout=5)
            await retriever.close()

    asyncio.run(run())


def test_the_whole_wait_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 0.25)
    assert (
        HttpRetriever("http://x", batch_size=4, timeout_s=10, max_retries=5).max_wait_s == 60 + 0.25 + 0.5 + 1 + 2 + 4
    )
    assert HttpRetriever("http://x", batch_size=4, timeout_s=1, max_retries=100).max_wait_s < 101 + 100 * 10


def test_searches_run_at_once() -> None:
    all_there = threading.Barrier(16, timeout=20)

    def answer(request: Request) -> Answer:
        all_there.wait()
        return 200, passages(str(request.body["queries"]))

    async def run(url: str) -> list[Sequence[Passage]]:
        retriever = HttpRetriever(url, batch_size=1, timeout_s=30, max_retries=0)
        results = await asyncio.gather(*(retriever.search(str(i), top_k=1) for i in range(16)))
        await retriever.close()
        return results

    with serve(answer) as server:
        results = asyncio.run(run(server.url))
        assert [r[0].id for r in results] == [f"['{i}']" for i in range(16)]


def test_searches_that_wait_together_travel_together() -> None:
    def answer(request: Request) -> Answer:
        queries = request.body["queries"]
        assert isinstance(queries, list)
        return 200, json.dumps({"result": [json.loads(passages(query))["result"][0] for query in queries]}).encode()

    async def run(url: str) -> None:
        retriever = HttpRetriever(url, batch_size=16, timeout_s=30, max_retries=0)
        results = await asyncio.gather(*(retriever.search(str(i), top_k=1) for i in range(64)))
        assert [r[0].id for r in results] == [str(i) for i in range(64)]
        await retriever.close()

    with serve(answer) as server:
        asyncio.run(run(server.url))
        assert len(server.requests) == 4


@pytest.mark.parametrize("health", [200, 404])
def test_check_asks_health_and_a_query(health: int) -> None:
    with serve(lambda r: (health, b"") if r.path == "/health" else (200, passages("a"))) as server:
        HttpRetriever(server.url, batch_size=4, timeout_s=5, max_retries=0).check(top_k=1)
        assert [r.path for r in server.requests] == ["/health", "/retrieve"]


@pytest.mark.parametrize("status", [404, 422])
def test_check_finds_a_server_of_another_api_behind_good_health(status: int) -> None:
    with (
        serve(lambda r: (200, b"ok") if r.path == "/health" else (status, b"no such")) as server,
        pytest.raises(ConfigError, match=rf"/retrieve: status {status} \(no such\)"),
    ):
        HttpRetriever(server.url, batch_size=4, timeout_s=5, max_retries=0).check(top_k=1)


def test_check_has_the_time_out_and_the_retries_of_the_retriever() -> None:
    def answer(request: Request) -> Answer:
        if request.path == "/health":
            return 404, b""
        return (502, b"<html>\n Bad gateway") if len(server.requests) < 4 else (200, passages("a"))

    with serve(answer) as server:
        HttpRetriever(server.url, batch_size=4, timeout_s=5, max_retries=2).check(top_k=1)
    with (
        serve(lambda r: (404, b"") if r.path == "/health" else (502, b"<html>\n Bad gateway")) as server,
        pytest.raises(ConfigError, match=r"failed 3 times, at last with: status 502 \(<html> Bad gateway\)"),
    ):
        HttpRetriever(server.url, batch_size=4, timeout_s=5, max_retries=2).check(top_k=1)


def test_check_works_inside_an_event_loop() -> None:
    async def run(url: str) -> Sequence[Passage]:
        retriever = HttpRetriever(url, batch_size=4, timeout_s=5, max_retries=0)
        retriever.check(top_k=1)
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
        HttpRetriever(server.url, batch_size=4, timeout_s=5, max_retries=0).check(top_k=1)


def test_check_of_an_unreachable_address() -> None:
    url = unused_url()
    with pytest.raises(ConfigError, match=f"{url}: no usable search server there .*; start it, or correct"):
        HttpRetriever(url, batch_size=4, timeout_s=5, max_retries=0).check(top_k=1)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://x:port", "http://[::1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match=r"retriever\.url"):
        HttpRetriever(url, batch_size=4, timeout_s=1, max_retries=0)


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", unused_url())
    monkeypatch.setenv("http_proxy", unused_url())
    with serve(lambda _: (200, passages("a"))) as server:
        HttpRetriever(server.url, batch_size=4, timeout_s=5, max_retries=0).check(top_k=1)
        assert len(search(server.url, retries=0)) == 1


def test_an_outage_is_waited_for_without_using_up_attempts() -> None:
    is_down = threading.Event()

    def answer(request: Request) -> Answer:
        if is_down.is_set():
            return 503, b"restarting"
        queries = request.body["queries"]
        assert isinstance(queries, list)
        return 200, passages(queries[0])

    async def run(url: str) -> int:
        retriever = HttpRetriever(url, batch_size=4, timeout_s=10.0, max_retries=5)
        await retriever.search("first", top_k=1)
        is_down.set()
        searches = [asyncio.create_task(retriever.search(str(i), top_k=1)) for i in range(64)]
        while not retriever.state().is_down:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.3)
        before = len(server.requests)
        await asyncio.sleep(1.0)
        num_probes = len(server.requests) - before
        assert not any(search.done() for search in searches)
        is_down.clear()
        found = await asyncio.gather(*searches)
        assert [result[0].id for result in found] == [str(i) for i in range(64)]
        state = retriever.state()
        assert (state.is_down, state.outages) == (False, 1)
        assert 1.2 < state.outage_s < 10
        assert 0 < state.retried <= 5 * 64
        await retriever.close()
        return num_probes

    with serve(answer) as server:
        assert asyncio.run(run(server.url)) <= 64, "one probe at a time, with pauses between"


def test_an_outage_that_outlasts_a_search_is_an_error_within_its_bound() -> None:
    async def run(url: str) -> None:
        retriever = HttpRetriever(url, batch_size=4, timeout_s=2, max_retries=6)
        began = time.monotonic()
        with pytest.raises(RetrieverError, match=r"did not answer for .* s, at last with: status 503 \(down\)"):
            await retriever.search("q", top_k=1)
        assert 1.0 < time.monotonic() - began < retriever.max_wait_s + 1.0
        await retriever.close()

    with serve(lambda _: (503, b"down")) as server:
        asyncio.run(run(server.url))


def test_a_busy_server_is_asked_again_when_it_says_and_is_not_down() -> None:
    times: list[float] = []

    def answer(request: Request) -> Answer:
        times.append(time.monotonic())
        return (429, b"full", {"Retry-After": "1"}) if len(times) < 2 else (200, passages("a"))

    with serve(answer) as server:
        assert search(server.url)[0].id == "a"
    assert 1.0 <= times[1] - times[0] < 3

    async def run(url: str) -> None:
        retriever = HttpRetriever(url, batch_size=4, timeout_s=1, max_retries=8)
        with pytest.raises(RetrieverError, match="failed 9 times"):
            await retriever.search("q", top_k=1)
        assert retriever.state().outages == 0
        await retriever.close()

    with serve(lambda _: (429, b"full", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})) as server:
        asyncio.run(run(server.url))


def test_a_token_is_sent() -> None:
    async def run(url: str) -> None:
        retriever = HttpRetriever(url, batch_size=4, timeout_s=20, max_retries=0, token="s3cret")
        retriever.check(top_k=1)
        await retriever.search("q", top_k=1)
        await retriever.close()

    seen: list[str | None] = []

    def answer(request: Request) -> Answer:
        seen.append(request.headers.get("Authorization"))
        return 200, passages("a")

    with serve(answer) as server:
        asyncio.run(run(server.url))
    assert seen == ["Bearer s3cret"] * 3
