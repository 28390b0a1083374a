"""Searches of a rollout actor at a server that runs already: one query a request, and those that wait together.

    python benchmarks/retrieval_client.py [--passages 100000] [--batches 1 4 16 64] [--at-once 64] [--seconds 10]
                                          [--work DIR] [--out FILE]

The server is Search-R1's as `retrieval.py` rebuilds it; corpus, vectors and encoder are its, too. As many searches as
an actor has episodes are under way at once, through the client that runs use (`retriever.kind = "http"`), each followed
by the next; no query comes twice. Client and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from machine import commit, machine
from retrieval import TOP_K, make_index, query_of, running

from rexrag.retrieval.http import HttpRetriever


@dataclass(frozen=True, kw_only=True)
class Load:
    """What came of searches with at most so many queries a request."""

    batch_size: int
    at_once: int
    queries: int
    qps: float
    p50_ms: float
    p99_ms: float


async def search_for(seconds: float, *, url: str, batch_size: int, at_once: int) -> list[float]:
    """Seconds of each search that began within that time."""
    retriever = HttpRetriever(url, timeout_s=120.0, max_retries=0, batch_size=batch_size)
    taken: list[float] = []
    until = time.monotonic() + seconds

    async def episode(number: int) -> None:
        rng = random.Random(f"{batch_size} {number}")
        while time.monotonic() < until:
            query = query_of(rng)
            began = time.monotonic()
            assert len(await retriever.search(query, top_k=TOP_K)) == TOP_K
            taken.append(time.monotonic() - began)

    await asyncio.gather(*(episode(number) for number in range(at_once)))
    await retriever.close()
    return taken


def measure(url: str, *, batch_size: int, at_once: int, seconds: float) -> Load:
    asyncio.run(search_for(min(2.0, seconds / 2), url=url, batch_size=batch_size, at_once=at_once))
    began = time.monotonic()
    taken = asyncio.run(search_for(seconds, url=url, batch_size=batch_size, at_once=at_once))
    wall_s = time.monotonic() - began
    return Load(
        batch_size=batch_size,
        at_once=at_once,
        queries=len(taken),
        qps=round(len(taken) / wall_s, 1),
        p50_ms=round(1000 * float(np.quantile(taken, 0.5)), 1),
        p99_ms=round(1000 * float(np.quantile(taken, 0.99)), 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--port", type=int, default=18_800)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retrieval_client.json")
    words = parser.parse_args()
    work = words.work or Path(mkdtemp(prefix="retrieval-"))
    work.mkdir(parents=True, exist_ok=True)
    began_on = machine()
    folder = make_index(work, num_passages=words.passages, dimension=384, num_layers=6, precision="fp32")
    with running("one per call", folder, port=words.port, threads=os.cpu_count() or 1):
        url = f"http://127.0.0.1:{words.port}"
        loads = [measure(url, batch_size=size, at_once=words.at_once, seconds=words.seconds) for size in words.batches]
    report = {
        "commit": commit(),
        "machine": began_on | {"load_at_end": round(os.getloadavg()[0], 2)},
        "passages": words.passages,
        "dimension": 384,
        "seconds": words.seconds,
        "loads": [asdict(load) for load in loads],
    }
    words.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["loads"], indent=1))


if __name__ == "__main__":
    main()
