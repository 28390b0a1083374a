"""`rexrag.retrieval.adopt`: files that FAISS itself wrote, over the right corpus, and over wrong ones."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from dense_worlds import QUERIES, best_ids, exact_scores
from tiny_encoders import make_encoder, passage_rows, write_rows

from rexrag.data.corpus import iter_corpus
from rexrag.errors import DataError, RetrievalIndexError
from rexrag.retrieval.adopt import adopt
from rexrag.retrieval.dense import DenseIndex
from rexrag.retrieval.dense_build import DenseKind, DenseSettings
from rexrag.retrieval.encoder import Encoder, Vectors
from rexrag.retrieval.encoder_settings import EncoderOverrides
from rexrag.retrieval.faiss_files import FaissIndex, Precision
from rexrag.retrieval.manifest import Manifest, check_index

SAID = EncoderOverrides(query_prefix="query: ", passage_prefix="passage: ")
WITH_QUESTIONS = DenseSettings(questions=tuple(QUERIES))


class World:
    """A corpus of 600 passages, an encoder, and its vectors."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = make_encoder(root / "encoder")
        self.corpus = write_rows(root / "corpus.jsonl", passage_rows(200))
        self.encoder = Encoder.load(self.folder, overrides=SAID)
        self.passages = list(iter_corpus(self.corpus))
        self.vectors = self.encoder.passages(self.passages)
        exact = exact_scores(self.encoder, self.corpus, QUERIES)
        self.best = best_ids(exact, [passage.id for passage in self.passages], 3)

    def written(self, path: Path, index: FaissIndex, vectors: Vectors | None = None) -> Path:
        """A file as its maker would have it: trained, filled and written."""
        filled = self.vectors if vectors is None else vectors
        index.train(filled)
        index.add(filled)
        faiss.write_index(index, str(path))
        return path

    def adopt(self, file: Path, out: Path, **changes: object) -> Manifest:
        named = {"corpus": self.corpus, "encoder": self.folder, "overrides": SAID, "settings": WITH_QUESTIONS}
        return adopt(file, out, **{**named, **changes})  # type: ignore[arg-type]

    def recall(self, folder: Path) -> float:
        index = DenseIndex(folder)
        found = [[passage.id for passage in found] for found in index.find(index.prepare(QUERIES), top_k=3)]
        return float(np.mean([len(set(a) & set(b)) / 3 for a, b in zip(found, self.best, strict=True)]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("adopt"))


def ivf_flat() -> FaissIndex:
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(32), 32, 16, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    return index


MADE: dict[str, Callable[[], FaissIndex]] = {
    "flat": lambda: faiss.IndexFlatIP(32),
    "flat-l2": lambda: faiss.IndexFlatL2(32),
    "fp16": lambda: faiss.IndexScalarQuantizer(32, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT),
    "hnsw": lambda: faiss.IndexHNSWFlat(32, 16, faiss.METRIC_INNER_PRODUCT),
    "ivf": ivf_flat,
}


@pytest.mark.parametrize("name", MADE)
def test_a_file_is_used_where_it_is(world: World, tmp_path: Path, name: str) -> None:
    file = world.written(tmp_path / "e5_Flat.index", MADE[name]())
    manifest = world.adopt(file, tmp_path / "i")
    assert check_index(tmp_path / "i") == manifest
    dense = manifest.dense
    assert dense is not None
    assert (manifest.kind, dense.precision, dense.metric) == (
        "adopted", None, "l2" if name == "flat-l2" else "inner_product",
    )  # fmt: skip
    assert {path.name for path in (tmp_path / "i").iterdir()} == {"index.json", "offsets.u64"}
    assert dense.recall is not None
    assert world.recall(tmp_path / "i") >= (1.0 if name.startswith("flat") else 0.9)
    assert dense.recall.at_3 >= 0.9
    index = DenseIndex(tmp_path / "i")
    for alone in (True, False):
        queries = index.prepare(['"Land7"\nThe capital of Land7'] * (1 if alone else 9))
        best = index.find(queries, top_k=1)[-1][0]
        row = [passage.id for passage in world.passages].index(best.id)
        assert best.score == pytest.approx(float(world.vectors[row] @ queries[0]), abs=1e-3)


CONVERTED: list[tuple[DenseKind, Precision]] = [("flat", "fp32"), ("flat", "fp16"), ("flat", "int8"), ("ivf", "int8")]


@pytest.mark.parametrize(("kind", "precision"), CONVERTED)
@pytest.mark.parametrize("name", ["flat", "flat-l2", "hnsw", "ivf"])
def test_a_file_is_converted(world: World, tmp_path: Path, name: str, kind: DenseKind, precision: Precision) -> None:
    file = world.written(tmp_path / "v", MADE[name]())
    settings = DenseSettings(kind=kind, precision=precision, questions=tuple(QUERIES))
    manifest = world.adopt(file, tmp_path / "i", convert=True, settings=settings)
    file.unlink()
    dense = manifest.dense
    assert check_index(tmp_path / "i") == manifest
    assert dense is not None
    assert (manifest.kind, dense.precision, dense.metric) == (kind, precision, "inner_product")
    assert dense.recall is not None
    assert dense.recall.at_3 >= 0.9
    assert world.recall(tmp_path / "i") >= {"fp32": 1.0, "fp16": 0.97, "int8": 0.9}[precision]


def test_file_corpus_and_index_may_move_together(world: World, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    shutil.copy(world.corpus, tmp_path / "a")
    file = world.written(tmp_path / "a" / "v", MADE["flat"]())
    world.adopt(file, tmp_path / "a" / "i", corpus=tmp_path / "a" / "corpus.jsonl")
    shutil.move(tmp_path / "a", tmp_path / "b")
    check_index(tmp_path / "b" / "i")
    assert world.recall(tmp_path / "b" / "i") == 1.0


def test_a_file_that_changed_afterwards_is_refused(world: World, tmp_path: Path) -> None:
    file = world.written(tmp_path / "v", MADE["flat"]())
    world.adopt(file, tmp_path / "i")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RetrievalIndexError, match=r"vectors .*v has sha256"):
        check_index(tmp_path / "i")
    file.write_bytes(whole[:-1])
    with pytest.raises(RetrievalIndexError, match=r"not the file that was adopted: .*v has \d+ bytes"):
        DenseIndex(tmp_path / "i")


def test_ids_that_are_the_rows_are_none(world: World, tmp_path: Path) -> None:
    plain = faiss.IndexIDMap(faiss.IndexFlatIP(32))
    plain.add_with_ids(world.vectors, np.arange(600))
    faiss.write_index(plain, str(tmp_path / "v"))
    world.adopt(tmp_path / "v", tmp_path / "i")
    assert world.recall(tmp_path / "i") == 1.0
    world.adopt(tmp_path / "v", tmp_path / "j", convert=True, settings=DenseSettings(precision="fp32"))
    assert world.recall(tmp_path / "j") == 1.0
    own = faiss.IndexIDMap(faiss.IndexFlatIP(32))
    own.add_with_ids(world.vectors, np.arange(600) + 7)
    faiss.write_index(own, str(tmp_path / "v"))
    with pytest.raises(RetrievalIndexError, match=r"ids of their own \(\[7, 8, 9\] …\)"):
        world.adopt(tmp_path / "v", tmp_path / "k")


def test_lists_with_refinement_behind_such_ids_are_searched_as_they_were_measured(world: World, tmp_path: Path) -> None:
    coarse = faiss.index_factory(32, "IVF8,PQ8x4fs", faiss.METRIC_INNER_PRODUCT)
    refined = faiss.IndexRefineFlat(coarse)
    refined.train(world.vectors)
    plain = faiss.IndexIDMap(refined)
    plain.add_with_ids(world.vectors, np.arange(600))
    faiss.write_index(plain, str(tmp_path / "v"))
    dense = world.adopt(tmp_path / "v", tmp_path / "i").dense
    assert dense is not None
    assert dense.candidates is not None
    assert world.recall(tmp_path / "i") >= 0.9
    index = DenseIndex(tmp_path / "i")
    assert {len(found) for found in index.find(index.prepare(QUERIES), top_k=600)} == {600}


def test_passages_with_the_same_text_stand_for_one_another(world: World, tmp_path: Path) -> None:
    rows = [{"id": str(i), "contents": f'"Land{i % 3}"\nThe capital.'} for i in range(60)]
    corpus = write_rows(tmp_path / "c.jsonl", rows)
    vectors = world.encoder.passages(list(iter_corpus(corpus)))
    file = world.written(tmp_path / "v", faiss.IndexFlatIP(32), vectors)
    assert world.adopt(file, tmp_path / "i", corpus=corpus).passages == 60


def refused(world: World, tmp_path: Path, file: Path, expected: str, **changes: object) -> None:
    with pytest.raises(RetrievalIndexError, match=expected):
        world.adopt(file, tmp_path / "i", **changes)
    assert not (tmp_path / "i").exists()


def test_an_index_over_another_order_is_refused(world: World, tmp_path: Path) -> None:
    file = world.written(tmp_path / "v", MADE["flat"]())
    rows = passage_rows(200)
    other = write_rows(tmp_path / "c.jsonl", [*rows[300:], *rows[:300]])
    refused(
        world, tmp_path, file, r"64 of 64 passages, .*: passage \S+ \(row \d+\) is nearest to row \d+", corpus=other
    )
    shifted = write_rows(tmp_path / "c.jsonl", [*rows[:400], rows[-1], *rows[400:-1]])
    refused(world, tmp_path, file, "are not found in their place", corpus=shifted)


def test_an_index_by_another_encoder_or_another_use_of_it_is_refused(world: World, tmp_path: Path) -> None:
    file = world.written(tmp_path / "v", MADE["flat"]())
    refused(world, tmp_path, file, "not found in their place", encoder=make_encoder(tmp_path / "e", seed=1))
    narrow = make_encoder(tmp_path / "narrow", dimension=16)
    refused(world, tmp_path, file, "32 dimensions, those of .*narrow 16", encoder=narrow)
    refused(world, tmp_path, file, "not found in their place", overrides=EncoderOverrides(pooling="last"))


def test_counts_have_to_fit(world: World, tmp_path: Path) -> None:
    file = world.written(tmp_path / "v", MADE["flat"]())
    rows: list[dict[str, str]] = [*passage_rows(200)[:-1], {"id": "empty", "contents": ""}]
    other = write_rows(tmp_path / "c.jsonl", rows)
    expected = r"600 vectors, and the corpus has 599 passages \(1 row without text left out\)"
    refused(world, tmp_path, file, expected, corpus=other)


def test_distances_between_vectors_of_other_lengths_are_refused(world: World, tmp_path: Path) -> None:
    file = world.written(tmp_path / "v", faiss.IndexFlatL2(32), 3 * world.vectors)
    refused(world, tmp_path, file, r"not of length 1 \(largest length 3\)")
    other = world.written(tmp_path / "w", faiss.IndexFlat(32, faiss.METRIC_L1))
    refused(world, tmp_path, other, "inner product or L2 is needed")


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:100],
        lambda whole: whole[:-1],
        lambda whole: b"\x00" * len(whole),
        lambda whole: b"IxFI" + b"\xff" * (len(whole) - 4),
        lambda whole: b"IwFl" + b"\xff" * (len(whole) - 4),
        lambda whole: pickle.dumps({"index": whole}),
        lambda whole: b"version https://git-lfs.github.com/spec/v1\n",
        lambda whole: b"\x93NUMPY" + whole,
    ],
)
def test_files_that_are_no_index(world: World, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = world.written(tmp_path / "v", MADE["flat"]())
    file.write_bytes(damage(file.read_bytes()))
    refused(world, tmp_path, file, "v: no FAISS index that version [0-9.]+ reads")


def test_files_that_are_not_there(world: World, tmp_path: Path) -> None:
    refused(world, tmp_path, tmp_path / "none", "cannot be read .*No such file")
    refused(world, tmp_path, tmp_path, "cannot be read .*Is a directory")
    file = world.written(tmp_path / "v", MADE["flat"]())
    with pytest.raises(DataError, match="no such file"):
        world.adopt(file, tmp_path / "i", corpus=tmp_path / "none.jsonl")
