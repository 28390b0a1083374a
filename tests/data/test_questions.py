"""`rexrag.data.questions`: formats, identity, and what is said of bad rows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.data.questions import load_questions, parse_question
from rexrag.data.rows import Row, RowError
from rexrag.errors import DataError
from rexrag.recipe import load_recipe
from rexrag.types import Question

GOOD = {"id": "1", "question": "Capital of France?", "golden_answers": ["Paris"]}


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def parse(values: Mapping[str, object]) -> Question:
    return parse_question(Row(path=Path("nq.jsonl"), unit="line", number=1, offset=0, values=values))


def search_r1_row(target: object, **columns: object) -> dict[str, object]:
    return {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "Answer the given question. Question: who wrote Emma?\n"}],
        "reward_model": {"style": "rule", "ground_truth": {"target": target}},
        "extra_info": {"split": "train", "index": 7},
        **columns,
    }


def test_plain_rows(tmp_path: Path) -> None:
    rows = [
        {**GOOD, "hops": 2, "data_source": "geo", "gold_passage_ids": ["p1", 7]},
        {"id": 2, "question": "q", "golden_answers": "a"},
    ]
    first, second = load_questions(write_jsonl(tmp_path / "geo.jsonl", rows)).questions
    assert (first.key, first.question, first.golden_answers) == ("geo/1", "Capital of France?", ("Paris",))
    assert (first.hops, first.gold_passage_ids, first.row) == (2, ("p1", "7"), rows[0])
    assert (second.id, second.golden_answers, second.hops, second.gold_passage_ids) == ("2", ("a",), None, None)


@pytest.mark.parametrize("target", ["Jane Austen", ["Jane Austen", "Austen"]])
def test_search_r1_parquet(tmp_path: Path, target: str | list[str]) -> None:
    path = write_parquet(tmp_path / "train.parquet", [search_r1_row(target, golden_answers=["not this one"])])
    (question,) = load_questions([path]).questions
    assert question.question == "who wrote Emma?"
    assert question.golden_answers == ((target,) if isinstance(target, str) else tuple(target))
    assert question.data_source == "nq"


def test_question_column_counts_before_the_prompt() -> None:
    assert parse(search_r1_row("a", question="Who?")).question == "Who?"


def test_the_last_line_with_a_question_of_the_last_user_message_counts() -> None:
    messages = [
        {"role": "user", "content": "Question: first?"},
        {"role": "user", "content": "Question: an example?\nAnswer: yes\nNow you. Question: the real one?\n"},
        {"role": "assistant", "content": "Question: not mine?"},
    ]
    assert parse(search_r1_row("a", prompt=messages)).question == "the real one?"


def test_a_question_may_hold_the_words_that_stand_before_it() -> None:
    prompt = [{"role": "user", "content": 'Answer it. Question: who wrote "Question: Why"?\n'}]
    assert parse(search_r1_row("a", prompt=prompt)).question == 'who wrote "Question: Why"?'
    assert parse(search_r1_row("a", extra_info={"question": " the one itself? "})).question == "the one itself?"


@pytest.mark.parametrize("prompt", ["Do. Question: who?", [{"role": "user", "content": [{"text": "Question: who?"}]}]])
def test_prompts_as_text_and_in_parts(prompt: object) -> None:
    assert parse(search_r1_row("a", prompt=prompt)).question == "who?"


def test_targets_may_be_arrays() -> None:
    assert parse(search_r1_row(np.array(["a", "b"], dtype=object))).golden_answers == ("a", "b")


def test_identity_without_an_id_is_the_text_not_the_place(tmp_path: Path) -> None:
    a, b = search_r1_row("x", question="A?"), search_r1_row("x", question="B?")
    forth = load_questions(write_jsonl(tmp_path / "forth.jsonl", [a, b])).questions
    back = load_questions(write_jsonl(tmp_path / "back.jsonl", [b, a])).questions
    assert [q.key for q in forth] == [q.key for q in reversed(back)]
    assert forth[0].key != forth[1].key


def test_source_is_the_file_or_the_folder_of_a_split(tmp_path: Path) -> None:
    (tmp_path / "hotpotqa").mkdir()
    by_folder = load_questions(write_jsonl(tmp_path / "hotpotqa" / "test.jsonl", [GOOD]))
    by_file = load_questions(write_jsonl(tmp_path / "bamboogle.jsonl", [GOOD]))
    assert by_folder.questions[0].data_source == "hotpotqa"
    assert by_file.questions[0].data_source == "bamboogle"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("hotpotqa/train-00000-of-00002.jsonl", "hotpotqa"),
        ("hotpotqa/data/test-00001-of-00002-0123456789abcdef.jsonl", "hotpotqa"),
        ("hotpotqa/default/validation/0000.jsonl", "hotpotqa"),
        ("nq/part-00000-1f2e3d4c-aaaa.snappy.jsonl", "nq"),
        ("nq-00001-of-00002.jsonl", "nq"),
        ("trivia_2017.jsonl", "trivia_2017"),
        ("mine/data/train.jsonl", "data"),
        ("_ray_pkg_0f1e2d3c/train.jsonl", "train"),
        ("_ray_pkg_0f1e2d3c/nq/train.jsonl", "nq"),
        ("donn\udce9es/train.jsonl", "donn\\udce9es"),
    ],
)
def test_a_shard_is_no_source(tmp_path: Path, name: str, source: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    assert load_questions(write_jsonl(path, [GOOD])).questions[0].data_source == source


def test_a_link_into_a_store_has_its_own_source(tmp_path: Path) -> None:
    """As a hub's cache has them: files by their hashes, and links to them under their names."""
    (tmp_path / "blobs").mkdir()
    for source in ("nq", "hotpotqa"):
        blob = write_jsonl(tmp_path / "blobs" / f"hash-of-{source}", [GOOD])
        link = tmp_path / "snapshots" / source / "train.jsonl"
        link.parent.mkdir(parents=True)
        link.symlink_to(blob)
    named = str(tmp_path / "snapshots" / "*" / "train.jsonl")
    by_command = load_questions(named)
    assert [q.data_source for q in by_command.questions] == ["hotpotqa", "nq"]
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes" / "r.toml"
    recipe.write_text(f'data.train = "{named}"\ndata.dev = "../snapshots/nq/train.jsonl"\n')
    data = load_recipe(recipe).config.data
    assert data.dev == [tmp_path / "snapshots" / "nq" / "train.jsonl"]
    assert load_questions(data.train).questions == by_command.questions


