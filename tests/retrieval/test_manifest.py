"""`rexrag.retrieval.manifest`: what is checked, when, and what may be overwritten."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rexrag.errors import RetrievalIndexError
from rexrag.retrieval.bm25 import BM25Retriever, build_bm25
from rexrag.retrieval.manifest import check_index, read_manifest

ROWS = [{"id": str(i), "contents": f'"T{i}"\nword{i} common'} for i in range(20)]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    corpus = tmp_path / "world" / "corpus.jsonl"
    corpus.parent.mkdir()
    corpus.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    build_bm25(corpus, tmp_path / "index")
    return tmp_path / "index"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_manifest(index: Path, **changes: object) -> None:
    path = index / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_fresh_index_passes(index: Path) -> None:
    manifest = check_index(index)
    assert manifest == read_manifest(index)
    assert (manifest.kind, manifest.passages, manifest.corpus.stored) == ("bm25", 20, False)
    assert set(manifest.files) == {p.relative_to(index).as_posix() for p in index.rglob("*") if p.is_file()} - {
        "index.json",
        *(p.relative_to(index).as_posix() for p in index.rglob("*.lock")),
    }


def test_opening_and_searching_leaves_it_as_it_was(index: Path) -> None:
    BM25Retriever(index)
    BM25Retriever(index)
    check_index(index)


def test_one_flipped_bit_anywhere_is_found(index: Path) -> None:
    for name in read_manifest(index).files:
        flip(index / name)
        with pytest.raises(RetrievalIndexError, match=f"{name} has sha256"):
            check_index(index)
        flip(index / name)
    check_index(index)


def test_all_differences_are_named(index: Path) -> None:
    corpus = Path(read_manifest(index).corpus.path)
    flip(corpus)
    flip(index / "offsets.u64")
    with pytest.raises(RetrievalIndexError, match=r"offsets\.u64 has sha256 .*corpus .*corpus\.jsonl has sha256"):
        check_index(index)


def test_missing_and_short_files_are_found_at_opening(index: Path) -> None:
    offsets = index / "offsets.u64"
    offsets.write_bytes(offsets.read_bytes()[:-8])
    with pytest.raises(RetrievalIndexError, match=r"offsets\.u64 has 152 bytes, not 160"):
        BM25Retriever(index)
    offsets.unlink()
    with pytest.raises(RetrievalIndexError, match=r"offsets\.u64 \(No such file"):
        BM25Retriever(index)


def test_a_corpus_that_grew_or_went_is_found_at_opening(index: Path) -> None:
    corpus = Path(read_manifest(index).corpus.path)
    with corpus.open("a") as file:
        file.write(json.dumps({"id": "new", "contents": "x"}) + "\n")
    with pytest.raises(RetrievalIndexError, match=r"the corpus is not the one that was indexed: .* bytes, not"):
        BM25Retriever(index)
    corpus.unlink()
    for check in (BM25Retriever, check_index):
        with pytest.raises(RetrievalIndexError, match=r"corpus\.jsonl \(No such file"):
            check(index)


def test_index_and_corpus_may_move_together(index: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("index", "world"):
        shutil.move(tmp_path / name, moved / name)
    check_index(moved / "index")
    BM25Retriever(moved / "index")


def test_a_parquet_corpus_may_be_gone_but_not_changed(tmp_path: Path) -> None:
    corpus = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), corpus)
    build_bm25(corpus, tmp_path / "index")
    flip(corpus)
    with pytest.raises(RetrievalIndexError, match=r"corpus .*c\.parquet has sha256"):
        check_index(tmp_path / "index")
    corpus.unlink()
    check_index(tmp_path / "index")


def test_numbers_that_do_not_fit_one_another(index: Path) -> None:
    change_manifest(index, passages=21)
    with pytest.raises(RetrievalIndexError, match="20 indexed passages and 20 offsets do not fit the 21"):
        BM25Retriever(index)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda index: shutil.rmtree(index), "no index there"),
        (lambda index: (index / "index.json").unlink(), "no index there"),
        (lambda index: (index / "index.json").write_text("{"), "not the manifest"),
        (lambda index: (index / "index.json").write_bytes(b"\xff"), "not the manifest"),
        (lambda index: change_manifest(index, format="other"), r"\(format: "),
        (lambda index: change_manifest(index, version=2), "version 2, this build reads version 1"),
        (lambda index: change_manifest(index, kind="faiss"), r"\(kind: "),
        (lambda index: change_manifest(index, analyser="klingon"), "analyser 'klingon' is unknown"),
    ],
)
def test_folders_that_cannot_be_opened(index: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(index)
    with pytest.raises(RetrievalIndexError, match=expected):
        BM25Retriever(index)


def test_an_index_is_replaced_whole_even_under_an_open_one(index: Path, tmp_path: Path) -> None:
    old = BM25Retriever(index)
    corpus = tmp_path / "other.jsonl"
    corpus.write_text(json.dumps(ROWS[0]) + "\n")
    build_bm25(corpus, index)
    assert check_index(index).passages == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index", "other.jsonl", "world"]
    assert asyncio.run(old.search("word7", top_k=1))[0].id == "7"


@pytest.mark.parametrize("content", ["notes.txt", "index.json"])
def test_other_folders_are_not_overwritten(index: Path, tmp_path: Path, content: str) -> None:
    corpus = Path(read_manifest(index).corpus.path)
    other = tmp_path / "mine"
    other.mkdir()
    (other / content).write_text('{"mine": true}')
    with pytest.raises(RetrievalIndexError, match="exists and is no index, so it is not overwritten"):
        build_bm25(corpus, other)
    assert (other / content).read_text() == '{"mine": true}'
    with pytest.raises(RetrievalIndexError, match="not overwritten"):
        build_bm25(corpus, corpus)


def test_a_corpus_in_the_index_that_it_would_be_removed_with_is_refused(index: Path, tmp_path: Path) -> None:
    corpus = index / "corpus.jsonl"
    corpus.write_text('{"id": "1", "contents": "a\\nb"}\n')
    before = {path: path.read_bytes() for path in index.rglob("*") if path.is_file()}
    with pytest.raises(RetrievalIndexError, match=r"corpus\.jsonl, of which the index is made, lies in it"):
        build_bm25(corpus, index)
    assert {path: path.read_bytes() for path in index.rglob("*") if path.is_file()} == before
    build_bm25(corpus, tmp_path / "elsewhere")


def test_a_place_that_cannot_be_written_is_named(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RetrievalIndexError, match=r"--out .*file/x: the index cannot be written there"):
        build_bm25(Path(read_manifest(index).corpus.path), tmp_path / "file" / "x")


FULL = """
import resource, sys
import numpy as np
from rexrag.errors import RetrievalIndexError
from rexrag.retrieval.bm25 import build_bm25
from rexrag.retrieval.faiss_files import empty_flat
from rexrag.retrieval.ivf import _write
from rexrag.retrieval.manifest import new_index_folder
from pathlib import Path

