"""The search server against one query per call, as Search-R1's server answers: same index, corpus, encoder, machine.

    python benchmarks/retrieval.py [--passages 100000 ...] [--dimension 384] [--clients 1 16 128] [--seconds 10]
                                   [--threads N] [--precision fp32] [--work DIR] [--out FILE]

Corpus, vectors and encoder are made on the spot from a seed: passages of a hundred words, unit vectors, and a BERT of
the shape of MiniLM (six layers, 384 wide) with random weights, which cost what real ones cost. The peer is Search-R1's
server in a few lines: a FastAPI endpoint that encodes and searches for one request at a time, in FastAPI's threads.

Clients each send one query over a connection that is kept and, once it is answered, the next; no query comes twice. The
clients run on the same machine, so they take some of its cores from both servers. CPU per query and memory are those of
the server's process. `raw` is FAISS on vectors that are ready, 64 at a time, without server, clients and encoder.

With several sizes of corpus the law is fitted: CPU seconds of a query = fixed + slope × passages × dimension.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final, Literal

import faiss
import httpx
import numpy as np
import psutil
import torch
import uvicorn
from fastapi import FastAPI
from machine import commit, machine
from pydantic import BaseModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rexrag.data.corpus import contents_of
from rexrag.retrieval.dense import VECTORS_NAME, DenseIndex
from rexrag.retrieval.dense_build import SILENT, describe_encoder, take_passages
from rexrag.retrieval.encoder import Encoder, Vectors
from rexrag.retrieval.faiss_files import empty_flat, write_flat
from rexrag.retrieval.manifest import DenseEntry, Manifest, describe_files, new_index_folder, write_manifest

NUM_WORDS: Final = 20_000
PASSAGE_WORDS: Final = 100
QUERY_WORDS: Final = 10
TOP_K: Final = 3
RAW_BATCH: Final = 64
GOALS: Final = {
    "qps_ratio_1": (">=", 0.9),
    "qps_ratio_16": (">=", 2.5),
    "qps_ratio_128": (">=", 4.0),
    "cpu_ratio_128": ("<=", 1 / 8),
    "p99_ratio_128": ("<=", 0.3),
    "share_of_raw_128": (">=", 0.8),
}
LARGE: Final = {"passages": 21_000_000, "dimension": 768, "qps": 1000}
Name = Literal["rexrag", "one per call"]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a server did under so many clients. `cpu_s`, of its process, is per query; `memory_mb` is resident."""

    server: Name
    clients: int
    queries: int
    qps: float
    p50_ms: float
    p99_ms: float
    cpu_s: float
    memory_mb: float


def word(number: int) -> str:
    return f"w{number}"


