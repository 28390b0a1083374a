"""`rexrag.retrieval.dense` and its builder, over a real small encoder, against brute force."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dense_worlds import QUERIES, best_ids, exact_scores
from tiny_encoders import make_encoder, passage_rows, write_rows

from rexrag.data.corpus import iter_corpus
from rexrag.errors import ConfigError, DataError, ModelError, RetrievalIndexError
from rexrag.retrieval.bm25 import BM25Retriever, build_bm25
from rexrag.retrieval.dense import DenseIndex, _move_to_gpu
from rexrag.retrieval.dense_build import DenseKind, DenseSettings, build_dense
from rexrag.retrieval.encoder import Encoder, Vectors
from rexrag.retrieval.encoder_settings import EncoderOverrides
from rexrag.retrieval.faiss_files import Precision
from rexrag.retrieval.ivf import MOST_CANDIDATES
from rexrag.retrieval.manifest import check_index, read_manifest

KINDS: list[tuple[DenseKind, Precision]] = [("flat", "fp32"), ("flat", "fp16"), ("flat", "int8"), ("ivf", "int8")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of 600 passages, an encoder, and an index of each kind."""
    root = tmp_path_factory.mktemp("dense")
    make_encoder(root / "encoder")
    write_rows(root / "corpus.jsonl", passage_rows(200))
    for kind, precision in KINDS:
        settings = DenseSettings(kind=kind, precision=precision, questions=tuple(QUERIES))
        build_dense(root / "corpus.jsonl", root / f"{kind}-{precision}", encoder=root / "encoder", settings=settings)
    return root


@pytest.fixture(scope="module")
def exact(world: Path) -> Vectors:
    return exact_scores(Encoder.load(world / "encoder"), world / "corpus.jsonl", QUERIES)


@pytest.fixture(scope="module")
def ids(world: Path) -> list[str]:
    return [passage.id for passage in iter_corpus(world / "corpus.jsonl")]


def find(index: DenseIndex, queries: list[str], top_k: int) -> list[list[str]]:
    return [[passage.id for passage in found] for found in index.find(index.prepare(queries), top_k=top_k)]


@pytest.mark.parametrize(("kind", "precision"), KINDS)
def test_each_kind_finds_what_brute_force_finds(
    world: Path, exact: Vectors, ids: list[str], kind: DenseKind, precision: Precision
) -> None:
    index = DenseIndex(world / f"{kind}-{precision}")
    found, best = find(index, QUERIES, 3), best_ids(exact, ids, 3)
    recall = np.mean([len(set(one) & set(other)) / 3 for one, other in zip(found, best, strict=True)])
    assert recall >= {"fp32": 1.0, "fp16": 0.97, "int8": 0.9}[precision]
    passages = {passage.id: passage for passage in iter_corpus(world / "corpus.jsonl")}
    for row, results in enumerate(index.find(index.prepare(QUERIES), top_k=3)):
        for passage in results:
            assert passage.score == pytest.approx(exact[row, ids.index(passage.id)], abs=0.02)
            assert (passage.title, passage.text) == (passages[passage.id].title, passages[passage.id].text)
        scores = [passage.score for passage in results]
        assert scores == sorted(scores, key=lambda score: -(score or 0))


@pytest.mark.parametrize(("kind", "precision"), KINDS)
def test_alone_and_in_a_batch_a_query_finds_the_same(world: Path, kind: DenseKind, precision: Precision) -> None:
    index = DenseIndex(world / f"{kind}-{precision}", num_threads=1)
    assert find(index, QUERIES, 5) == [find(index, [query], 5)[0] for query in QUERIES]


@pytest.mark.parametrize(("kind", "precision"), KINDS)
@pytest.mark.parametrize("num_queries", [1, 20])
def test_more_than_there_are_gives_all_of_them_and_no_filler(
    world: Path, ids: list[str], kind: DenseKind, precision: Precision, num_queries: int
) -> None:
    index = DenseIndex(world / f"{kind}-{precision}")
    for found in find(index, QUERIES[:num_queries], 1000):
        assert len(found) == len(set(found))
        assert set(found) == set(ids)
    assert index.find([], top_k=3) == []
    assert index.num_passages == len(ids)


@pytest.mark.parametrize(("kind", "precision"), KINDS)
@pytest.mark.parametrize("top_k", [1, 5, 1000])
def test_on_a_device_the_search_is_exact_for_every_kind(
    world: Path, ids: list[str], kind: DenseKind, precision: Precision, top_k: int
) -> None:
    flat = DenseIndex(world / f"flat-{precision}")
    moved = DenseIndex(world / f"{kind}-{precision}")
    moved._searcher.move_to("cpu")  # on a GPU nothing differs but the name
    for queries in (QUERIES, QUERIES[:1]):
        found, expected = (index.find(index.prepare(queries), top_k=top_k) for index in (moved, flat))
        assert [len(row) for row in found] == [min(top_k, len(ids))] * len(queries)
        for one, other in zip(found, expected, strict=True):
            assert len({passage.id for passage in one}) == len(one)
            scores = [passage.score for passage in one]
            assert scores == pytest.approx([passage.score for passage in other], abs=2e-3)


