"""`rexrag.actors.scoring`: what counts as gold in what was shown."""

from __future__ import annotations

import pytest

from rexrag.actors.scoring import Scorer
from rexrag.env.observation import format_observation
from rexrag.reward import load_reward
from rexrag.types import Passage, Question


def test_a_gold_answer_is_found_beside_the_tags() -> None:
    shown = format_observation([Passage(id="1", title="T", text="The capital is Paris.")])
    question = Question(id="1", data_source="test", question="q", golden_answers=("Paris",))
    assert Scorer(load_reward("em"), kind="em").shows_gold(question, passages=[], shown=shown)


def test_with_ids_a_gold_passage_is_one_that_was_shown() -> None:
    question = Question(id="1", data_source="test", question="q", golden_answers=("Paris",), gold_passage_ids=("7",))
    passages = [Passage(id=str(number), title="T", text="Paris") for number in (3, 7)]
    scorer = Scorer(load_reward("em"), kind="em")
    assert scorer.shows_gold(question, passages=passages, shown="")
    assert not scorer.shows_gold(question, passages=passages[:1], shown="Paris")


@pytest.mark.parametrize(
    ("gold", "shown", "found"),
    [
        ("Oman", "Romania is a country.", False),
        ("Oman", "Oman, a country", True),
        ("利伯维尔", "利伯维尔是加蓬共和国的首都", True),
        ("東京 Tower", "高い東京 Tower です", True),
        ("東京 Tower", "高い東京 Towers です", False),
    ],
)
def test_a_gold_answer_is_found_as_whole_words_where_a_script_has_them(gold: str, shown: str, found: bool) -> None:
    question = Question(id="1", data_source="test", question="q", golden_answers=(gold,))
    assert Scorer(load_reward("em"), kind="em").shows_gold(question, passages=[], shown=shown) is found
