"""Questions from Search-R1 parquet and from plain rows (FlashRAG), jsonl or parquet.

A question is identified by its source and its own id, or a hash of its text where it has none: never by its
place in a file.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Final

import numpy as np

from rexrag.data.answers import golden_answers
from rexrag.data.paths import matching_files
from rexrag.data.rows import MAX_PROBLEMS, Problem, Row, RowError, id_of, parse_rows, shown, text_of, valid_text
from rexrag.errors import DataError, counted
from rexrag.types import Question

QUESTION_MARK: Final = "Question:"
_MAX_HOPS: Final = 1000
_SHARD: Final = re.compile(
    r"(?:(?:^|[-_.])(?:\d+-of-\d+|\d{5,})(?:-[0-9a-f]{8,}[-0-9a-f]*)?|^\d{4})(?:\.\w+)?$", re.IGNORECASE
)
"""What names of shards end with: -00000-of-00002, also with a fingerprint, or a long number (0000 alone)."""
_SHARD_FOLDERS: Final = frozenset({"", "data", "default", "part"})
"""Folders and names of shards that say nothing of what is in them, in the layouts of the Hugging Face hub and Spark."""
_SPLIT_NAMES: Final = frozenset({"train", "dev", "valid", "val", "validation", "test", "eval"})


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """The questions of one or more files in their order, and what was done with odd rows.

    Attributes:
        num_skipped: bad rows that were skipped; `skipped` are the first of them.
        num_repeated: questions without an id of their own whose text stood before: told apart by their order.
    """

    questions: tuple[Question, ...]
    skipped: tuple[Problem, ...]
    num_skipped: int
    num_repeated: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should be told once, a line each."""
        notes = []
        if self.num_skipped:
            rows = self.num_skipped + len(self.questions)
            notes.append(f"bad rows skipped: {self.num_skipped} of {rows}, the first: {self.skipped[0]}")
        if self.num_repeated:
            notes.append(repeated_note(self.num_repeated))
        return tuple(notes)


def load_questions(
    paths: str | Path | Sequence[str | Path],
    *,
    skip_bad_rows: bool = False,
    skip_by: str = "set data.skip_bad_rows = true",
    keep_rows: bool = True,
) -> QuestionSet:
    """Read question files.

    Args:
        paths: a path or pattern (`shards/*.parquet`), or several; the order of files and rows is kept.
        skip_bad_rows: count bad rows instead of stopping at the first. The same identity twice stops the load all
            the same: no choice between the two would be right.
        skip_by: how the caller's user asks for that, for the message.
        keep_rows: whether `Question.row` is wanted. Columns beside those that are read here may hold whole articles.

    Raises:
        DataError: a file that cannot be read, a bad row (with its file and line), the same (data_source, id)
            twice, or no question at all.
    """
    listed = [paths] if isinstance(paths, str | Path) else paths
    files = [file for path in listed for file in matching_files(path)]
    identities = Identities()
    questions: list[Question] = []
    skipped: list[Problem] = []
    num_skipped = 0
    for item in (item for path in files for item in parse_rows(path, parse=parse_question)):
        if isinstance(item, Problem):
            if not skip_bad_rows:
                raise DataError(f"{item}. Correct the row, or {skip_by}")
            num_skipped += 1
            skipped += [item][: MAX_PROBLEMS - len(skipped)]
            continue
        question = identities.place(*item)
        if isinstance(question, Problem):
            raise DataError(str(question))
        questions.append(question if keep_rows else replace(question, row={}))
    if not questions:
        names = ", ".join(str(path) for path in files) or "no file given"
        raise DataError(f"no question to use ({names}; {counted(num_skipped, 'bad row')}): at least one is needed")
    return QuestionSet(
        questions=tuple(questions),
        skipped=tuple(skipped),
        num_skipped=num_skipped,
        num_repeated=identities.num_repeated,
    )


class Identities:
    """Gives each question of a load an identity that no other has."""

    def __init__(self) -> None:
        self.num_repeated = 0
        self._places: dict[str, str] = {}
        self._occurrences: Counter[str] = Counter()

    def place(self, row: Row, question: Question) -> Question | Problem:
        """The question under its identity; a problem where another row has the same id.

        Rows with the same text and no id are told apart by their order among themselves, which no other row
        changes.
        """
        if own_id(row.values) is None:
            self._occurrences[question.key] += 1
            if (number := self._occurrences[question.key]) > 1:
                self.num_repeated += 1
                question = replace(question, id=f"{question.id}-{number}")
        place = f"{row.path}, {row.unit} {row.number}"
        first = self._places.setdefault(question.key, place)
        if first is place:
            return question
        return row.problem(
            f"data_source {question.data_source!r} with id {question.id!r} is also at {first}; "
            "each must be unique: give the rows ids of their own, or the files different data_source"
        )


