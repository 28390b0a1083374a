"""The search server: Search-R1's API as its clients use it, limits, health, metrics, and how it ends."""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from batch_indexes import EchoIndex
from own_server import served, serving, start_server
from prometheus_client.parser import text_string_to_metric_families
from waiting import wait_until

from rexrag.commands.serve import serve_index
from rexrag.errors import ConfigError, UserError
from rexrag.retrieval.bm25 import BM25Index, BM25Retriever, build_bm25
from rexrag.retrieval.http import HttpRetriever
from rexrag.retrieval.limits import Limits
from rexrag.retrieval.server import ServerSettings, bind, is_loopback
from rexrag.types import Passage

ROWS = [
    {"id": "a", "contents": '"Oyem"\nOyem is a city in Gabon.'},
    {"id": "b", "contents": '"Currency of Gabon"\nThe currency of Gabon is the CFA franc.'},
    {"id": "c", "contents": "A single line about Gabon"},
    {"id": "d", "title": 'The "Big" Apple', "text": "A city.\nOf two lines."},
]
LIMITS = Limits(max_body_bytes=4096, max_queries=8, max_query_chars=100, max_top_k=50, default_top_k=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    build_bm25(root / "corpus.jsonl", root / "index")
    return root / "index"


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(BM25Index(folder), settings=ServerSettings(limits=LIMITS)) as url:
        yield url


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


def post(client: httpx.Client, url: str, **body: object) -> httpx.Response:
    return client.post(f"{url}/retrieve", content=json.dumps(body), headers={"Content-Type": "application/json"})


def test_a_connection_is_kept_and_answered_at_once(client: httpx.Client, url: str) -> None:
    seconds = []
    for number in range(300):
        began = time.monotonic()
        post(client, url, queries=[f"Gabon {number}"])
        seconds.append(time.monotonic() - began)
        # Of a new connection the first packets are acknowledged at once in any case.
        if min(seconds[15:], default=1.0) < 0.035:
            return
    assert min(seconds[15:]) < 0.035, "small packets do not wait for each other's acknowledgement"


def test_what_a_client_of_search_r1_sends_and_reads(client: httpx.Client, url: str) -> None:
    payload = {"queries": ["city Oyem", "currency"], "topk": 3, "return_scores": True}
    results = client.post(f"{url}/retrieve", json=payload).json()["result"]
    shown = []
    for documents in results:
        reference = ""
        for index, item in enumerate(documents):
            content = item["document"]["contents"]
            title = content.split("\n")[0]
            text = "\n".join(content.split("\n")[1:])
            reference += f"Doc {index + 1}(Title: {title}) {text}\n"
        shown.append(reference)
    assert shown[0].startswith('Doc 1(Title: "Oyem") Oyem is a city in Gabon.\n')
    assert shown[1] == 'Doc 1(Title: "Currency of Gabon") The currency of Gabon is the CFA franc.\n'
    assert all(isinstance(item["score"], float) for documents in results for item in documents)


def test_without_scores_and_with_the_default_number(client: httpx.Client, url: str) -> None:
    for body in ({"queries": ["Gabon"]}, {"queries": ["Gabon"], "return_scores": False, "topk": None}):
        [documents] = post(client, url, **body).json()["result"]
        assert sorted(document["id"] for document in documents) == ["a", "b", "c"]
        assert {document["id"]: document["contents"] for document in documents}["b"] == ROWS[1]["contents"]


def test_more_than_the_corpus_has_and_nothing_found(client: httpx.Client, url: str) -> None:
    assert [len(found) for found in post(client, url, queries=["Gabon", "zzz", ""], topk=50).json()["result"]] == [
        3, 0, 0
    ]  # fmt: skip
    assert post(client, url, queries=[]).json() == {"result": []}


def test_its_passages_are_those_of_the_index(folder: Path, url: str) -> None:
    async def both() -> None:
        own, remote = BM25Retriever(folder), HttpRetriever(url, batch_size=4, timeout_s=5, max_retries=0)
        for query in ("city Gabon", "two lines", "big apple", "\ud800 Oyem", "nothing"):
            found: Sequence[Passage] = await remote.search(query, top_k=4)
            assert tuple(found) == tuple(await own.search(query, top_k=4))
        await own.close()
        await remote.close()

    asyncio.run(both())
    HttpRetriever(url, batch_size=4, timeout_s=5, max_retries=0).check(top_k=1)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, '"queries": expected a list of strings, got nothing'),
        ({"queries": "Gabon"}, '"queries": expected a list'),
        ({"queries": ["a", None]}, r'"queries"\[1\]: expected a string, got nothing'),
        ({"queries": ["a"] * 9}, '"queries": at most 8 at once, got 9; send them in parts'),
        ({"queries": ["x" * 101]}, r'"queries"\[0\]: at most 100 characters, got 101'),
        ({"queries": ["a"], "topk": 0}, '"topk": expected a whole number from 1 to 50, got 0'),
        ({"queries": ["a"], "topk": 51}, '"topk": .* from 1 to 50, got 51'),
        ({"queries": ["a"], "topk": 1.5}, '"topk": .*got 1.5'),
        ({"queries": ["a"], "topk": True}, '"topk": .*got True'),
        ({"queries": ["a"], "topk": float("nan")}, '"topk": .*got nan'),
        ({"queries": ["a"], "topk": float("inf")}, '"topk": .*got inf'),
        ({"queries": ["a"], "topk": "3"}, '"topk": .*got '),
        ({"queries": ["a"], "return_scores": "yes"}, '"return_scores": expected true or false'),
    ],
)
def test_limits_and_forms_are_named(client: httpx.Client, url: str, body: dict[str, object], told: str) -> None:
    answer = post(client, url, **body)
    assert answer.status_code == 422
    assert re.search(told, answer.json()["detail"]), answer.json()


