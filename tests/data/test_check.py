"""`rexrag.data.check`: all rows are looked at, whatever is wrong with some."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rexrag.data.check import check_file


def write(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def test_questions_with_several_problems(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        b"\xff",
        {"id": "1", "question": "q", "golden_answers": ["a"], "hops": 2, "data_source": "x", "gold_passage_ids": ["p"]},
        {"id": "2", "question": "q", "golden_answers": []},
        b"",
        {"id": "1", "question": "again", "golden_answers": ["a"], "data_source": "x"},
        {"id": "1", "question": "q", "golden_answers": ["a"]},
    )
    report = check_file(path)
    assert (report.kind, report.rows) == ("questions", 5)
    assert (report.by_source, report.by_hops, report.num_with_gold_passages) == ({"q": 1, "x": 1}, {2: 1, None: 1}, 1)
    assert [problem.number for problem in report.problems] == [1, 3, 5]
    listed = report.to_json()["problems"]
    assert isinstance(listed, list)
    assert listed[1] == {
        "file": str(path), "line": 3, "message": 'expected at least one non-empty answer in "golden_answers", got []'
    }  # fmt: skip
    assert json.loads(json.dumps(report.to_json()))["by_hops"] == {"2": 1, "unknown": 1}


def test_numbers_in_brackets_are_told_of(tmp_path: Path) -> None:
    """A list of years as a table writes it, or an interval: nobody but the user knows."""
    answers: list[object] = ["[-2, 7]", ["[0, 1]"], ["1985", "1986"], '["a", "b"]', [1985, 1986], "[7]", "[a, b]"]
    rows: list[object] = [{"id": str(i), "question": "q", "golden_answers": answer} for i, answer in enumerate(answers)]
    report = check_file(write(tmp_path / "q.jsonl", *rows))
    assert report.notes == ('answers such as "[1, 2]", each number of which is read as an answer: 2 rows',)
    assert not report.problems


def test_corpus_with_repeated_ids(tmp_path: Path) -> None:
    report = check_file(
        write(tmp_path / "c.jsonl", {"id": "a", "contents": "x"}, {"id": "b"}, {"id": "a", "text": "y"})
    )
    assert (report.kind, report.rows, [p.number for p in report.problems]) == ("corpus", 3, [2, 3])


def test_demonstrations(tmp_path: Path) -> None:
    good = {"question": "q", "segments": [{"text": "a", "weight": 1}]}
    report = check_file(write(tmp_path / "d.jsonl", good, {"question": "q"}))
    assert (report.kind, report.rows, [p.number for p in report.problems]) == ("demonstrations", 2, [2])


def test_problems_are_capped_and_counted(tmp_path: Path) -> None:
    report = check_file(write(tmp_path / "q.jsonl", {"question": "q"}, *[b'{"question": "\xff"}'] * 300))
    assert (report.num_problems, len(report.problems)) == (301, 100)
    assert report.to_json()["num_problems"] == 301


def test_odd_rows_are_noted(tmp_path: Path) -> None:
    twice = {"question": "q", "golden_answers": ["a"]}
    assert "of an earlier one: 1;" in check_file(write(tmp_path / "q.jsonl", twice, twice)).notes[0]
    report = check_file(write(tmp_path / "c.jsonl", {"id": "a", "text": "x"}, {"id": "b", "text": ""}))
    assert (report.num_problems, report.notes) == (0, ("rows without text, which an index leaves out: 1",))


def test_a_good_file_has_no_problem(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"question": "q", "golden_answers": ["a"]}]), tmp_path / "q.parquet")
    report = check_file(tmp_path / "q.parquet")
    assert (report.kind, report.rows, report.problems) == ("questions", 1, ())


def test_files_that_are_nothing_known(tmp_path: Path) -> None:
    for path, expected in (
        (write(tmp_path / "a.jsonl", {"foo": 1, "bar": 2}), "the columns are bar, foo"),
        (write(tmp_path / "b.jsonl"), "no rows"),
        (write(tmp_path / "c.parquet", b"PAR1 and no more"), "not a readable parquet file"),
        (tmp_path / "none.jsonl", "cannot be read"),
    ):
        report = check_file(path)
        assert report.kind == "unknown"
        assert len(report.problems) == 1
        assert expected in report.problems[0].message
        assert str(report.problems[0]).startswith(f"{path}: ")