def test_repeated_question_with_another_id_is_kept_and_the_same_id_is_an_error(tmp_path: Path) -> None:
    kept = load_questions(write_jsonl(tmp_path / "a.jsonl", [GOOD, {**GOOD, "id": "2"}]))
    assert len(kept.questions) == 2
    twice = write_jsonl(tmp_path / "b.jsonl", [GOOD, {**GOOD, "id": 1, "question": "Another?"}])
    for skip in (False, True):
        with pytest.raises(DataError, match=r"b\.jsonl, line 2: .*id '1' is also at .*b\.jsonl, line 1"):
            load_questions(twice, skip_bad_rows=skip)


def test_the_same_question_without_ids_is_told_apart_by_its_order_and_that_is_told(tmp_path: Path) -> None:
    genre = {"question": "What genre is Mother?", "data_source": "popqa"}
    rock, drama = {**genre, "golden_answers": ["rock"]}, {**genre, "golden_answers": ["drama"]}
    other = {**genre, "question": "Another?", "golden_answers": ["a"]}
    loaded = load_questions(write_jsonl(tmp_path / "a.jsonl", [rock, drama]))
    first, second = (q.id for q in loaded.questions)
    assert second == f"{first}-2"
    assert loaded.num_repeated == 1
    assert "of an earlier one: 1;" in loaded.notes[0]
    later = load_questions(write_jsonl(tmp_path / "a.jsonl", [other, rock, other, drama])).questions
    assert {q.id: q.golden_answers for q in later if q.question == genre["question"]} == {
        first: ("rock",), second: ("drama",)
    }  # fmt: skip
    apart = [write_jsonl(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate((rock, drama))]
    assert [q.id for q in load_questions(apart).questions] == [first, second]


def test_skipped_rows_are_counted_and_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, *[{"id": str(i)} for i in range(150)]])
    loaded = load_questions(path, skip_bad_rows=True)
    assert (loaded.num_skipped, len(loaded.skipped)) == (150, 100)
    assert loaded.notes[0].startswith(f"bad rows skipped: 150 of 151, the first: {path}, line 2: expected")
    with pytest.raises(DataError, match="or pass --skip"):
        load_questions(path, skip_by="pass --skip")


