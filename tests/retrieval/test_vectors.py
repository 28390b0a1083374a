"""Vectors on their way into an index: kept over a kill, and never all in memory."""

from __future__ import annotations

import errno
import fcntl
import json
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import faiss
import numpy as np
import pytest
from tiny_encoders import make_encoder, passage_rows, write_rows
from waiting import wait_until

from rexrag.errors import RetrievalIndexError
from rexrag.retrieval.dense_build import DenseSettings, build_dense
from rexrag.retrieval.encoder import Vectors
from rexrag.retrieval.encoder_settings import EncoderSettings
from rexrag.retrieval.faiss_files import FaissIndex, Precision, empty_flat, open_faiss, open_lists, write_flat
from rexrag.retrieval.ivf import num_codes, num_lists, write_ivf
from rexrag.retrieval.search import Effort, Searcher
from rexrag.retrieval.vectors import FaissVectors, VectorOrigin, VectorStore

BUILD_UNTIL_KILLED = """
import sys, time
from rexrag.retrieval.dense_build import build_dense

class Waiting:
    def stage(self, name, *, total=None): self.name = name
    def advance_to(self, done):
        if self.name == "encoding":
            time.sleep(600)

build_dense(sys.argv[1], sys.argv[2], encoder=sys.argv[3], progress=Waiting())
"""


class Told:
    """What a build told of its progress."""

    def __init__(self) -> None:
        self.done: dict[str, list[float]] = {}

    def stage(self, name: str, *, total: float | None = None) -> None:
        self.done[name] = []

    def advance_to(self, done: float) -> None:
        self.done[list(self.done)[-1]].append(done)


def test_a_file_system_without_locks_is_built_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    corpus = write_rows(tmp_path / "c.jsonl", passage_rows(3))
    monkeypatch.setattr(fcntl, "flock", refuse)
    build_dense(corpus, tmp_path / "i", encoder=make_encoder(tmp_path / "encoder"))
    assert "has no locks; let no other build write there" in caplog.text


def test_a_build_that_was_killed_goes_on(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    corpus = write_rows(tmp_path / "c.jsonl", passage_rows(700))
    whole = Told()
    build_dense(corpus, tmp_path / "whole", encoder=encoder, progress=whole)
    assert whole.done["encoding"] == [1024, 2048, 2100]

    script = [sys.executable, "-c", BUILD_UNTIL_KILLED, str(corpus), str(tmp_path / "i"), str(encoder)]
    child = subprocess.Popen(script)
    try:
        state = tmp_path / ".i.vectors" / "state.json"
        wait_until(lambda: state.exists() and json.loads(state.read_text())["rows"] == 1024)
        with pytest.raises(RetrievalIndexError, match="another build is at work there"):
            build_dense(corpus, tmp_path / "i", encoder=encoder)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(60)
    assert not (tmp_path / "i").exists()

    rest = Told()
    build_dense(corpus, tmp_path / "i", encoder=encoder, progress=rest)
    assert rest.done["encoding"] == [2048, 2100]
    # Two processes may round the last digit apart.
    made = [faiss.read_index(str(tmp_path / name / "vectors.faiss")).reconstruct_n(0, 2100) for name in ("i", "whole")]
    np.testing.assert_allclose(made[0], made[1], atol=2e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "encoder", "i", "whole"]


def origin(**changes: object) -> VectorOrigin:
    base = VectorOrigin(corpus_sha256="c", encoder_sha256="e", settings=EncoderSettings(), dimension=8, dtype="float16")
    return base.model_copy(update=changes)


def some_vectors(count: int, dimension: int = 8, *, seed: int = 0) -> Vectors:
    vectors = np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32)
    faiss.normalize_L2(vectors)
    return vectors


def test_what_is_counted_is_there_and_what_is_not_is_written_again(tmp_path: Path) -> None:
    vectors = some_vectors(30)
    with closing(VectorStore(tmp_path / "v", origin())) as store:
        store.append(vectors[:20])
    with (tmp_path / "v" / "vectors").open("ab") as file:
        file.write(b"torn row")
    with closing(VectorStore(tmp_path / "v", origin())) as store:
        assert store.count == 20
        store.append(vectors[20:])
        np.testing.assert_allclose(np.concatenate(list(store.blocks(7))), vectors, atol=1e-3)
        np.testing.assert_allclose(store.take([29, 3]), vectors[[29, 3]], atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus_sha256": "d"},
        {"encoder_sha256": "f"},
        {"settings": EncoderSettings(query_prefix="query: ")},
        {"dtype": "float32"},
    ],
)
def test_vectors_of_something_else_are_not_used(tmp_path: Path, changes: dict[str, object]) -> None:
    with closing(VectorStore(tmp_path / "v", origin())) as store:
        store.append(some_vectors(5))
    with closing(VectorStore(tmp_path / "v", origin(**changes))) as store:
        assert store.count == 0
        store.append(some_vectors(1))
    assert (tmp_path / "v" / "vectors").stat().st_size == 8 * (4 if "dtype" in changes else 2)


