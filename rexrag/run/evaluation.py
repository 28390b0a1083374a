"""An evaluation during a run: greedy episodes of all actors, whatever happens to some of them meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from rexrag.errors import EngineBrokenError, EnginePassError, PartDiedError, RetrieverError, RexragError, counted
from rexrag.run.fleet import Fleet
from rexrag.run.supervisor import Supervisor
from rexrag.types import EpisodeScore, Question, WeightVersion

LOG = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 3
"""Attempts in a row that score no question."""
PAUSE_S: Final = 1.0
_MAY_PASS: Final = (PartDiedError, EngineBrokenError, EnginePassError, RetrieverError)


def evaluate(
    questions: Sequence[Question], *, version: WeightVersion, split: str, fleet: Fleet, supervisor: Supervisor
) -> list[EpisodeScore]:
    """The scores of all questions, in their order.

    Where an actor or its engine breaks meanwhile, or a search fails in the end, what the others have scored is kept,
    and the rest is asked of the actors that there are then.

    Raises:
        RetrieverError, EnginePassError, RunFailure: several attempts in a row have scored no question; what the last
            one failed with.
        Interrupted: a stop signal came.
    """
    scores: dict[str, EpisodeScore] = {}
    num_in_vain = 0
    while missing := [question for question in questions if question.key not in scores]:
        before = len(scores)
        failure = _ask(missing, scores, version=version, split=split, fleet=fleet, supervisor=supervisor)
        num_in_vain = 0 if len(scores) > before else num_in_vain + 1
        if failure is None:
            break
        if num_in_vain == MAX_ATTEMPTS:
            raise failure
        LOG.warning(
            "the evaluation at step %d goes on with the %s that nobody has scored: %s",
            *(version.step, counted(len(questions) - len(scores), "question"), failure),
        )
        supervisor.look_for(PAUSE_S)  # an actor whose engine broke says so soon, and is replaced
    return [scores[question.key] for question in questions]


def _ask(
    questions: Sequence[Question],
    scores: dict[str, EpisodeScore],
    *,
    version: WeightVersion,
    split: str,
    fleet: Fleet,
    supervisor: Supervisor,
) -> RexragError | None:
    """Ask all actors at work, each for its share; what one failed with, once all have ended."""
    failure: RexragError | None = None
    supervisor.look()
    supervisor.until_current(version.step)
    for share in fleet.evaluate(questions, version=version):
        try:
            told = supervisor.wait(share, what=f"the run waits for {split} scores", progress=fleet.num_tokens)
        except _MAY_PASS as error:
            failure = failure or error
        else:
            scores |= {score.question_id: score for score in told}
    return failure
