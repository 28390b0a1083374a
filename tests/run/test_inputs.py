"""What a run reads before it starts."""

from __future__ import annotations

import pytest

from rexrag.run.inputs import _some_of
from rexrag.types import Question


@pytest.mark.parametrize(("limit", "num"), [(None, 60), (60, 60), (90, 60), (6, 6), (1, 1)])
def test_an_evaluation_of_some_questions_has_each_sources_share(limit: int | None, num: int) -> None:
    sources = ["nq"] * 30 + ["hotpot"] * 20 + ["musique"] * 10
    questions = tuple(
        Question(id=str(i), data_source=source, question="q", golden_answers=("a",)) for i, source in enumerate(sources)
    )
    notes: list[str] = []
    some = _some_of(questions, limit, what="dev", notes=notes)
    assert len({question.key for question in some}) == num
    if num == 6:
        assert [question.data_source for question in some] == ["nq"] * 3 + ["hotpot"] * 2 + ["musique"]
    assert notes == ([] if num == 60 else [f"{num} of 60 dev questions are evaluated (eval.max_questions)"])