def test_fewer_vectors_than_were_counted_are_none(tmp_path: Path) -> None:
    with closing(VectorStore(tmp_path / "v", origin())) as store:
        store.append(some_vectors(5))
    (tmp_path / "v" / "vectors").write_bytes(b"")
    with closing(VectorStore(tmp_path / "v", origin())) as store:
        assert store.count == 0


def test_values_that_fp16_does_not_hold_are_refused(tmp_path: Path) -> None:
    with (
        closing(VectorStore(tmp_path / "v", origin())) as store,
        pytest.raises(RetrievalIndexError, match="beyond 65504"),
    ):
        store.append(np.full((1, 8), 1e5, dtype=np.float32))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_file_written_in_a_stream_is_the_one_that_faiss_writes(tmp_path: Path, precision: Precision) -> None:
    vectors = some_vectors(1000, 24)
    empty = empty_flat(24, precision, limits=np.stack([vectors.min(0), vectors.max(0)]))
    write_flat(tmp_path / "streamed", empty, iter(np.array_split(vectors, 7)), count=1000)
    empty.add(vectors)
    faiss.write_index(empty, str(tmp_path / "whole"))
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("dimension", [24, 25, 31])
def test_lists_filled_in_parts_are_those_filled_at_once(tmp_path: Path, dimension: int) -> None:
    vectors = some_vectors(5000, dimension)
    source = flat(vectors)
    for name, memory_bytes in (("parts", 1 << 17), ("whole", 1 << 30)):
        (tmp_path / name).mkdir()
        lists = tmp_path / name / "v"
        write_ivf(lists, FaissVectors(source), memory_bytes=memory_bytes, use_gpu=False, progress=lambda done: None)
    parts, whole = (open_lists(tmp_path / name / "v", source) for name in ("parts", "whole"))
    assert parts.ntotal == whole.ntotal == 5000
    searchers = [Searcher(index) for index in (parts, whole)]
    few, many = (searcher.num_lists or 0 for searcher in searchers)
    assert 0 < few < many
    _, best = source.search(vectors[:500], 4)
    for searcher in searchers:
        searcher.set_effort(Effort(probes=searcher.num_lists or 0, candidates=5000))
        assert searcher.search(vectors[:500], 4)[1].tolist() == best.tolist()
        searcher.set_effort(Effort(probes=searcher.num_lists or 0, candidates=500))
        _, rows = searcher.search(vectors[:500], 4)
        assert np.mean([len({*a} & {*b}) / 4 for a, b in zip(rows.tolist(), best.tolist(), strict=True)]) > 0.9
    plain: FaissIndex = faiss.read_index(str(tmp_path / "whole" / "v"))  # by whoever has FAISS alone, all in memory
    plain.nprobe = plain.nlist
    mapped = open_faiss(tmp_path / "whole" / "v")
    mapped.nprobe = mapped.nlist
    assert plain.search(vectors[:50], 9)[1].tolist() == mapped.search(vectors[:50], 9)[1].tolist()


def test_lists_of_other_vectors_are_refused(tmp_path: Path) -> None:
    source = flat(some_vectors(500, 24))
    write_ivf(tmp_path / "v", FaissVectors(source), memory_bytes=1 << 20, use_gpu=False, progress=lambda done: None)
    for other in (flat(some_vectors(501, 24)), flat(some_vectors(500, 28))):
        with pytest.raises(RetrievalIndexError, match="v: no lists of the vectors beside it; build the index again"):
            open_lists(tmp_path / "v", other)
    lists = faiss.read_index(str(tmp_path / "v"))
    lists.remove_ids(faiss.IDSelectorBatch(np.array([3])))
    lists.add_with_ids(some_vectors(1, 24), np.array([500]))
    faiss.write_index(lists, str(tmp_path / "v"))
    with pytest.raises(RetrievalIndexError, match="v: its rows are not those of the vectors"):
        open_lists(tmp_path / "v", source)
    faiss.write_index(source, str(tmp_path / "v"))
    with pytest.raises(RetrievalIndexError, match="no lists of the vectors beside it"):
        open_lists(tmp_path / "v", source)


