"""What a replay buffer is built from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from rexrag.errors import DataError
from rexrag.types import Question


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """What a buffer is built from. Staleness in learner steps, times in seconds.

    Attributes:
        first_step: the step that the run began after: 0, or that of another run's checkpoint.
        num_steps: learner steps of the whole run: no group is issued that none of them will consume; None: no end.
        max_attempts: times that a question is asked again after its group was dropped, before it is given up.
        refill: drop groups whose rows have equal rewards, and ask other questions in their place.
        segment_bytes: size at which the log begins a new segment.
        log_file: the run's `log.jsonl`, for what the buffer has to say.
    """

    folder: Path
    questions: tuple[Question, ...]
    groups_per_step: int
    max_staleness: int
    seed: int
    lease_timeout_s: float
    lease_deadline_s: float
    max_attempts: int
    segment_bytes: int
    first_step: int
    num_steps: int | None
    refill: bool
    log_file: Path | None

    def without_questions(self) -> ReplaySettings:
        """The same for who keeps the questions elsewhere."""
        slim = copy.copy(self)
        object.__setattr__(slim, "questions", ())
        return slim

    def __post_init__(self) -> None:
        if not self.questions:
            raise DataError("there is no question to train on: data.train names files without a usable row")
        seen: set[str] = set()
        for question in self.questions:
            if question.key in seen:
                raise DataError(f"question {question.key} occurs twice: (data_source, id) must be unique in data.train")
            seen.add(question.key)
