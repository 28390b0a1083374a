from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import ConfigError
from rexrag.reward import exact_match, f1_score, is_correct, load_reward, normalize_answer, try_reward
from rexrag.types import Question


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("A.N. the-Other", "theother"),  # punctuation goes first: "a.n." becomes the article "an"
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("«Zürich»", "«zürich»"),
        ("", ""),
    ],
)
def test_normalize_answer(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


def test_any_gold_answer_matches() -> None:
    assert exact_match("the Paris.", ["London", "paris"]) == 1.0
    assert exact_match("Paris, France", ["London", "paris"]) == 0.0
    assert exact_match("Paris", []) == 0.0


def test_a_gold_answer_without_words_is_compared_as_it_stands() -> None:
    """An article by itself, or a sign: no other text that normalisation leaves nothing of is the same."""
    for gold, right, wrong in [("A", "a ", "."), ("?", "?", "the"), ("The The", "the the", "")]:
        for score in (exact_match, f1_score):
            assert score(right, [gold]) == 1.0
            assert score(wrong, [gold]) == 0.0
    assert exact_match("the", ["A", "the"]) == 1.0


def test_f1_by_hand() -> None:
    # words {george, washington} against {george, w, bush}: 1 common of 2 and 3
    assert f1_score("George Washington", ["George W. Bush"]) == pytest.approx(2 * 1 / 5)
    assert f1_score("George Washington", ["Lincoln", "Washington"]) == pytest.approx(2 / 3), "best gold"
    assert f1_score("go go", ["go"]) == pytest.approx(2 / 3), "words count as often as they occur"
    assert f1_score("red", ["blue"]) == 0.0
    assert f1_score("the", ["blue"]) == 0.0
    assert f1_score("red", []) == 0.0


texts = st.text("ab the,.", max_size=12)


@given(prediction=texts, golds=st.lists(texts, max_size=3))
def test_f1_is_a_share_and_one_on_exact_matches(prediction: str, golds: list[str]) -> None:
    f1 = f1_score(prediction, golds)
    assert 0.0 <= f1 <= 1.0
    if exact_match(prediction, golds):
        assert f1 == 1.0


def test_is_correct() -> None:
    assert is_correct(1.0, 1.0, "em")
    assert not is_correct(0.0, 0.5, "em + format")
    assert not is_correct(0.0, 0.5, "my.module:reward")
    assert is_correct(0.0, 0.5, "f1")
    assert not is_correct(0.0, 0.0, "f1")


@pytest.mark.parametrize(
    ("kind", "prediction", "expected"),
    [
        ("em", "Paris", 1.0),
        ("em", "Paris town", 0.0),
        ("em", None, 0.0),
        ("f1", "Paris town", 2 / 3),
        ("f1", None, 0.0),
        ("em + format", "Paris", 1.0 + 0.2 * 0.75),
        ("em + format", None, 0.2 * 0.75),
    ],
)
def test_built_in_rewards(kind: str, prediction: str | None, expected: float) -> None:
    reward = load_reward(kind, format_weight=0.2)
    assert reward(prediction, golds=["paris"], row={}, valid_share=0.75) == pytest.approx(expected)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="'rouge' is unknown"):
        load_reward("rouge")


def test_a_function_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_reward_module.py").write_text(
        "import numpy as np\n"
        "def length(prediction, golds, row):\n"
        "    return np.float32(len(prediction) + len(golds) + row['bonus'])\n"
        "def broken(prediction, golds, row):\n"
        "    return float('nan')\n"
        "def silent(prediction, golds, row):\n"
        "    pass\n"
        "CONSTANT = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    reward = load_reward("users_reward_module:length")
    value = reward("ab", golds=["x"], row={"bonus": 10}, valid_share=1.0)
    assert (value, type(value)) == (13.0, float)
    assert reward(None, golds=["x"], row={"bonus": 10}, valid_share=1.0) == 11.0

    with pytest.raises(ConfigError, match="returned nan"):
        load_reward("users_reward_module:broken")("a", golds=["x"], row={}, valid_share=1.0)
    with pytest.raises(ConfigError, match="returned None"):
        load_reward("users_reward_module:silent")("a", golds=["x"], row={}, valid_share=1.0)
    with pytest.raises(ConfigError, match="has no function absent"):
        load_reward("users_reward_module:absent")
    with pytest.raises(ConfigError, match="has no function CONSTANT"):
        load_reward("users_reward_module:CONSTANT")
    with pytest.raises(ConfigError, match="no_such_module_here cannot be imported"):
        load_reward("no_such_module_here:f")


def test_a_reward_of_the_users_that_raises_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "raising_reward.py").write_text("def score(p, g, row):\n    return row['gone']\n")
    reward = load_reward("raising_reward:score")
    with pytest.raises(
        ConfigError, match=r"raised KeyError: 'gone' \(.*raising_reward\.py, line 2\) for the answer 'x'"
    ):
        reward("x", golds=["a"], row={}, valid_share=1.0)


def test_a_reward_below_0_is_refused_where_it_is_taken_for_a_likelihood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "signed_reward.py").write_text("def score(p, g, row):\n    return 1.0 if p in g else -0.5\n")
    question = Question(id="1", data_source="world", question="Who?", golden_answers=("a",))
    try_reward(load_reward("signed_reward:score"), question)
    with pytest.raises(
        ConfigError, match=r"returned -0\.5 for the answer None; .* \"normalized\" .* must be at least 0"
    ):
        try_reward(load_reward("signed_reward:score", never_negative=True), question)


@given(weight=st.floats(0, 1), share=st.floats(0, 1), answer=st.sampled_from([None, "", "a", "b"]))
def test_rewards_of_ours_are_never_negative(weight: float, share: float, answer: str | None) -> None:
    for kind in ("em", "f1", "em + format"):
        assert load_reward(kind, format_weight=weight)(answer, golds=["a"], row={}, valid_share=share) >= 0