def test_patterns_of_files(tmp_path: Path) -> None:
    for number in (1, 0):
        write_jsonl(tmp_path / f"f{number}.jsonl", [GOOD])
    write_jsonl(tmp_path / "odd[1].jsonl", [GOOD])
    assert [q.key for q in load_questions(f"{tmp_path}/f*.jsonl").questions] == ["f0/1", "f1/1"]
    assert [q.key for q in load_questions(tmp_path / "odd[1].jsonl").questions] == ["odd[1]/1"]
    with pytest.raises(DataError, match=r"none\*: cannot be read .*none that this pattern matches"):
        load_questions(f"{tmp_path}/none*")


def test_order_over_several_files_is_kept(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"f{i}.jsonl", [GOOD, {**GOOD, "id": "2"}]) for i in range(2)]
    assert [q.key for q in load_questions(files).questions] == ["f0/1", "f0/2", "f1/1", "f1/2"]


def test_search_r1_rows_with_gaps_in_optional_columns(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{**GOOD, "hops": 2.0}, {**GOOD, "id": "2", "hops": float("nan")}]
    questions = load_questions(write_parquet(tmp_path / "a.parquet", rows)).questions
    assert [q.hops for q in questions] == [2, None]


@pytest.mark.parametrize(("number", "expected"), [(7.0, "7"), (2**60, str(2**60)), (float("nan"), None), ("x7", "x7")])
def test_ids_as_pandas_writes_them(number: object, expected: str | None) -> None:
    hashed = parse({**GOOD, "id": None}).id
    assert parse({**GOOD, "id": number}).id == (expected or hashed)
    assert parse({**GOOD, "id": None, "_id": "b"}).id == "b"
    assert parse({**GOOD, "gold_passage_ids": [number]}).gold_passage_ids == ((expected,) if expected else None)


