"""Each kind of dense index on the same vectors: recall against brute force, queries a second, bytes; no encoder.

    python benchmarks/indexes.py [--passages 300000] [--dimension 384] [--threads 1] [--work DIR] [--out FILE]

Vectors are made on the spot: a mixture of clusters in 48 dimensions, spread over all of them with some noise, of length
1. `ivf-sq8` is the peer: FAISS's own lists of int8 vectors, with as many lists as `ivf`, and as many of them looked
through as it needs for the same recall.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final, Literal

import faiss
import numpy as np
from machine import origin

from rexrag.retrieval.dense import LISTS_NAME, VECTORS_NAME, open_vectors
from rexrag.retrieval.encoder import Vectors
from rexrag.retrieval.faiss_files import FaissIndex, Precision, empty_flat, write_flat
from rexrag.retrieval.ivf import choose_effort, write_ivf
from rexrag.retrieval.recall import ExactResults
from rexrag.retrieval.search import Searcher
from rexrag.retrieval.vectors import FaissVectors

LATENT: Final = 48
CLUSTERS: Final = 2000
SPREAD: Final = 1.0
NOISE: Final = 0.15
NUM_QUERIES: Final = 512
TOP_K: Final = 3
BATCHES: Final = (1, 64)
MEMORY_BYTES: Final = 4 << 30
BLOCK_ROWS: Final = 10_000
KINDS: Final[tuple[Literal["fp32", "fp16", "int8", "ivf"], ...]] = ("fp32", "fp16", "int8", "ivf")


def make_vectors(count: int, dimension: int, *, rng: np.random.Generator) -> Vectors:
    spread = np.random.default_rng(0)
    centres = spread.standard_normal((CLUSTERS, LATENT))
    onto = spread.standard_normal((LATENT, dimension)) / np.sqrt(LATENT)
    made = np.empty((count, dimension), dtype=np.float32)
    for block in np.array_split(made, -(-count // BLOCK_ROWS)):
        latent = centres[rng.integers(0, CLUSTERS, len(block))] + SPREAD * rng.standard_normal((len(block), LATENT))
        vectors = latent @ onto + NOISE * rng.standard_normal((len(block), dimension))
        block[:] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return made


def measure(name: str, index: FaissIndex, exact: ExactResults, *, num_bytes: int, threads: int) -> dict[str, Any]:
    searcher = Searcher(index, num_threads=threads)
    chosen: dict[str, Any] = {}
    if searcher.num_lists is not None:
        effort = choose_effort(searcher, exact)
        chosen = {"lists": searcher.num_lists, "probes": effort.probes, "candidates": effort.candidates}
    recall = exact.measure(searcher, part=exact.second_half)
    row = {
        "index": name,
        "bytes_a_passage": round(num_bytes / searcher.count, 1),
        **chosen,
        "recall_3": recall.at_3,
        "recall_10": recall.at_10,
    }
    for size in BATCHES:
        row[f"qps_{size}"] = round(speed(searcher, exact.queries, size=size), 1)
    print(json.dumps(row), flush=True)
    return row


def speed(searcher: Searcher, queries: Vectors, *, size: int) -> float:
    """Queries a second in batches of so many, over two seconds after a first batch."""
    searcher.search(queries[:size], TOP_K)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < 2.0:
        start = count % (len(queries) - size + 1)
        searcher.search(queries[start : start + size], TOP_K)
        count += size
    return count / (time.perf_counter() - began)


def lists_of_int8(vectors: Vectors, *, lists: int) -> FaissIndex:
    """FAISS's own."""
    dimension = vectors.shape[1]
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dimension), dimension, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.min_points_per_centroid = 1
    index.train(vectors[:: max(1, len(vectors) // (64 * lists))])
    index.add(vectors)
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=300_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "indexes.json")
    arguments = parser.parse_args()
    head = {**origin(), "faiss": faiss.__version__, "threads": arguments.threads}
    work = arguments.work or Path(mkdtemp(prefix="indexes-"))
    rng = np.random.default_rng(1)
    vectors = make_vectors(arguments.passages, arguments.dimension, rng=rng)
    queries = make_vectors(NUM_QUERIES, arguments.dimension, rng=rng)
    plain = faiss.IndexFlatIP(arguments.dimension)
    plain.add(vectors)
    source = FaissVectors(plain)
    exact = ExactResults(source, queries, block_rows=BLOCK_ROWS)
    limits = np.stack([vectors.min(0), vectors.max(0)])
    for kind in KINDS:  # all before any is measured, which sets the number of threads
        (work / kind).mkdir(parents=True, exist_ok=True)
        precision: Precision = "int8" if kind == "ivf" else kind
        empty = empty_flat(arguments.dimension, precision, limits=limits if precision == "int8" else None)
        write_flat(work / kind / VECTORS_NAME, empty, source.blocks(BLOCK_ROWS), count=source.count)
    lists = write_ivf(
        work / "ivf" / LISTS_NAME, source, memory_bytes=MEMORY_BYTES, use_gpu=False, progress=lambda done: None
    )
    peer = lists_of_int8(vectors, lists=lists)
    rows = []
    for kind in KINDS:
        size = sum(file.stat().st_size for file in (work / kind).iterdir())
        rows.append(measure(kind, open_vectors(work / kind), exact, num_bytes=size, threads=arguments.threads))
    size = arguments.passages * (arguments.dimension + 8)
    rows.append(measure("ivf-sq8", peer, exact, num_bytes=size, threads=arguments.threads))
    ratios = {f"qps_{size}": round(rows[-2][f"qps_{size}"] / rows[-1][f"qps_{size}"], 2) for size in BATCHES}
    report = {**head, "passages": arguments.passages, "dimension": arguments.dimension, "rows": rows}
    arguments.out.write_text(json.dumps({**report, "ivf_over_ivf_sq8": ratios}, indent=1) + "\n")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