def test_vectors_that_find_no_room_stay_where_they_are(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = DenseIndex(world / "flat-fp16")
    before = find(index, QUERIES, 3)
    _move_to_gpu(index._searcher, world / "flat-fp16", room=1000)
    assert "flat-fp16: its vectors would take 0.0 GB of the GPU, where 0.0 GB are left" in caplog.text
    assert find(index, QUERIES, 3) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("kind", "precision"), KINDS)
def test_on_a_gpu_an_index_finds_what_it_finds_on_a_cpu(world: Path, kind: DenseKind, precision: Precision) -> None:
    on_gpu = DenseIndex(world / f"{kind}-{precision}", gpu_share=1.0)
    on_cpu = DenseIndex(world / f"flat-{precision}")
    found, expected = (index.find(index.prepare(QUERIES), top_k=5) for index in (on_gpu, on_cpu))
    for one, other in zip(found, expected, strict=True):
        assert [p.score for p in one] == pytest.approx([p.score for p in other], abs=1e-2)


def test_odd_queries_are_answered(world: Path) -> None:
    index = DenseIndex(world / "flat-int8")
    odd = ["", "\ud800", "\x00", "word " * 5000, "[SEP]"]
    assert [len(found) for found in find(index, odd, 3)] == [3] * len(odd)


def test_the_manifest_says_what_it_is(world: Path) -> None:
    for kind, precision in KINDS:
        manifest = check_index(world / f"{kind}-{precision}")
        dense = manifest.dense
        assert (manifest.kind, manifest.passages, manifest.analyser) == (kind, 600, None)
        assert dense is not None
        assert (dense.precision, dense.metric) == (precision, "inner_product")
        assert (dense.encoder.dimension, dense.encoder.settings.pooling) == (32, "mean")
        assert dense.recall is not None
        assert dense.recall.at_3 >= 0.95
        if kind == "ivf":
            assert dense.lists == 600 // 39
            assert dense.probes is not None
            assert 1 <= dense.probes <= dense.lists
            assert dense.candidates is not None
            assert 32 <= dense.candidates <= MOST_CANDIDATES
            assert dense.recall.queries == len(QUERIES) // 2
        else:
            assert (dense.lists, dense.probes, dense.candidates) == (None, None, None)
            assert dense.recall.queries == len(QUERIES)
    assert {path.name for path in world.iterdir()} == {"encoder", "corpus.jsonl", *(f"{k}-{p}" for k, p in KINDS)}


def test_vectors_take_what_their_precision_says(world: Path) -> None:
    sizes = {name: (world / f"flat-{name}" / "vectors.faiss").stat().st_size for name in ("fp32", "fp16", "int8")}
    assert {name: size // (600 * 32) for name, size in sizes.items()} == {"fp32": 4, "fp16": 2, "int8": 1}


def test_passages_of_equal_text_come_in_the_order_of_the_corpus(world: Path, tmp_path: Path) -> None:
    rows = [*passage_rows(40), *({"id": f"same-{i}", "contents": "coin1 coin2 coin3"} for i in range(40))]
    corpus = write_rows(tmp_path / "c.jsonl", rows)
    for precision in ("fp32", "int8"):
        build_dense(corpus, tmp_path / "i", encoder=world / "encoder", settings=DenseSettings(precision=precision))
        for queries in (["coin1 coin2 coin3"], ["coin1 coin2 coin3"] * 9):
            for found in find(DenseIndex(tmp_path / "i"), queries, 5):
                assert found == [f"same-{i}" for i in range(5)]


def test_a_parquet_corpus_is_kept_in_the_index(world: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_pylist(passage_rows(200)), corpus)
    build_dense(corpus, tmp_path / "i", encoder=world / "encoder", settings=DenseSettings(precision="fp32"))
    corpus.unlink()
    assert find(DenseIndex(tmp_path / "i"), QUERIES, 3) == find(DenseIndex(world / "flat-fp32"), QUERIES, 3)


def test_rows_without_text_are_no_passages(world: Path, tmp_path: Path) -> None:
    rows = [{"id": "a", "contents": ""}, *passage_rows(40), {"id": "b", "text": " "}]
    manifest = build_dense(write_rows(tmp_path / "c.jsonl", rows), tmp_path / "i", encoder=world / "encoder")
    assert (manifest.passages, manifest.empty_rows) == (120, 2)
    assert find(DenseIndex(tmp_path / "i"), ['"Land7"\nThe currency of Land7 is the Coin49 by Sea7.'], 1) == [
        ["currency-7"]
    ]


def test_one_passage_is_enough(world: Path, tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "c.jsonl", [{"id": 1, "text": "land1"}])
    for kind, precision in KINDS:
        settings = DenseSettings(kind=kind, precision=precision)
        build_dense(corpus, tmp_path / "i", encoder=world / "encoder", settings=settings)
        assert find(DenseIndex(tmp_path / "i"), ["x", "y"], 3) == [["1"], ["1"]]


def test_settings_of_the_encoder_are_kept_and_used(world: Path, tmp_path: Path) -> None:
    said = EncoderOverrides(pooling="cls", query_prefix="query: ", passage_prefix="passage: ", max_tokens=20)
    build_dense(
        world / "corpus.jsonl", tmp_path / "i", encoder=world / "encoder", overrides=said,
        settings=DenseSettings(precision="fp32"),
    )  # fmt: skip
    index = DenseIndex(tmp_path / "i")
    expected = exact_scores(Encoder.load(world / "encoder", overrides=said), world / "corpus.jsonl", QUERIES)
    names = [passage.id for passage in iter_corpus(world / "corpus.jsonl")]
    assert find(index, QUERIES, 3) == best_ids(expected, names, 3)


def test_another_encoder_is_refused(world: Path, tmp_path: Path) -> None:
    other = make_encoder(tmp_path / "other", seed=1)
    with pytest.raises(RetrievalIndexError, match="is not the one of this index"):
        DenseIndex(world / "flat-fp16", encoder=other)
    same = make_encoder(tmp_path / "same")
    assert find(DenseIndex(world / "flat-fp16", encoder=same), ["land1"], 1)


def copy_of(world: Path, name: str, out: Path) -> Path:
    shutil.copytree(world / name, out / name)
    shutil.copy(world / "corpus.jsonl", out)
    return out / name


@pytest.mark.parametrize(
    ("name", "file"),
    [("flat-fp32", "vectors"), ("flat-int8", "vectors"), ("ivf-int8", "vectors"), ("ivf-int8", "lists")],
)
def test_damage_is_found(world: Path, tmp_path: Path, name: str, file: str) -> None:
    index = copy_of(world, name, tmp_path)
    path = index / f"{file}.faiss"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(RetrievalIndexError, match=rf"{file}\.faiss has \d+ bytes, not"):
        DenseIndex(index)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RetrievalIndexError, match=rf"{file}\.faiss has sha256"):
        check_index(index)
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(RetrievalIndexError, match="no FAISS index that version"):
        DenseIndex(index)