def test_times_in_other_columns_break_nothing(tmp_path: Path) -> None:
    nanoseconds = pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns"))
    table = pa.table(
        {
            "question": ["A?", "B?"],
            "golden_answers": [["a"], ["b"]],
            "created": nanoseconds,
            "zone": nanoseconds.cast(pa.timestamp("us"), safe=False).cast(pa.timestamp("us", tz="Mars/Olympus")),
            "far": pa.array([2**60, 1], pa.timestamp("ms")),
            "took": nanoseconds.cast("int64").cast(pa.duration("ns")),
            "extra_info": pa.StructArray.from_arrays([nanoseconds, pa.array(["C?", None])], ["at", "question"]),
            "history": pa.array([[1_700_000_000_123_456_789], None], pa.list_(pa.timestamp("ns"))),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert [q.question for q in load_questions(tmp_path / "a.parquet").questions] == ["A?", "B?"]
    pq.write_table(table.drop(["question"]).slice(0, 1), tmp_path / "b.parquet")
    assert load_questions(tmp_path / "b.parquet").questions[0].question == "C?"


BAD_ROWS: list[tuple[object, str]] = [
    ({"id": "1", "golden_answers": ["a"]}, 'expected a string "question", or chat messages in "prompt"'),
    ({**GOOD, "question": "  "}, "expected a non-empty string \"question\", got '  '"),
    ({**GOOD, "question": 7}, 'expected a non-empty string "question", got 7'),
    ({"id": "1", "question": "q"}, 'expected a string or a list of strings in "golden_answers" (or'),
    ({"id": "1", "question": "q", "solution": "a"}, "got nothing; the columns are id, question, solution"),
    ({**GOOD, "golden_answers": []}, 'expected at least one non-empty answer in "golden_answers"'),
    ({**GOOD, "golden_answers": [True]}, 'expected a string or a list of strings in "golden_answers"'),
    ({**GOOD, "hops": 0}, 'expected a whole number from 1 to 1000 in "hops", got 0'),
    ({**GOOD, "hops": True}, 'in "hops", got True'),
    ({**GOOD, "gold_passage_ids": "p1"}, 'expected a list of passage ids in "gold_passage_ids"'),
    ({**GOOD, "id": [1]}, 'expected a non-empty string "id"'),
    ({**GOOD, "data_source": 3}, 'expected a non-empty string "data_source"'),
    ({**GOOD, "question": "half \ud800"}, '"question" holds half a surrogate pair'),
    (search_r1_row({"a": 1}), 'in "reward_model.ground_truth.target"'),
    (search_r1_row("a", prompt=[{"role": "user", "content": "who?"}]), 'expected "Question: …"'),
    (search_r1_row("a", prompt=[{"role": "user", "content": "Question: "}]), "nothing follows"),
    ([1, 2], "expected a JSON object, got [1, 2]"),
]


@pytest.mark.parametrize(("row", "expected"), BAD_ROWS, ids=[message[:40] for _, message in BAD_ROWS])
def test_bad_rows_stop_with_place_and_expectation_or_are_counted(tmp_path: Path, row: object, expected: str) -> None:
    good = {**GOOD, "id": "good"}
    path = write_jsonl(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(DataError) as error:
        load_questions(path)
    assert "a.jsonl, line 2: " in str(error.value)
    assert expected in str(error.value)
    assert "data.skip_bad_rows" in str(error.value)
    loaded = load_questions(path, skip_bad_rows=True)
    assert [q.id for q in loaded.questions] == ["good"]
    assert [problem.number for problem in loaded.skipped] == [2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"id": "\xff"}', "line 3: expected UTF-8, got byte 0xff at byte 9"),
        (b'{"id": ', "line 3: expected one JSON object on a line"),
        (b"[" * 100_000, "line 3: expected one JSON object on a line"),
    ],
)
def test_undecodable_lines_are_bad_rows(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError, match=expected):
        load_questions(path)
    assert len(load_questions(path, skip_bad_rows=True).skipped) == 1


def test_byte_order_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert len(load_questions(path).questions) == 1


@pytest.mark.parametrize("rows", [[], [{"id": "x"}]])
def test_no_usable_question_is_an_error(tmp_path: Path, rows: list[object]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=rf"no question to use \(.*a\.jsonl; {len(rows)} bad rows?\)"):
        load_questions(path, skip_bad_rows=True)
    with pytest.raises(DataError, match="no file given"):
        load_questions([])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        load_questions(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: is a pipe or a device, .*write them into a file"):
        load_questions(tmp_path / "pipe")
    path = tmp_path / "not.parquet"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(DataError, match=r"not\.parquet: not a readable parquet file"):
        load_questions(path)


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(0, 5_000), flipped=st.sets(st.integers(0, 5_000), max_size=20))
def test_damaged_parquet_is_a_data_error_or_still_reads(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flipped: set[int]
) -> None:
    rows: list[dict[str, object]] = [search_r1_row([f"a{i}"], id=str(i)) for i in range(40)]
    path = write_parquet(tmp_path_factory.mktemp("damaged") / "a.parquet", rows)
    data = bytearray(path.read_bytes())
    for at in flipped:
        data[at % len(data)] ^= 0x5A
    path.write_bytes(bytes(data[: len(data) - cut % len(data)]))
    message = ""
    try:
        load_questions(path)
    except DataError as error:
        message = str(error)
    assert not message or "a.parquet" in message
    assert message or cut % len(data) == 0, "a file without its end cannot be read"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = ("id", "question", "golden_answers", "data_source", "hops", "gold_passage_ids", "prompt", "reward_model")


@settings(deadline=None)
@given(changes=st.dictionaries(st.sampled_from(COLUMNS), JSON_VALUES, max_size=4))
def test_any_row_is_a_valid_question_or_a_row_error(changes: dict[str, object]) -> None:
    try:
        question = parse({**GOOD, **changes})
    except RowError:
        return
    assert question.question.strip()
    assert question.id.strip()
    assert question.data_source.strip()
    assert question.golden_answers
    assert all(answer.strip() for answer in question.golden_answers)
    assert question.hops is None or question.hops >= 1
    question.key.encode("utf-8")


def test_rows_are_kept_for_those_who_want_them(tmp_path: Path) -> None:
    row: dict[str, object] = {
        "id": "1",
        "question": "A?",
        "golden_answers": ["a"],
        "metadata": {"context": "an article " * 100},
    }
    path = write_parquet(tmp_path / "a.parquet", [row])
    (kept,), (bare,) = load_questions(path).questions, load_questions(path, keep_rows=False).questions
    assert kept.row == row
    assert bare.row == {}
    assert kept.key == bare.key
