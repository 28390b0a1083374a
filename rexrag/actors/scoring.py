"""Scores of a finished rollout: the answer in the policy's own tokens against the gold answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

from rexrag.retrieval.scripts import is_spaceless
from rexrag.reward import RewardFunction, exact_match, f1_score, is_correct, is_user_reward, normalize_answer
from rexrag.types import Passage, Question


@dataclass(frozen=True, kw_only=True)
class Scores:
    """`reward` is what is learnt from; `correct` decides what a dead end is (§2)."""

    reward: float
    em: float
    f1: float
    correct: bool


_TAG: Final = re.compile(r"</?information>")

NO_SCORES: Final = Scores(reward=0.0, em=0.0, f1=0.0, correct=False)
"""Of a masked trajectory: it counts nowhere."""


class Scorer:
    """The reward function of a run, and what counts as gold among shown passages.

    A function of the user's own runs in a thread, so that it does not hold up the event loop: one call at a time,
    since it may keep things between calls.
    """

    def __init__(self, reward: RewardFunction, *, kind: str) -> None:
        self._reward = reward
        self._kind = kind
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward") if is_user_reward(kind) else None

    async def score(self, answer: str | None, *, question: Question, valid_share: float) -> Scores:
        """Scores of an answer, None where there is none; `valid_share` of the turns had a complete action."""
        golds = question.golden_answers
        em = exact_match(answer, golds) if answer is not None else 0.0
        f1 = f1_score(answer, golds) if answer is not None else 0.0
        call = partial(self._reward, answer, golds=golds, row=question.row, valid_share=valid_share)
        reward = (
            call() if self._thread is None else await asyncio.get_running_loop().run_in_executor(self._thread, call)
        )
        return Scores(reward=reward, em=em, f1=f1, correct=is_correct(em, f1, self._kind))

    def shows_gold(self, question: Question, *, passages: Sequence[Passage], shown: str) -> bool:
        """Whether a gold passage is among those shown, or without ids a gold answer stands in the shown text.

        Answers are compared as whole normalised words, so that "Oman" is not found in "Romania"; scripts without
        spaces have none.
        """
        if question.gold_passage_ids is not None:
            return any(passage.id in question.gold_passage_ids for passage in passages)
        # Normalising takes brackets and slashes away, and would join a word with the tag beside it.
        text = f" {normalize_answer(_TAG.sub(' ', shown))} "
        return any(gold and _as_words(gold) in text for gold in map(normalize_answer, question.golden_answers))

    @staticmethod
    def knows_gold(question: Question) -> bool:
        """Whether `shows_gold` can tell: with passage ids, or with an answer that has words."""
        return question.gold_passage_ids is not None or any(map(normalize_answer, question.golden_answers))


def _as_words(gold: str) -> str:
    """A text with the spaces that words have around them."""
    before, after = (" " if not is_spaceless(letter) else "" for letter in (gold[0], gold[-1]))
    return f"{before}{gold}{after}"
