"""Scores of a finished rollout: the answer in the policy's own tokens against the gold answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rexrag.reward import RewardFunction, exact_match, f1_score, is_correct, normalize_answer
from rexrag.types import Passage, Question


@dataclass(frozen=True, kw_only=True)
class Scores:
    """`reward` is what is learnt from; `correct` is §2's (it decides what a dead end is)."""

    reward: float
    em: float
    f1: float
    correct: bool


NO_SCORES = Scores(reward=0.0, em=0.0, f1=0.0, correct=False)
"""Of a masked trajectory: it counts nowhere."""


class Scorer:
    """The reward function of a run, and what counts as gold in retrieved passages."""

    def __init__(self, reward: RewardFunction, *, kind: str) -> None:
        self._reward = reward
        self._kind = kind