def make_encoder(folder: Path, *, dimension: int, num_layers: int) -> Path:
    """A BERT over invented words; mean pooling."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    vocabulary |= {word(i): i + 4 for i in range(NUM_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=256,
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=dimension,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, dimension // 32),
        intermediate_size=4 * dimension,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    fast.save_pretrained(folder)
    return folder


def make_corpus(path: Path, *, num_passages: int) -> Path:
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for start in range(0, num_passages, 10_000):
            rows = rng.integers(0, NUM_WORDS, size=(min(10_000, num_passages - start), PASSAGE_WORDS))
            for number, row in enumerate(rows.tolist(), start=start):
                contents = f'"Title {number}"\n' + " ".join(map(word, row))
                file.write(json.dumps({"id": str(number), "contents": contents}) + "\n")
    return path


def unit_vectors(num_vectors: int, dimension: int) -> Iterator[Vectors]:
    rng = np.random.default_rng(1)
    for start in range(0, num_vectors, 10_000):
        block = rng.standard_normal((min(10_000, num_vectors - start), dimension), dtype=np.float32)
        yield block / np.linalg.norm(block, axis=1, keepdims=True)


def make_index(work: Path, *, num_passages: int, dimension: int, num_layers: int, precision: str) -> Path:
    """An index folder as `rexrag index build` makes one, but for its vectors, which no passage is encoded for."""
    out = work / f"index-{num_passages}-{dimension}-{precision}"
    if (out / "index.json").exists():
        return out
    folder = make_encoder(work / f"encoder-{dimension}", dimension=dimension, num_layers=num_layers)
    encoder = Encoder.load(folder)
    corpus = make_corpus(work / f"corpus-{num_passages}.jsonl", num_passages=num_passages)
    limits = np.stack([np.full(dimension, -0.3), np.full(dimension, 0.3)]).astype(np.float32)
    with new_index_folder(out, made_from=[]) as building:
        passages, described, _ = take_passages(corpus, building, out=out, progress=SILENT)
        passages.close()
        empty = empty_flat(dimension, precision, limits=limits if precision == "int8" else None)  # type: ignore[arg-type]
        write_flat(building / VECTORS_NAME, empty, unit_vectors(num_passages, dimension), count=num_passages)
        dense = DenseEntry.model_validate(
            {
                "encoder": describe_encoder(encoder),
                "metric": "inner_product",
                "precision": precision,
                "recall": None,
            }
        )
        write_manifest(
            building,
            Manifest(kind="flat", dense=dense, passages=num_passages, corpus=described, files=describe_files(building)),
        )
    return out


class _QueryRequest(BaseModel):
    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


def serve_peer(folder: Path, *, port: int) -> None:
    """Search-R1's server: each request by itself, in a thread of FastAPI's; the queries of one request together."""
    index = DenseIndex(folder)  # for its encoder and its passages
    vectors = faiss.read_index(str(folder / VECTORS_NAME), faiss.IO_FLAG_MMAP)
    passages = index._corpus
    app = FastAPI()

    @app.post("/retrieve")
    def retrieve(request: _QueryRequest) -> dict[str, Any]:
        results = []
        scores, rows = vectors.search(index.encoder.queries(request.queries), request.topk or TOP_K)
        for of_query, found in zip(scores.tolist(), rows.tolist(), strict=True):
            documents = [{"id": p.id, "contents": contents_of(p)} for p in map(passages.get, found)]
            results.append(
                [{"document": d, "score": s} for d, s in zip(documents, of_query, strict=True)]
                if request.return_scores
                else documents
            )
        return {"result": results}

    @app.get("/health")
    def health() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


@contextmanager
def running(name: Name, folder: Path, *, port: int, threads: int) -> Iterator[psutil.Process]:
    words = [__file__, "--peer", str(folder), "--port", str(port)]
    if name == "rexrag":
        words = ["-m", "rexrag", "index", "serve", str(folder), "--port", str(port), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([sys.executable, *words], env=environment, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 300
        while time.monotonic() < until:
            assert process.poll() is None, f"{name}: the server ended with {process.returncode}"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def query_of(rng: random.Random) -> str:
    return " ".join(word(rng.randrange(NUM_WORDS)) for _ in range(QUERY_WORDS))


def request_of(rng: random.Random) -> bytes:
    body = json.dumps({"queries": [query_of(rng)], "topk": TOP_K, "return_scores": True}).encode()
    head = (
        f"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _client(port: int, *, seed: int, until: float, seconds: list[float]) -> None:
    rng = random.Random(seed)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.monotonic() < until:
        request = request_of(rng)
        began = time.monotonic()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head[:20], head
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
        seconds.append(time.monotonic() - began)
    writer.close()


def measure(name: Name, process: psutil.Process, *, port: int, clients: int, seconds: float) -> Load:
    async def run(lasting_s: float, seed: int) -> list[float]:
        taken: list[float] = []
        until = time.monotonic() + lasting_s
        await asyncio.gather(
            *(_client(port, seed=seed * 10_000 + number, until=until, seconds=taken) for number in range(clients))
        )
        return taken

    asyncio.run(run(min(2.0, seconds / 2), seed=2 * clients))
    before, began = process.cpu_times(), time.monotonic()
    taken = asyncio.run(run(seconds, seed=2 * clients + 1))
    wall_s, after = time.monotonic() - began, process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    return Load(
        server=name,
        clients=clients,
        queries=len(taken),
        qps=round(len(taken) / wall_s, 1),
        p50_ms=round(1000 * float(np.quantile(taken, 0.5)), 2),
        p99_ms=round(1000 * float(np.quantile(taken, 0.99)), 2),
        cpu_s=round(cpu_s / len(taken), 6),
        memory_mb=round(process.memory_info().rss / 2**20, 1),
    )


def measure_raw(folder: Path, *, threads: int, seconds: float) -> dict[str, float]:
    """FAISS alone, and with the encoder before it: queries per second, a batch at a time."""
    index = DenseIndex(folder, num_threads=threads)
    rng = random.Random(0)
    queries = [query_of(rng) for _ in range(RAW_BATCH)]
    vectors = np.stack(index.prepare(queries))
    index._searcher.search(vectors, TOP_K)  # now the file is in memory
    rates = {}
    for name, with_encoder in (("search_qps", False), ("encode_and_search_qps", True)):
        count, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            asked = np.stack(index.prepare(queries)) if with_encoder else vectors
            index._searcher.search(asked, TOP_K)
            count += RAW_BATCH
        rates[name] = round(count / (time.monotonic() - began), 1)
    index.close()
    return rates


def compare(loads: Sequence[Load], raw: dict[str, float]) -> dict[str, float]:
    """Ours by the peer's, for each number of clients."""
    found = {(load.server, load.clients): load for load in loads}
    ratios: dict[str, float] = {}
    for clients in sorted({load.clients for load in loads}):
        ours, peers = found["rexrag", clients], found["one per call", clients]
        ratios[f"qps_ratio_{clients}"] = round(ours.qps / peers.qps, 3)
        ratios[f"cpu_ratio_{clients}"] = round(ours.cpu_s / peers.cpu_s, 4)
        ratios[f"p99_ratio_{clients}"] = round(ours.p99_ms / peers.p99_ms, 3)
        ratios[f"share_of_raw_{clients}"] = round(ours.qps / raw["search_qps"], 3)
        ratios[f"share_of_encode_and_search_{clients}"] = round(ours.qps / raw["encode_and_search_qps"], 3)
    return ratios


