"""The questions of a run as the buffer keeps them: packed, since it needs one at a time."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping

from rexrag.types import Question


class PackedQuestions(Mapping[str, Question]):
    """Questions by key, in the order given; each takes less than half of the memory that the object does."""

    def __init__(self, questions: Iterable[Question]) -> None:
        self._packed = {question.key: pickle.dumps(question, protocol=5) for question in questions}

    def __getitem__(self, key: str) -> Question:
        question: Question = pickle.loads(self._packed[key])  # packed above, in this process
        return question

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)
