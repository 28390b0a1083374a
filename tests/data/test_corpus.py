"""`rexrag.data.corpus`: passages of a file, and single ones of a mapped file."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.data.corpus import Corpus, iter_corpus, iter_corpus_rows, split_contents
from rexrag.errors import DataError, RetrievalIndexError
from rexrag.types import Passage

ROWS: list[dict[str, object]] = [
    {"id": "a", "contents": '"Gabon"\nThe capital of Gabon is Libreville.'},
    {"id": 7, "title": "Homs", "text": "Homs is a city.\nIn Syria."},
    {"id": "c", "contents": "Just a line", "title": "ignored"},
]
PASSAGES = [
    Passage(id="a", title="Gabon", text="The capital of Gabon is Libreville."),
    Passage(id="7", title="Homs", text="Homs is a city.\nIn Syria."),
    Passage(id="c", title="", text="Just a line"),
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def open_mapped(path: Path) -> Corpus:
    starts = [row.offset for row, _ in iter_corpus_rows(path)]
    np.array(starts, dtype="<u8").tofile(path.with_suffix(".u64"))
    return Corpus.open(path, offsets=path.with_suffix(".u64"))


def test_jsonl_rows(tmp_path: Path) -> None:
    assert list(iter_corpus(write(tmp_path / "c.jsonl", ROWS))) == PASSAGES


def test_parquet_rows(tmp_path: Path) -> None:
    rows = [{**row, "id": str(row["id"])} for row in ROWS]
    schema = pa.schema([(name, pa.string()) for name in ("id", "contents", "title", "text")])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "c.parquet")
    assert list(iter_corpus(tmp_path / "c.parquet")) == PASSAGES


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ('"A \\"B\\" C"\ntext', ('A \\"B\\" C', "text")),
        ('The "Best" Song\ntext\nmore', ('The "Best" Song', "text\nmore")),
        ('"\ntext', ('"', "text")),
        ('""\ntext', ("", "text")),
        ("text only", ("", "text only")),
        ('"T"\r\ntext', ("T", "text")),
    ],
)
def test_title_and_text(contents: str, expected: tuple[str, str]) -> None:
    assert split_contents(contents) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"contents": "x"}, 'line 4: expected an "id"'),
        ({"id": "d"}, 'line 4: expected "contents" or "text"'),
        ({"id": "d", "contents": " \n"}, 'line 4: expected a non-empty string "contents"'),
        ({"id": "d", "text": 5}, 'line 4: expected a non-empty string "text", got 5'),
        ({"id": "d", "title": 5, "text": "x"}, 'line 4: expected a non-empty string "title", got 5'),
        ({"id": "7", "contents": "x"}, "line 4: id '7' is also in line 2"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, object], expected: str) -> None:
    path = write(tmp_path / "c.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match=expected):
        list(iter_corpus(path))


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no passage in it"):
        list(iter_corpus(write(tmp_path / "c.jsonl", [])))


def test_mapped_passages_equal_those_read(tmp_path: Path) -> None:
    with open_mapped(write(tmp_path / "c.jsonl", ROWS)) as corpus:
        assert len(corpus) == 3
        assert [corpus.get(i) for i in (2, 0, 1)] == [PASSAGES[2], PASSAGES[0], PASSAGES[1]]


@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=8),
    ascii_only=st.booleans(),
    blank=st.sampled_from(["", "\n", " \r\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
    last_newline=st.booleans(),
)
def test_mapping_finds_every_row_in_any_layout(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str], ascii_only: bool, blank: str, mark: str, last_newline: bool,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=ascii_only) for i, text in enumerate(texts)]
    content = mark + blank.join(line + "\n" for line in lines)
    path.write_bytes((content if last_newline else content.rstrip("\n")).encode("utf-8"))
    with open_mapped(path) as corpus:
        assert [corpus.get(i) for i in range(len(corpus))] == list(iter_corpus(path))
        assert [corpus.get(i).text for i in range(len(corpus))] == [text.strip() for text in texts]


def test_a_corpus_that_changed_is_an_error_not_another_passage(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", ROWS)
    open_mapped(path).close()
    path.write_bytes(b" " * 5 + path.read_bytes()[:-5])
    with (
        Corpus.open(path, offsets=path.with_suffix(".u64")) as corpus,
        pytest.raises(RetrievalIndexError, match="no passage at byte"),
    ):
        corpus.get(1)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", ROWS)
    with pytest.raises(RetrievalIndexError, match=r"none\.u64"):
        Corpus.open(path, offsets=tmp_path / "none.u64")


def test_a_passage_takes_microseconds(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"id": i, "contents": f'"T{i}"\n{"word " * 100}'} for i in range(2_000)])
    with open_mapped(path) as corpus:
        start = time.process_time()
        for i in range(2_000):
            corpus.get(i)
        assert (time.process_time() - start) / 2_000 < 200e-6