folder = Path(sys.argv[1])
index = empty_flat(16, "fp32")
index.add(np.zeros((1000, 16), np.float32))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    build_bm25(folder / "corpus.jsonl", folder / "words")
except RetrievalIndexError as error:
    print(error)
try:
    with new_index_folder(folder / "vectors", made_from=[]) as building:
        _write(index, building / "x.faiss")
except RetrievalIndexError as error:
    print(error)
"""


def test_libraries_that_find_no_room_are_told_as_what_they_are(tmp_path: Path) -> None:
    """Neither tantivy nor FAISS raises an OSError; a bound of the size of files is as real to them as a full disk."""
    rows = [{"id": str(i), "contents": f'"T{i}"\n' + " ".join(f"w{i}x{j}" for j in range(40))} for i in range(300)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=120)
    words, vectors = done.stdout.splitlines()
    for told, out in ((words, "words"), (vectors, "vectors")):
        assert told.startswith(f"--out {tmp_path / out}: the index cannot be written there (")
        assert "File too large" in told
        assert told.endswith("free space, or name a folder that can be made")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"], "nothing is left"


def test_what_a_killed_build_left_goes_and_what_another_holds_stays(index: Path, tmp_path: Path) -> None:
    corpus = Path(read_manifest(index).corpus.path)
    killed, at_work = (tmp_path / f".index.building-{number}" for number in (1, 2))
    for folder in (killed, at_work):
        folder.mkdir()
        (folder / "words").write_text("half of them")
    descriptor = os.open(at_work / "build.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        build_bm25(corpus, tmp_path / "index")
    finally:
        os.close(descriptor)
    assert not killed.exists()
    assert at_work.exists()
    check_index(tmp_path / "index")


def test_an_empty_folder_and_missing_parents_are_fine(index: Path, tmp_path: Path) -> None:
    corpus = Path(read_manifest(index).corpus.path)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        build_bm25(corpus, out)
        check_index(out)
