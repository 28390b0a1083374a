"""`rexrag.data.corpus`: passages of a file, and single ones of a mapped file."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.data.corpus import Corpus, contents_of, iter_corpus, iter_corpus_rows, passage_of, split_contents
from rexrag.errors import DataError, RetrievalIndexError
from rexrag.types import Passage

ROWS: list[dict[str, object]] = [
    {"id": "a", "contents": '"Gabon"\nThe capital of Gabon is Libreville.'},
    {"id": 7, "title": "Homs", "text": "Homs is a city.\nIn Syria."},
    {"id": "c", "contents": "Just a line", "title": "Lines"},
]
PASSAGES = [
    Passage(id="a", title="Gabon", text="The capital of Gabon is Libreville."),
    Passage(id="7", title="Homs", text="Homs is a city.\nIn Syria."),
    Passage(id="c", title="Lines", text="Just a line"),
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def open_corpus(path: Path) -> Corpus:
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
        ("\nOne.\nTwo.", ("", "One.\nTwo.")),
        (" \r\nOne.", ("", "One.")),
        ('"Heroes" and "Villains"\ntext', ('"Heroes" and "Villains"', "text")),
        ('""Heroes" and "Villains""\ntext', ('"Heroes" and "Villains"', "text")),
        ('"Song "X" live"\ntext', ('Song "X" live', "text")),
        ('"Weird" Al\ntext', ('"Weird" Al', "text")),
    ],
)
def test_title_and_text(contents: str, expected: tuple[str, str]) -> None:
    assert split_contents(contents) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"contents": "x"}, 'line 4: expected an "id"'),
        ({"id": "d"}, 'line 4: expected "contents" or "text"'),
        ({"id": "d", "text": 5}, 'line 4: expected a non-empty string "text", got 5'),
        ({"id": "d", "title": 5, "text": "x"}, 'line 4: expected a non-empty string "title", got 5'),
        ({"id": "7", "contents": "x"}, "line 4: id '7' is also in line 2"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, object], expected: str) -> None:
    path = write(tmp_path / "c.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match=expected):
        list(iter_corpus(path))


@pytest.mark.parametrize(
    ("row", "title", "text"),
    [
        ({"contents": '"Gabon"\nA land.', "title": "Gabon"}, "Gabon", "A land."),
        ({"contents": "A land.\nOn the coast.", "title": "Gabon"}, "Gabon", "A land.\nOn the coast."),
        ({"contents": "\nA land.\nOn the coast."}, "", "A land.\nOn the coast."),
        ({"contents": "", "title": "Gabon", "text": "A land."}, "Gabon", "A land."),
        ({"contents": float("nan"), "title": float("nan"), "text": "A land."}, "", "A land."),
    ],
)
def test_titles_beside_contents(tmp_path: Path, row: dict[str, object], title: str, text: str) -> None:
    path = write(tmp_path / "c.jsonl", [{"_id": 3.0, **row}])
    assert list(iter_corpus(path)) == [Passage(id="3", title=title, text=text)]
    with open_corpus(path) as corpus:
        assert corpus.get(0) == Passage(id="3", title=title, text=text)


@pytest.mark.parametrize("empty", [{"text": ""}, {"contents": " \n"}, {"contents": '"T"\n'}, {"text": None}])
def test_a_row_without_text_is_left_out_and_told(tmp_path: Path, empty: dict[str, object]) -> None:
    left_out: list[int] = []
    rows = [ROWS[0], {"id": "e", **empty}, ROWS[1]]
    path = write(tmp_path / "c.jsonl", rows)
    found = iter_corpus_rows(path, on_empty=lambda row: left_out.append(row.number))
    assert [passage for _, passage in found] == PASSAGES[:2]
    assert left_out == [2]
    with pytest.raises(DataError, match=r"no passage in it \(1 row without text\)"):
        list(iter_corpus(write(tmp_path / "d.jsonl", rows[1:2])))


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no passage in it"):
        list(iter_corpus(write(tmp_path / "c.jsonl", [])))


def test_mapped_passages_equal_those_read(tmp_path: Path) -> None:
    with open_corpus(write(tmp_path / "c.jsonl", ROWS)) as corpus:
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
def test_every_row_is_found_in_any_layout(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str], ascii_only: bool, blank: str, mark: str, last_newline: bool,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=ascii_only) for i, text in enumerate(texts)]
    content = mark + blank.join(line + "\n" for line in lines)
    path.write_bytes((content if last_newline else content.rstrip("\n")).encode("utf-8"))
    with open_corpus(path) as corpus:
        assert [corpus.get(i) for i in range(len(corpus))] == list(iter_corpus(path))
        assert [corpus.get(i).text for i in range(len(corpus))] == [text.strip() for text in texts]


def test_a_corpus_that_changed_is_an_error_not_another_passage(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", ROWS)
    open_corpus(path).close()
    path.write_bytes(b" " * 5 + path.read_bytes()[:-5])
    with (
        Corpus.open(path, offsets=path.with_suffix(".u64")) as corpus,
        pytest.raises(RetrievalIndexError, match="no passage at byte"),
    ):
        corpus.get(1)


def test_a_corpus_that_is_written_anew_in_place_is_an_error_too(tmp_path: Path) -> None:
    """Shorter than it was, while it is open: what was mapped would end the process."""
    path = write(tmp_path / "c.jsonl", [{"id": i, "text": "word " * 2000} for i in range(20)])
    with open_corpus(path) as corpus:
        assert corpus.get(19).id == "19"
        path.write_text('{"id": "0", "text": "new"}\n')
        with pytest.raises(RetrievalIndexError, match=r"no passage at byte .*index it again"):
            corpus.get(19)


def test_damaged_offsets_and_a_corpus_that_has_grown_read_no_more_than_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"id": i, "text": "x" * 3_000_000} for i in range(2)])
    offsets = path.with_suffix(".u64")
    open_corpus(path).close()
    with path.open("a") as file:
        file.write("y" * 5_000_000)
    with Corpus.open(path, offsets=offsets) as corpus:
        assert len(corpus.get(1).text) == 3_000_000
    np.array([0, 2**64 - 1], dtype="<u8").tofile(offsets)
    with Corpus.open(path, offsets=offsets) as corpus:
        assert len(corpus.get(0).text) == 3_000_000
        with pytest.raises(RetrievalIndexError, match="no passage at byte"):
            corpus.get(1)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", ROWS)
    with pytest.raises(RetrievalIndexError, match=r"none\.u64"):
        Corpus.open(path, offsets=tmp_path / "none.u64")


def test_a_passage_takes_microseconds(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"id": i, "contents": f'"T{i}"\n{"word " * 100}'} for i in range(2_000)])
    with open_corpus(path) as corpus:
        start = time.process_time()
        for i in range(2_000):
            corpus.get(i)
        assert (time.process_time() - start) / 2_000 < 200e-6


COLUMN = st.text(alphabet=' "ab\\\n(-', max_size=12)


@given(row=st.dictionaries(st.sampled_from(["title", "contents", "text"]), COLUMN, min_size=1))
def test_contents_are_read_as_the_passage_that_they_were_made_of(row: dict[str, str]) -> None:
    try:
        passage = passage_of(row, identity="x")
    except ValueError:
        return
    if passage is not None:
        again = passage_of({"contents": contents_of(passage)}, identity="x")
        assert again == replace(passage, title=passage.title.replace("\n", " "))