def flat(vectors: Vectors) -> faiss.IndexFlatIP:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def test_lists_follow_the_size_and_what_can_be_trained() -> None:
    assert [num_lists(n, trained=n) for n in (1, 600, 100_000, 21_000_000)] == [1, 15, 1265, 18330]
    assert num_lists(21_000_000, trained=390_000) == 10_000


@pytest.mark.parametrize("length", [1.0, 500.0])
def test_vectors_on_a_device_are_ranked_by_what_fp16_holds_of_them_whatever_their_length(length: float) -> None:
    vectors, queries = length * some_vectors(3000, 24), length * some_vectors(9, 24, seed=1)
    moved = Searcher(flat(vectors))
    moved.move_to("cpu")
    scores, rows = moved.search(queries, 5)
    exact = queries @ vectors.astype(np.float16).astype(np.float32).T
    best = np.sort(exact, axis=1)[:, ::-1][:, :5]
    assert scores == pytest.approx(best, rel=1e-4)
    assert np.take_along_axis(exact, rows, 1) == pytest.approx(best, rel=1e-4)


def test_what_fp16_does_not_hold_is_not_moved() -> None:
    searcher = Searcher(flat(np.full((3, 8), 7e4, dtype=np.float32)))
    with pytest.raises(RuntimeError, match="beyond 65504"):
        searcher.move_to("cpu")
    assert searcher.search(np.ones((1, 8), dtype=np.float32), 1)[0].item() == pytest.approx(8 * 7e4)


def test_many_results_are_put_in_order_by_more_candidates(tmp_path: Path) -> None:
    vectors = some_vectors(5000, 24)
    source = flat(vectors)
    write_ivf(tmp_path / "v", FaissVectors(source), memory_bytes=1 << 30, use_gpu=False, progress=lambda done: None)
    searcher = Searcher(open_lists(tmp_path / "v", source))
    searcher.set_effort(Effort(probes=searcher.num_lists or 0, candidates=32))
    queries = some_vectors(50, 24, seed=1)
    _, best = source.search(queries, 100)
    _, rows = searcher.search(queries, 100)
    codes = open_faiss(tmp_path / "v")
    codes.nprobe = codes.nlist
    _, coarse = codes.search(queries, 100)
    found, without = (
        np.mean([len({*a} & {*b}) / 100 for a, b in zip(some.tolist(), best.tolist(), strict=True)])
        for some in (rows, coarse)
    )
    assert found > 0.75 > without + 0.1, (found, without)


def test_codes_divide_the_dimensions() -> None:
    assert [num_codes(dimension) for dimension in (1, 3, 32, 384, 768, 1024, 25, 31)] == [1, 1, 8, 96, 192, 256, 25, 31]


class AnonymousPeak:
    """The most memory of its own that this process has while a block runs; mapped files are not its own."""

    def __enter__(self) -> AnonymousPeak:
        self._before = self.bytes = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes -= self._before


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat file of 128 MiB."""
    path = tmp_path_factory.mktemp("large") / "v"
    blocks = (some_vectors(4096, 128, seed=seed) for seed in range(64))
    write_flat(path, empty_flat(128, "fp32"), blocks, count=64 * 4096)
    return path


def test_an_index_opens_without_its_vectors_in_memory(large: Path) -> None:
    with AnonymousPeak() as peak:
        Searcher(open_faiss(large)).search(some_vectors(9, 128), 3)
    assert peak.bytes < 16 << 20


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_converting_keeps_to_its_memory(large: Path, tmp_path: Path, kind: str) -> None:
    source = FaissVectors(open_faiss(large))
    with AnonymousPeak() as peak:
        if kind == "ivf":
            write_ivf(tmp_path / "v", source, memory_bytes=32 << 20, use_gpu=False, progress=lambda done: None)
        else:
            rows = DenseSettings(memory_gb=0.25).block_rows(128)
            write_flat(tmp_path / "v", empty_flat(128, "int8"), source.blocks(rows), count=source.count)
    assert peak.bytes < 64 << 20
    assert open_faiss(tmp_path / "v").ntotal == source.count
