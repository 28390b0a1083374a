"""Questions from Search-R1 parquet and from plain rows (FlashRAG), jsonl or parquet.

A question is identified by its source and its own id, or a hash of its text where it has none: never by its
place in a file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from rexrag.data.rows import Problem, Row, RowError, id_of, parse_rows, shown, text_of, valid_text
from rexrag.errors import DataError
from rexrag.types import Question

QUESTION_MARK: Final = "Question:"
_MAX_HOPS: Final = 1000
_SPLIT_NAMES: Final = frozenset({"train", "dev", "valid", "val", "validation", "test", "eval"})


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """The questions of one or more files in their order, and the bad rows that were skipped."""

    questions: tuple[Question, ...]
    skipped: tuple[Problem, ...]


def load_questions(paths: str | Path | Sequence[str | Path], *, skip_bad_rows: bool = False) -> QuestionSet:
    """Read question files.

    Args:
        paths: a path or several; the order of files and rows is kept.
        skip_bad_rows: collect bad rows in `skipped` instead of stopping at the first. The same identity twice
            stops the load all the same: no choice between the two would be right.

    Raises:
        DataError: a file that cannot be read, a bad row (with its file and line), the same (data_source, id)
            twice, or no question at all.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    seen: dict[str, Row] = {}
    questions: list[Question] = []
    skipped: list[Problem] = []
    for item in (item for path in files for item in parse_rows(path, parse=parse_question)):
        if isinstance(item, Problem):
            if not skip_bad_rows:
                raise DataError(f"{item}. Correct the row, or set data.skip_bad_rows = true")
            skipped.append(item)
            continue
        row, question = item
        if (problem := repeated_question(row, question, seen=seen)) is not None:
            raise DataError(str(problem))
        questions.append(question)
    if not questions:
        names = ", ".join(str(path) for path in files) or "no file given"
        raise DataError(f"no question to use ({names}; {len(skipped)} bad rows): at least one is needed")
    return QuestionSet(questions=tuple(questions), skipped=tuple(skipped))


def repeated_question(row: Row, question: Question, *, seen: dict[str, Row]) -> Problem | None:
    """Note a question under its identity; a problem where another row has the same one."""
    first = seen.setdefault(question.key, row)
    if first is row:
        return None
    return row.problem(
        f"data_source {question.data_source!r} with id {question.id!r} is also at {first.path}, {first.unit} "
        f"{first.number}; each must be unique: give the rows ids of their own, or the files different data_source"
    )


def parse_question(row: Row) -> Question:
    """One row as a question.

    Raises:
        RowError: no question, no answer, or a column of the wrong type.
    """
    values = row.values
    question = _question_text(values)
    identity = id_of(values)
    if identity is None:
        identity = hashlib.sha256(question.encode("utf-8")).hexdigest()[:16]
    return Question(
        id=identity,
        data_source=text_of(values, "data_source", required=False) or default_source(row.path),
        question=question,
        golden_answers=_golden_answers(values),
        hops=_hops(values.get("hops")),
        gold_passage_ids=_passage_ids(values.get("gold_passage_ids")),
        row=values,
    )


def default_source(path: Path) -> str:
    """The source of rows without one: the file's name, or its folder's where the name only says the split."""
    return path.resolve().parent.name or path.stem if path.stem.lower() in _SPLIT_NAMES else path.stem


def _question_text(values: Mapping[str, object]) -> str:
    text = text_of(values, "question") if values.get("question") is not None else _text_of_prompt(values.get("prompt"))
    assert text is not None, "a required text is never None"
    return text


def _text_of_prompt(prompt: object) -> str:
    messages = _items(prompt)
    if messages is None:
        raise RowError('expected a string "question", or chat messages in "prompt"; got neither')
    users = [m for m in messages if isinstance(m, Mapping) and m.get("role") == "user"]
    content = users[-1].get("content") if users else None
    if not isinstance(content, str) or QUESTION_MARK not in content:
        raise RowError(f'expected "{QUESTION_MARK} …" in the last user message of "prompt", as there is no "question"')
    text = content.rpartition(QUESTION_MARK)[2].strip()
    if not text:
        raise RowError(f'nothing follows the last "{QUESTION_MARK}" of "prompt"')
    return valid_text(text, "prompt")


def _golden_answers(values: Mapping[str, object]) -> tuple[str, ...]:
    reward_model = values.get("reward_model")
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    target = truth.get("target") if isinstance(truth, Mapping) else None
    name = "golden_answers" if target is None else "reward_model.ground_truth.target"
    answers = values.get("golden_answers") if target is None else target
    listed = [answers] if isinstance(answers, str) else _items(answers)
    if listed is None or not all(isinstance(answer, str) for answer in listed):
        raise RowError(f'expected a string or a list of strings in "{name}", got {shown(answers)}')
    kept = tuple(valid_text(answer.strip(), name) for answer in _strings(listed) if answer.strip())
    if not kept:
        raise RowError(f'expected at least one non-empty answer in "{name}", got {shown(answers)}')
    return kept


def _hops(value: object) -> int | None:
    # A column with gaps comes as floats with NaN.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
    if not whole or not isinstance(value, int | float) or not 1 <= value <= _MAX_HOPS:
        raise RowError(f'expected a whole number from 1 to {_MAX_HOPS} in "hops", got {shown(value)}')
    return int(value)


def _passage_ids(value: object) -> tuple[str, ...] | None:
    """None where nothing is known of gold passages; an empty list says no more than that."""
    if value is None:
        return None
    ids = _items(value)
    if ids is None or not all(isinstance(i, str | int) and not isinstance(i, bool) for i in ids):
        raise RowError(f'expected a list of passage ids in "gold_passage_ids", got {shown(value)}')
    return tuple(valid_text(str(i), "gold_passage_ids") for i in ids) or None


def _items(value: object) -> list[object] | None:
    """The items of a list, tuple or array; None for anything else."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else None


def _strings(values: Iterable[object]) -> Iterable[str]:
    return (value for value in values if isinstance(value, str))
