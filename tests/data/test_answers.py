"""`rexrag.data.answers`: where the field's data sets have their answers, and how they write them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.data.answers import golden_answers, listed_in
from rexrag.data.rows import RowError


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"golden_answers": ["a", "b"]}, ("a", "b")),
        ({"golden_answers": '["a", "b"]'}, ("a", "b")),
        ({"golden_answers": ["['a', \"b's\"]"]}, ("a", "b's")),
        ({"golden_answers": ["a", None, " ", float("nan")]}, ("a",)),
        ({"golden_answers": [1985, 3.5, 7.0]}, ("1985", "3.5", "7")),
        ({"golden_answers": 1985}, ("1985",)),
        ({"golden_answers": np.array(["a", "b"], dtype=object)}, ("a", "b")),
        ({"answer": "a"}, ("a",)),
        ({"answer": ["a", "b"]}, ("a", "b")),
        ({"answer": "a", "answer_aliases": ["b", "a"]}, ("a", "b")),
        ({"answer": {"value": "a", "aliases": ["a", "b"], "normalized_aliases": ["x"]}}, ("a", "b")),
        ({"answers": {"text": ["a", "b"], "answer_start": [1, 2]}}, ("a", "b")),
        ({"possible_answers": '["a", "b"]'}, ("a", "b")),
        ({"reward_model": {"ground_truth": {"target": '["a"]'}}}, ("a",)),
        ({"reward_model": {"ground_truth": "a"}, "golden_answers": ["other"]}, ("a",)),
        ({"reward_model": {"ground_truth": ["a", "b"]}}, ("a", "b")),
        ({"reward_model": {"ground_truth": {"target": None}}, "golden_answers": ["a"]}, ("a",)),
        ({"reward_spec": {"method": "rule", "ground_truth": {"target": np.array(["a"])}}}, ("a",)),
    ],
)
def test_places_and_forms(row: Mapping[str, object], expected: tuple[str, ...]) -> None:
    assert golden_answers(row) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "a", "id": 1}, "got nothing; the columns are id, label"),
        ({"answer": {"text_of_it": "a"}}, 'as target, value, text, aliases in "answer"'),
        ({"golden_answers": [["a"]]}, 'a list of strings in "golden_answers"'),
        ({"golden_answers": True}, 'in "golden_answers", got True'),
        ({"golden_answers": "[]"}, "at least one non-empty answer"),
        (
            {"reward_model": {"ground_truth": {"target": []}}, "golden_answers": ["a"]},
            "reward_model.ground_truth.target",
        ),
    ],
)
def test_what_is_no_answer(row: Mapping[str, object], message: str) -> None:
    with pytest.raises(RowError) as error:
        golden_answers(row)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("['A' 'B']", ["A", "B"]),
        ("['A'\n 'B']", ["A", "B"]),
        ("[None, 'x', 2.5]", ["x", "2.5"]),
        ("[citation needed]", None),
        ("['O'Brien']", None),
        ('["a", ["b"]]', None),
        ("A", None),
        ("[", None),
    ],
)
def test_texts_of_lists(text: str, expected: list[str] | None) -> None:
    assert listed_in(text) == expected


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=4))
def test_any_list_that_python_writes_is_read_back(items: list[str]) -> None:
    assert listed_in(repr(items)) == items


@given(st.text())
def test_any_text_is_a_list_or_itself(text: str) -> None:
    found = listed_in(f"[{text}]")
    assert found is None or all(isinstance(item, str) for item in found)
