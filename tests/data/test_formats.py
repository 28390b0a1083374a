"""`rexrag.data.formats` and `rexrag.data.json_values`: files of other kinds are read, or answered in one line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.data import json_values as stream
from rexrag.data.check import check_file
from rexrag.data.formats import open_data
from rexrag.data.questions import load_questions
from rexrag.errors import DataError

ROWS: list[dict[str, object]] = [{"id": str(i), "question": f"q{i}?", "golden_answers": ["a"]} for i in range(90)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("q.jsonl", LINES)
    return buffer.getvalue()


def arrow(*, stream: bool) -> bytes:
    table, buffer = pa.Table.from_pylist(ROWS), io.BytesIO()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("q.jsonl.gz", gzip.compress(LINES.encode()), "gunzip"),
        ("q.jsonl", gzip.compress(LINES.encode()), "gunzip"),
        ("q.jsonl", zipped(), "unzip"),
        ("q.jsonl", bz2.compress(LINES.encode()), "bunzip2"),
        ("q.jsonl", lzma.compress(LINES.encode()), "unxz"),
        ("q.arrow", arrow(stream=True), "an Arrow file; write parquet"),
        ("q.parquet", arrow(stream=False), "an Arrow file; write parquet"),
        ("q.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("q.jsonl", LINES.encode("utf-16"), "iconv -f UTF-16"),
        ("q.jsonl", LINES.encode("utf-16-le"), "iconv -f UTF-16"),
        ("q.jsonl", LINES.encode("utf-32"), "iconv -f UTF-32"),
        ("q.csv", b"id,question,golden_answers\n1,who?,me\n", "CSV or TSV"),
        ("q.txt", b"id\tquestion\n1\twho?\n", "CSV or TSV"),
        ("q.jsonl", b"<!DOCTYPE html>\n<html>\n", "a web page"),
        ("q.jsonl", b"who?\nwhere?\n", "neither jsonl nor parquet"),
        ("q.jsonl", b"\x80\x04\x95\x00\x00", "is binary"),
        ("q.parquet", LINES.encode(), "not a readable parquet file"),
    ],
)
def test_another_kind_of_file_is_one_line(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_questions(tmp_path / name)
    assert told in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(error.value)
    assert [str(problem) for problem in check_file(tmp_path / name).problems] == [str(error.value)]


@pytest.mark.parametrize(
    "text",
    [json.dumps(ROWS), json.dumps(ROWS, indent=2), " \n" + json.dumps(ROWS), "\ufeff" + json.dumps(ROWS, indent=1)],
)
def test_an_array_is_read_as_rows(tmp_path: Path, text: str) -> None:
    (tmp_path / "q.json").write_text(text, encoding="utf-8")
    assert [q.id for q in load_questions(tmp_path / "q.json").questions] == [row["id"] for row in ROWS]


@pytest.mark.parametrize("indent", [0, 2])
def test_objects_over_several_lines_are_read_as_rows(tmp_path: Path, indent: int) -> None:
    (tmp_path / "q.json").write_text("\n".join(json.dumps(row, indent=indent) for row in ROWS))
    assert len(load_questions(tmp_path / "q.json").questions) == 90


def test_parquet_by_its_bytes_whatever_its_name(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "q.jsonl")
    assert len(load_questions(tmp_path / "q.jsonl").questions) == 90


@pytest.mark.parametrize("text", [json.dumps(ROWS)[:-20], "[1, 2", "[{}] x", '[{"a": 1} {"a": 2}]', "[" * 100_000])
def test_a_broken_array_is_one_line_that_names_a_way_on(tmp_path: Path, text: str) -> None:
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(DataError, match=r"no readable JSON array after row \d+ .*jq -c '\.\[\]'"):
        load_questions(tmp_path / "q.json", skip_bad_rows=True)


def test_a_bad_item_of_an_array_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps([ROWS[0], 7, ROWS[1]]))
    loaded = load_questions(tmp_path / "q.json", skip_bad_rows=True)
    assert (len(loaded.questions), str(loaded.skipped[0])) == (
        2, f"{tmp_path}/q.json, row 2: expected a JSON object, got 7"
    )  # fmt: skip


def test_a_folder_names_its_files(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"part{number}.jsonl").write_text(LINES)
    with pytest.raises(DataError, match=r"is a folder; name the files .*part0\.jsonl.* and 4 more"):
        load_questions(tmp_path)
    with pytest.raises(DataError, match="patterns are for questions: name one file"):
        open_data(tmp_path / "part*.jsonl")
    many = tmp_path / "many"
    many.mkdir()
    for number in range(2500):
        (many / f"{number}.jsonl").touch()
    with pytest.raises(DataError, match=r"is a folder; name the files .*, \.\.\.\), each"):
        load_questions(many)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "data-00000-of-00001.arrow").write_bytes(arrow(stream=True))
    (saved / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"folder of Arrow files .*to_parquet"):
        load_questions(saved)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(values=st.lists(JSON, max_size=5), indent=st.sampled_from([None, 2]), block=st.integers(1, 9))
def test_values_come_whole_wherever_blocks_end(values: Sequence[object], indent: int | None, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_BLOCK_BYTES", block)
        array = io.BytesIO(json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        assert list(stream.json_values(array, is_array=True)) == values