def repeated_note(count: int) -> str:
    return (
        f"questions without an id that have the text of an earlier one: {count}; they are told apart by their order, "
        "so keep it, or give the rows ids"
    )


def own_id(values: Mapping[str, object]) -> str | None:
    """The id that a question's row has itself."""
    return id_of(values, names=("id", "_id", "question_id"))


def parse_question(row: Row) -> Question:
    """One row as a question.

    Raises:
        RowError: no question, no answer, or a column of the wrong type.
    """
    values = row.values
    question = _question_text(values)
    identity = own_id(values)
    if identity is None:
        identity = hashlib.sha256(question.encode("utf-8")).hexdigest()[:16]
    return Question(
        id=identity,
        data_source=text_of(values, "data_source", required=False) or default_source(row.path),
        question=question,
        golden_answers=golden_answers(values),
        hops=_hops(values.get("hops")),
        gold_passage_ids=_passage_ids(values.get("gold_passage_ids")),
        row=values,
    )


def default_source(path: Path) -> str:
    """The source of rows without one: the file's name, or its folder's where the name only says split or shard."""
    stem = _SHARD.sub("", path.stem)
    dull = _SPLIT_NAMES | _SHARD_FOLDERS if stem != path.stem else _SPLIT_NAMES
    # A file may be a link into a store, whose names say nothing.
    folder = path.parent.resolve()
    names = (stem, *takewhile(_is_the_users, (one.name for one in (folder, *folder.parents))))
    found = next((name for name in names if name and name.lower() not in dull), path.stem)
    return found.encode("utf-8", "backslashreplace").decode()


def _is_the_users(folder: str) -> bool:
    """Where a job's files are unpacked, the folder is named by their content and changes with any of them."""
    return not folder.startswith("_ray_pkg_")


def _question_text(values: Mapping[str, object]) -> str:
    extra = values.get("extra_info")
    if values.get("question") is not None:
        text = text_of(values, "question")
    elif isinstance(extra, Mapping) and isinstance(extra.get("question"), str) and extra["question"].strip():
        text = text_of(extra, "question")
    else:
        text = _text_of_prompt(values)
    assert text is not None, "a required text is never None"
    return text


def _text_of_prompt(values: Mapping[str, object]) -> str:
    prompt = values.get("prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _items(prompt)
    if messages is None:
        columns = ", ".join(sorted(map(str, values))) or "none"
        raise RowError(
            f'expected a string "question", or chat messages in "prompt"; got neither, the columns are {columns}'
        )
    users = [m for m in messages if isinstance(m, Mapping) and m.get("role") == "user"]
    content = _text_of_content(users[-1].get("content")) if users else ""
    if QUESTION_MARK not in content:
        raise RowError(f'expected "{QUESTION_MARK} …" in the last user message of "prompt", as there is no "question"')
    # Examples of a prompt stand on lines of their own; within its line a question may hold the words once more.
    line_start = content.rfind("\n", 0, content.rfind(QUESTION_MARK)) + 1
    text = content[line_start:].partition(QUESTION_MARK)[2].strip()
    if not text:
        raise RowError(f'nothing follows the last "{QUESTION_MARK}" of "prompt"')
    return valid_text(text, "prompt")


def _text_of_content(content: object) -> str:
    """The text of a message, which may come in parts: `[{"type": "text", "text": …}]`."""
    if isinstance(content, str):
        return content
    parts = [part.get("text") for part in _items(content) or [] if isinstance(part, Mapping)]
    return "".join(_strings(parts))


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
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    ids = _items(value)
    if ids is None:
        raise RowError(f'expected a list of passage ids in "gold_passage_ids", got {shown(value)}')
    named = [id_of({"gold_passage_ids": i}, names=("gold_passage_ids",)) for i in ids]
    return tuple(name for name in named if name is not None) or None


def _items(value: object) -> list[object] | None:
    """The items of a list, tuple or array; None for anything else."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else None


def _strings(values: Iterable[object]) -> Iterable[str]:
    return (value for value in values if isinstance(value, str))