def test_bodies_that_are_no_requests(client: httpx.Client, url: str) -> None:
    def send(content: bytes, **headers: str) -> int:
        sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        return client.post(f"{url}/retrieve", content=content, headers=sent).status_code

    good = json.dumps({"queries": ["Gabon"]}).encode()
    assert send(good) == send(good, Content_Type="application/json; charset=utf-8") == 200
    assert send(json.dumps({"queries": ["Gabon"]}).encode("utf-16")) == 200
    assert send(b'{"queries": ["\\ud800"]}') == 200
    assert [send(body) for body in (b"", b"{", b"\xff\xff", b"[" * 3000, b"9" * 4000)] == [400, 400, 400, 400, 422]
    assert send(b'{"queries": [' + b" " * 5000) == 413
    assert send(good, Content_Type="text/plain") == send(good, Content_Type="multipart/form-data; boundary=x") == 415
    assert send(gzip.compress(b" " * 50_000_000), Content_Encoding="gzip") == 415
    assert client.get(f"{url}/retrieve").status_code == 405
    assert client.post(f"{url}/elsewhere", content=b"{}").status_code == 404


def test_a_body_without_end_is_not_held_beyond_the_limit(client: httpx.Client, url: str) -> None:
    sent: list[int] = []

    def endless() -> Iterator[bytes]:
        while len(sent) < 20_000:
            sent.append(1)
            yield b" " * 1024

    answer = client.post(f"{url}/retrieve", content=endless(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["detail"][:34]) == (413, "the body has more than 4096 bytes;")


def test_health_is_good_once_a_search_was_answered() -> None:
    index = EchoIndex(gated="find")
    with serving(index, warm=False) as url, httpx.Client(trust_env=False) as client:
        until = time.monotonic() + 10
        while True:
            try:
                answer = client.get(f"{url}/health")
                break
            except httpx.TransportError:
                assert time.monotonic() < until
        assert (answer.status_code, answer.json()["status"]) == (503, "warming up")
        index.gate.set()
        while (answer := client.get(f"{url}/health")).status_code != 200:
            assert time.monotonic() < until
        assert answer.json() == {"status": "ok", "passages": 3}
    assert index.is_closed


def test_an_index_that_breaks_is_told_by_health_and_fails_its_query_alone(caplog: pytest.LogCaptureFixture) -> None:
    with serving(EchoIndex()) as url, httpx.Client(trust_env=False) as client:
        answer = post(client, url, queries=["bad search"])
        assert answer.status_code == 500
        assert "index lost" in answer.json()["detail"]
        assert post(client, url, queries=["good"]).status_code == 200

    class Broken(EchoIndex):
        def prepare(self, queries: Sequence[str]) -> list[tuple[str, int]]:
            raise LookupError("no encoder")

    with serving(Broken(), warm=False) as url, httpx.Client(trust_env=False) as client:
        until = time.monotonic() + 10
        while "broken" not in (answer := client.get(f"{url}/health")).text:
            assert time.monotonic() < until
        assert answer.status_code == 503


def test_metrics_are_those_of_prometheus(client: httpx.Client) -> None:
    with serving(EchoIndex()) as url:
        before = samples_of(client, url)
        post(client, url, queries=["x", "y", "x"])
        post(client, url, queries=["x"])
        post(client, url, queries=1)
        after = samples_of(client, url)

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert gained("rexrag_search_requests_total") == 4
    assert gained("rexrag_search_searched_total") == gained("rexrag_search_batch_size_sum") == 2
    assert gained("rexrag_search_coalesced_total") == gained("rexrag_search_cached_total") == 1
    assert gained("rexrag_search_batch_size_bucket le=2") == gained("rexrag_search_batch_size_count") == 1
    assert gained("rexrag_http_responses_total status=200") == 2
    assert gained("rexrag_http_responses_total status=422") == 1
    assert gained("rexrag_http_request_seconds_count") == 3
    assert after["rexrag_index_passages"] == 3
    assert after["process_resident_memory_bytes"] > 0


def samples_of(client: httpx.Client, url: str) -> dict[str, float]:
    samples = {}
    for family in text_string_to_metric_families(client.get(f"{url}/metrics").text):
        for sample in family.samples:
            labels = (f"{key}={value.removesuffix('.0')}" for key, value in sample.labels.items())
            samples[" ".join([sample.name, *labels])] = sample.value
    return samples


def test_a_token_is_asked_for_everywhere_but_at_health(client: httpx.Client) -> None:
    with serving(EchoIndex(), settings=ServerSettings(token="s3cret")) as url:
        for header in (None, "s3cret", "Bearer", "Bearer wrong", "Basic s3cret", "Bearer s3cret2", "Bearer \xe9"):
            headers = [] if header is None else [(b"Authorization", header.encode("latin-1"))]
            for method, path in (("POST", "retrieve"), ("GET", "metrics")):
                answer = client.request(method, f"{url}/{path}", content=b"{}", headers=headers)
                assert (answer.status_code, answer.headers.get("WWW-Authenticate")) == (401, "Bearer"), header
        good = {"Authorization": "bearer s3cret"}
        assert client.post(f"{url}/retrieve", json={"queries": ["q"]}, headers=good).status_code == 200
        assert client.get(f"{url}/metrics", headers=good).status_code == 200
        assert client.get(f"{url}/health").status_code == 200


def test_a_full_server_says_when_to_come_back_and_a_late_answer_is_a_504(client: httpx.Client) -> None:
    class Slow(EchoIndex):
        slow = False

        def find(self, prepared: Sequence[tuple[str, int]], *, top_k: int) -> list[tuple[Passage, ...]]:
            if self.slow:
                searching.set()
                assert self.gate.wait(60)
            return super().find(prepared, top_k=top_k)

    searching = threading.Event()
    index = Slow()
    limits = Limits(max_queries=2)
    with serving(index, settings=ServerSettings(limits=limits, max_waiting=2, deadline_s=6.0)) as url:
        assert post(client, url, queries=["warm"]).status_code == 200
        index.slow = True
        statuses: list[int] = []

        def ask(number: int) -> None:
            statuses.append(post(client, url, queries=[f"q{number}"]).status_code)

        def is_waiting(number: int) -> bool:
            return samples_of(client, url)["rexrag_search_waiting"] == number

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for number, thread in enumerate(threads):
            thread.start()
            assert searching.wait(60)
            wait_until(partial(is_waiting, number))
        answer = post(client, url, queries=["one", "two", "more"][:2])
        assert (answer.status_code, int(answer.headers["Retry-After"])) == (429, 1)
        assert "is full" in answer.json()["detail"]
        for thread in threads:
            thread.join()
        assert statuses == [504] * 3
        assert "rexrag_search_timed_out_total 3.0" in client.get(f"{url}/metrics").text
        index.gate.set()
        assert post(client, url, queries=["q9"]).status_code == 200


def test_a_stop_answers_what_was_accepted(folder: Path) -> None:
    with served(folder) as (url, process), httpx.Client(trust_env=False, timeout=20) as client:
        statuses: list[int] = []

        def ask(number: int) -> None:
            queries = [f"Gabon city {number} {i}" for i in range(200)]
            statuses.append(post(client, url, queries=queries).status_code)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: samples_of(client, url)["rexrag_search_requests_total"] >= 4 * 200)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(20) == 0
        assert statuses == [200] * 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"folder": Path("none")}, r"none: no index there .*make one with `rexrag index build`"),
        ({}, r"--port \d+: cannot be listened at \(Address already in use\)"),
        ({"host": "no such host"}, r"--host no such host --port \d+: cannot be listened at"),
        ({"host": "203.0.113.7"}, r"cannot be listened at \(Cannot assign requested address\)"),
        ({"token_file": Path("none")}, r"--token-file = none: cannot be read \(No such file"),
        ({"token_file": Path("blank")}, r"--token-file = blank: must hold one word"),
        pytest.param(
            {"gpu": True},
            "--gpu: torch sees no GPU; leave it out, or install torch for CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ({"top_k": 200}, r"--topk 200: must be at most --max-topk \(100\)"),
    ],
)
def test_what_cannot_be_served_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    Path("blank").write_text(" \n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = 0 if "folder" in options else taken.getsockname()[1]
        with pytest.raises(UserError, match=told):
            serve_index(**{"folder": folder, "port": port, **options})


def test_packages_that_are_not_installed_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    with pytest.raises(ConfigError, match=r"needs uvicorn, not installed here; .*pip install 'rexrag\[retrieval\]'"):
        serve_index(folder)


def test_an_address_that_others_reach_without_a_token_is_warned_of(folder: Path) -> None:
    assert is_loopback(bind("127.0.0.1", 0))
    assert is_loopback(bind("::1", 0))
    assert not is_loopback(bind("0.0.0.0", 0))
    process = start_server(folder, "--host", "0.0.0.0", "--port", "0")
    assert process.stderr is not None
    try:
        told = [process.stderr.readline(), process.stderr.readline()]
        process.terminate()  # maybe before it serves: that ends it, too
        process.communicate(timeout=20)
    finally:
        process.kill()
    assert told[0].startswith("warning: --host 0.0.0.0: whoever reaches this machine can search the corpus")
    assert re.match(r".*index: 4 passages at http://0\.0\.0\.0:\d+/retrieve", told[1])
