"""A thousand malformed, huge and hostile requests, and a kill under load: no 500, nothing hangs, memory stays flat."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from free_ports import free_ports
from own_server import await_health, served

from rexrag.retrieval.bm25 import BM25Retriever, build_bm25
from rexrag.retrieval.http import HttpRetriever

NUM_REQUESTS = 1000
ANSWER_S = 20.0
MAX_GROWTH_MB = 48
"""A gigabyte of requests passes through: what is kept of them would show."""
LIMITS = ("--max-queries", "64", "--max-query-chars", "512", "--max-body-bytes", "262144", "--deadline", "10")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    rows = [{"id": str(i), "title": f"Town {i}", "text": f"Town {i} lies in land {i % 7}."} for i in range(300)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_bm25(folder / "corpus.jsonl", folder / "index")
    return folder / "index"


def letters(rng: random.Random, length: int) -> str:
    alphabet = ["a", "town", " ", "\x00", "\ud800", "\udfff", "\u202e", "𝔘", "é", '"', "\\", "{", "<search>", "\n", "0"]
    return "".join(rng.choices(alphabet, k=length))


def value(rng: random.Random, depth: int = 0) -> object:
    """Any JSON value, and some that are none."""
    kind = rng.randrange(9 if depth < 4 else 7)
    if kind == 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {letters(rng, 3): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    plain = [None, True, float("nan"), float("inf"), -1, 10**40, letters(rng, rng.randrange(30))]
    return plain[kind]


def request_body(rng: random.Random) -> bytes:
    """The body of a request that is wrong in some way, or right."""
    queries = [letters(rng, rng.randrange(40)) for _ in range(rng.randrange(1, 8))]
    good: dict[str, object] = {"queries": queries, "topk": rng.choice([1, 3, 100, 100.0, None])}
    good["return_scores"] = rng.choice([True, False, None, 0, 1])
    way = rng.randrange(12)
    if way == 0:
        return json.dumps(good).encode()
    if way == 1:
        good[rng.choice(list(good))] = value(rng)
    elif way == 2:
        good["queries"] = [value(rng) for _ in range(3)]
    elif way == 3:
        good["queries"] = ["x"] * rng.choice([64, 65, 5000])
    elif way == 4:
        good["queries"] = ["y" * rng.choice([512, 513, 100_000])]
    elif way == 5:
        return json.dumps(value(rng)).encode()
    elif way == 6:
        return b"[" * rng.choice([10, 1_000, 100_000]) + b"]" * rng.randrange(3)
    elif way == 7:
        return b'{"a":' * rng.choice([10, 1_000, 40_000]) + b"1"
    elif way == 8:
        return rng.randbytes(rng.choice([0, 1, 100, 100_000]))
    elif way == 9:
        return b" " * rng.choice([262_144, 262_145, 2_000_000])
    elif way == 10:
        text = json.dumps(good, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return text[: rng.randrange(len(text))]
    return json.dumps(good).encode(rng.choice(["utf-8", "utf-16", "utf-32"]))


def headers(rng: random.Random) -> dict[str, str]:
    kind = rng.choice(
        ["application/json"] * 8 + ["application/json; charset=latin-1", "text/html", "", "\x7f;;=", "a" * 4000]
    )
    return {"Content-Type": kind, **rng.choice([{}, {}, {}, {"X-Many": "x" * 8000}, {"Authorization": "Bearer x"}])}


def raw_bytes(rng: random.Random) -> bytes:
    """What is hardly HTTP, or stops in the middle of it."""
    head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return rng.choice(
        [
            b"",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET / HTTP/9.9\r\n\r\n",
            rng.randbytes(300) + b"\r\n\r\n",
            b"GET /" + b"a" * 200_000,
            head + b"Content-Length: -5\r\n\r\n",
            head + b"Content-Length: 99999999999999999999\r\n\r\n",
            head + b"Content-Length: 100\r\n\r\n{",
            head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n{}",
            head + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFF\r\n{",
            head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            head + b"Content-Encoding: gzip\r\nContent-Length: 200\r\n\r\n" + gzip.compress(b" " * 100_000)[:200],
            head + b"X: " + b"y" * 100_000,
        ]
    )


def send_raw(port: int, data: bytes) -> int:
    """The status that is answered, 0 for none; the connection is closed as it stands."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as connection:
        answer = b""
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(64)
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.") else 0


