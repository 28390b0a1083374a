"""`rexrag.data.demonstrations`: what is written is what is read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.data.demonstrations import Demonstration, Segment, load_demonstrations, write_demonstrations
from rexrag.errors import DataError

WEIGHTS = st.floats(0, 1e6) | st.lists(st.floats(0, 1e6), min_size=1, max_size=4).map(tuple)
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1)
DEMONSTRATIONS = st.builds(
    Demonstration,
    st.text(st.characters(codec="utf-8"), min_size=1).map(str.strip).filter(bool),
    st.lists(st.builds(Segment, TEXTS, WEIGHTS), max_size=3).map(lambda more: (Segment("<think>", 1.0), *more)),
)


@settings(deadline=None, max_examples=60)
@given(demonstrations=st.lists(DEMONSTRATIONS, min_size=1, max_size=4))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, demonstrations: list[Demonstration]) -> None:
    path = tmp_path_factory.mktemp("demonstrations") / "d.jsonl"
    write_demonstrations(path, demonstrations)
    assert load_demonstrations(path) == tuple(demonstrations)


def test_blanks_of_a_segment_are_kept(tmp_path: Path) -> None:
    demonstration = Demonstration("Q?", (Segment("\n\n<information>", 0.0), Segment(" a ", (0.0, 1.0))))
    write_demonstrations(tmp_path / "d.jsonl", [demonstration])
    assert load_demonstrations(tmp_path / "d.jsonl") == (demonstration,)


def test_parquet(tmp_path: Path) -> None:
    rows = [{"question": "Q?", "segments": [{"text": "a", "weight": 1.0}, {"text": "b", "weight": 0.0}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert load_demonstrations(tmp_path / "d.parquet")[0].segments == (Segment("a", 1.0), Segment("b", 0.0))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"question": ""}, 'expected a non-empty string "question"'),
        ({"segments": []}, 'expected a non-empty list "segments"'),
        ({"segments": ["a"]}, 'expected {"text", "weight"} as segment 1'),
        ({"segments": [{"text": "", "weight": 1}]}, 'expected a non-empty string "text" in segment 1'),
        ({"segments": [{"text": "a"}]}, 'as "weight" of segment 1, got nothing'),
        ({"segments": [{"text": "a", "weight": -1}]}, 'as "weight" of segment 1, got -1'),
        ({"segments": [{"text": "a", "weight": [1, True]}]}, 'as "weight" of segment 1'),
        ({"segments": [{"text": "a", "weight": []}]}, 'as "weight" of segment 1'),
        ({"segments": [{"text": "a", "weight": float("inf")}]}, 'as "weight" of segment 1, got inf'),
        ({"segments": [{"text": "a", "weight": 0}]}, "nothing to learn"),
    ],
)
def test_bad_rows(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    good: dict[str, object] = {"question": "Q?", "segments": [{"text": "a", "weight": 1}]}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **changes}) + "\n")
    with pytest.raises(DataError) as error:
        load_demonstrations(path)
    assert "d.jsonl, line 2: " in str(error.value)
    assert expected in str(error.value)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no demonstration in it"):
        load_demonstrations(tmp_path / "d.jsonl")