def change(index: Path, **changes: object) -> None:
    path = index / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_manifests_that_do_not_fit(world: Path, tmp_path: Path) -> None:
    index = copy_of(world, "flat-fp16", tmp_path)
    original = json.loads((index / "index.json").read_text())
    change(index, passages=601)
    with pytest.raises(RetrievalIndexError, match="600 vectors and 600 offsets do not fit the 601"):
        DenseIndex(index)
    change(index, **original)
    dense = original["dense"]
    change(index, dense={**dense, "encoder": {**dense["encoder"], "dimension": 31}})
    with pytest.raises(RetrievalIndexError, match="32 dimensions, those of its encoder 31"):
        DenseIndex(index)
    change(index, **original)
    change(index, kind="bm25")
    with pytest.raises(RetrievalIndexError, match="kind bm25 does not fit"):
        DenseIndex(index)


def test_kinds_are_not_mixed_up(world: Path, tmp_path: Path) -> None:
    build_bm25(world / "corpus.jsonl", tmp_path / "bm25")
    with pytest.raises(RetrievalIndexError, match="a bm25 index, no dense one"):
        DenseIndex(tmp_path / "bm25")
    with pytest.raises(RetrievalIndexError, match="a flat index, no bm25"):
        BM25Retriever(world / "flat-fp16")


def test_an_encoder_that_went_away_is_named(world: Path, tmp_path: Path) -> None:
    index = copy_of(world, "flat-fp16", tmp_path)
    dense = json.loads((index / "index.json").read_text())["dense"]
    change(index, dense={**dense, "encoder": {**dense["encoder"], "path": str(tmp_path / "gone")}})
    with pytest.raises(ModelError, match="gone: no such folder"):
        DenseIndex(index)
    assert DenseIndex(index, encoder=world / "encoder").num_passages == 600


def test_settings_out_of_bounds() -> None:
    with pytest.raises(ConfigError, match=r"--memory 0\.1: must be at least 0\.25"):
        DenseSettings(memory_gb=0.1)
    with pytest.raises(ConfigError, match="--memory nan"):
        DenseSettings(memory_gb=float("nan"))
    with pytest.raises(ConfigError, match="an ivf index has int8"):
        DenseSettings(kind="ivf", precision="fp16")
    with pytest.raises(ConfigError, match="FAISS sees no GPU"):
        DenseSettings(use_gpu=True)


def test_a_corpus_that_cannot_be_indexed_leaves_nothing(world: Path, tmp_path: Path) -> None:
    twice = write_rows(tmp_path / "c.jsonl", [*passage_rows(2), *passage_rows(1)])
    for corpus, expected in ((twice, "ids must be unique"), (tmp_path / "none.jsonl", "no such file")):
        with pytest.raises(DataError, match=expected):
            build_dense(corpus, tmp_path / "i", encoder=world / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_the_index_of_before_is_replaced_whole(world: Path, tmp_path: Path) -> None:
    build_bm25(world / "corpus.jsonl", tmp_path / "i")
    build_dense(world / "corpus.jsonl", tmp_path / "i", encoder=world / "encoder")
    assert read_manifest(tmp_path / "i").kind == "flat"
    assert not (tmp_path / "i" / "tantivy").exists()