def attack(client: httpx.Client, url: str, *, seed: int, num_requests: int) -> Iterator[int]:
    port = int(url.rpartition(":")[2])
    rng = random.Random(seed)
    for number in range(num_requests):
        if number % 10 == 9:
            yield send_raw(port, raw_bytes(rng))
            continue
        path = rng.choice(["/retrieve"] * 12 + ["/", "/retrieve/x", "/%00", "/../etc/passwd", "/health"])
        try:
            yield client.request(
                rng.choice(["POST"] * 12 + ["GET", "PUT", "DELETE", "HEAD", "BREW"]),
                f"{url}{path}",
                content=request_body(rng),
                headers=headers(rng),
            ).status_code
        except (httpx.RemoteProtocolError, httpx.WriteError, httpx.ReadError):
            yield 0  # it was closed on while it was still sending


def test_no_request_breaks_hangs_or_fills_the_server(index: Path) -> None:
    with served(index, *LIMITS) as (url, process), httpx.Client(trust_env=False, timeout=ANSWER_S) as client:
        memory = psutil.Process(process.pid).memory_info
        list(attack(client, url, seed=1, num_requests=NUM_REQUESTS // 4))
        before = memory().rss
        statuses = Counter(attack(client, url, seed=2, num_requests=NUM_REQUESTS))
        grown_mb = (memory().rss - before) / 2**20
        good = client.post(f"{url}/retrieve", json={"queries": ["town 7"], "topk": 1}).json()
        assert good["result"][0][0]["contents"].startswith('"Town 7"')
    assert statuses.total() == NUM_REQUESTS
    assert not {status for status in statuses if status >= 500}, statuses
    assert {200, 400, 404, 405, 413, 415, 422} <= set(statuses), statuses
    assert grown_mb < MAX_GROWTH_MB, f"{grown_mb:.0f} MB more"


def test_slow_and_silent_clients_hold_up_nobody(index: Path) -> None:
    with (
        served(index, *LIMITS, "--deadline", "5") as (url, _),
        httpx.Client(trust_env=False, timeout=ANSWER_S) as client,
    ):
        port = int(url.rpartition(":")[2])
        with contextlib.ExitStack() as stack:
            for number in range(200):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                if number % 2:
                    connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            began = time.monotonic()
            assert client.post(f"{url}/retrieve", json={"queries": ["town"]}).status_code == 200
            assert time.monotonic() - began < 5, "before one of them is given up"
            connection.settimeout(ANSWER_S)
            assert connection.recv(64).startswith(b"HTTP/1.1 504"), "a body that does not come is not waited for"


def test_a_kill_and_a_restart_under_load_lose_no_search(index: Path) -> None:
    num_callers = 64
    own = BM25Retriever(index)

    async def ask(number: int, retriever: HttpRetriever, stop: asyncio.Event) -> int:
        count = 0
        while not stop.is_set():
            query = f"town {(number * 31 + count) % 300} land {count % 7}"
            assert tuple(await retriever.search(query, top_k=3)) == tuple(await own.search(query, top_k=3))
            count += 1
        return count

    (port,) = free_ports(1)

    async def scenario(url: str, stack: contextlib.ExitStack, kill: contextlib.ExitStack) -> None:
        retriever = HttpRetriever(url, batch_size=4, timeout_s=20.0, max_retries=6)
        stop = asyncio.Event()
        callers = [asyncio.create_task(ask(number, retriever, stop)) for number in range(num_callers)]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(kill.close)
        while not retriever.state().is_down:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)
        await asyncio.to_thread(stack.enter_context, served(index, port=port))
        while retriever.state().is_down:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        stop.set()
        counts = await asyncio.gather(*callers)
        assert min(counts) >= 1
        assert retriever.state().outages >= 1
        assert retriever.state().outage_s > 0.5
        await retriever.close()

    with contextlib.ExitStack() as stack, contextlib.ExitStack() as kill:
        url, _ = kill.enter_context(served(index, port=port))
        await_health(url)
        asyncio.run(asyncio.wait_for(scenario(url, stack, kill), 300))
