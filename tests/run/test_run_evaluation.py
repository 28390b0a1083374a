"""An evaluation that is hurt: what was scored is kept, the rest is asked again, and nothing for ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from local_parts import LocalRef, LocalSupervisor, score_of
from replay_helpers import make_questions

from rexrag.errors import EngineBrokenError, EnginePassError, Interrupted, PartDiedError, RetrieverError, RunFailure
from rexrag.run.evaluation import evaluate
from rexrag.run.signals import StopSignal
from rexrag.types import EpisodeScore, Question, WeightVersion

VERSION = WeightVersion(incarnation="1", step=3)
QUESTIONS = make_questions(7)


class Actors:
    """Three of them, each asked for its share; `fails` says whether one fails, by the round and its number."""

    is_current, num_working = True, 3

    def __init__(self, fails: Callable[[int, int], Exception | None]) -> None:
        self.asked: list[list[str]] = []
        self._fails = fails

    def evaluate(self, questions: Sequence[Question], *, version: WeightVersion) -> list[LocalRef]:
        self.asked.append([question.key for question in questions])
        shares = [questions[i::3] for i in range(3) if questions[i::3]]
        return [self._share(number, share, version) for number, share in enumerate(shares)]

    def _share(self, number: int, share: Sequence[Question], version: WeightVersion) -> LocalRef:
        error = self._fails(len(self.asked), number)
        return LocalRef([score_of(question, version) for question in share], error=error)

    def num_tokens(self) -> int:
        return 0

    def check(self) -> None:
        pass


def ask(actors: Actors, *, stop: StopSignal | None = None) -> list[EpisodeScore]:
    supervisor = LocalSupervisor(fleet=cast("Any", actors), stop=stop or StopSignal())
    return evaluate(
        QUESTIONS, version=VERSION, split="dev", fleet=cast("Any", actors), supervisor=cast("Any", supervisor)
    )


KEYS = [question.key for question in QUESTIONS]


@pytest.mark.parametrize(
    "error", [PartDiedError("gone"), EngineBrokenError("x"), EnginePassError("y"), RetrieverError("z")]
)
def test_what_others_have_scored_is_kept_and_the_order_is_that_of_the_questions(error: Exception) -> None:
    actors = Actors(lambda attempt, number: error if (attempt, number) in ((1, 0), (2, 0)) else None)
    assert [score.question_id for score in ask(actors)] == KEYS
    assert [len(asked) for asked in actors.asked] == [7, 3, 1], "the first of three has 3 of 7, then 1 of 3"


def test_a_loss_in_every_attempt_is_borne_as_long_as_questions_are_scored() -> None:
    actors = Actors(lambda attempt, number: PartDiedError("gone") if number and attempt < 7 else None)
    assert [score.question_id for score in ask(actors)] == KEYS
    assert len(actors.asked) >= 4, "more often than an evaluation may fail in vain"


def test_an_evaluation_in_which_nobody_scores_ends_with_the_cause() -> None:
    actors = Actors(lambda attempt, number: PartDiedError(f"attempt {attempt}, actor {number}"))
    with pytest.raises(PartDiedError, match="attempt 3, actor 0"):
        ask(actors)
    assert len(actors.asked) == 3


def test_what_does_not_pass_ends_it_at_once() -> None:
    actors = Actors(lambda attempt, number: RunFailure("another version"))
    with pytest.raises(RunFailure, match="another version"):
        ask(actors)
    assert len(actors.asked) == 1


def test_a_stop_is_heard() -> None:
    stop = StopSignal()
    stop.ask("SIGTERM")
    with pytest.raises(Interrupted):
        ask(Actors(lambda attempt, number: None), stop=stop)