def goals_of(ratios: dict[str, float]) -> dict[str, bool]:
    return {
        name: ratios[name] >= bound if sign == ">=" else ratios[name] <= bound
        for name, (sign, bound) in GOALS.items()
        if name in ratios
    }


def law(corpora: Sequence[dict[str, Any]]) -> dict[str, object] | None:
    """CPU of a query by the size of the corpus, and what a large one needs by it. Two sizes at least."""
    if len(corpora) < 2:
        return None
    most = max(load["clients"] for load in corpora[0]["loads"])
    sizes = [corpus["passages"] * corpus["dimension"] for corpus in corpora]
    seconds = [
        load["cpu_s"]
        for corpus in corpora
        for load in corpus["loads"]
        if load["server"] == "rexrag" and load["clients"] == most
    ]
    slope, fixed = np.polyfit(sizes, seconds, 1)
    size = LARGE["passages"] * LARGE["dimension"]
    cpu_s = float(fixed + slope * size)
    return {
        "clients": most,
        "fixed_cpu_s": float(fixed),
        "cpu_s_per_number": float(slope),
        "large": LARGE,
        "large_cpu_s": cpu_s,
        "large_cores": cpu_s * LARGE["qps"],
        "large_gb": {"fp32": 4 * size / 2**30, "fp16": 2 * size / 2**30, "int8": size / 2**30},
    }


def benchmark(arguments: argparse.Namespace, *, num_passages: int, work: Path) -> dict[str, Any]:
    folder = make_index(
        work,
        num_passages=num_passages,
        dimension=arguments.dimension,
        num_layers=arguments.layers,
        precision=arguments.precision,
    )
    loads: list[Load] = []
    servers: tuple[Name, ...] = ("one per call", "rexrag")
    for port, name in enumerate(servers, start=arguments.port):
        with running(name, folder, port=port, threads=arguments.threads) as process:
            for clients in arguments.clients:
                load = measure(name, process, port=port, clients=clients, seconds=arguments.seconds)
                print(json.dumps(asdict(load)), flush=True)
                loads.append(load)
    raw = measure_raw(folder, threads=arguments.threads, seconds=arguments.seconds)
    ratios = compare(loads, raw)
    return {
        "passages": num_passages,
        "dimension": arguments.dimension,
        "precision": arguments.precision,
        "loads": [asdict(load) for load in loads],
        "raw": raw,
        "ratios": ratios,
        "goals": goals_of(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[100_000])
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--port", type=int, default=18_700)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retrieval.json")
    parser.add_argument("--peer", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer is not None:
        serve_peer(arguments.peer, port=arguments.port)
        return
    work = arguments.work or Path(mkdtemp(prefix="retrieval-"))
    work.mkdir(parents=True, exist_ok=True)
    began_on = machine()
    corpora = [benchmark(arguments, num_passages=count, work=work) for count in arguments.passages]
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": began_on | {"faiss": faiss.__version__, "load_at_end": round(os.getloadavg()[0], 2)},
        "threads": arguments.threads,
        "seconds": arguments.seconds,
        "corpora": corpora,
        "law": law(corpora),
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for corpus in corpora:
        print(json.dumps({"passages": corpus["passages"], **corpus["ratios"], "goals": corpus["goals"]}, indent=1))


if __name__ == "__main__":
    main()
