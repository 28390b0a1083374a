"""What a data file holds and what is wrong with it: `rexrag data check`. Goes over all rows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from rexrag.data.answers import has_bare_list
from rexrag.data.corpus import parse_passage, repeated_ids
from rexrag.data.demonstrations import parse_demonstration
from rexrag.data.questions import Identities, parse_question, repeated_note
from rexrag.data.rows import MAX_PROBLEMS, Problem, Row, parse_rows, read_rows
from rexrag.errors import DataError, counted

Kind = Literal["questions", "corpus", "demonstrations", "unknown"]

_KIND_BY_COLUMN: Final[tuple[tuple[str, Kind], ...]] = (
    ("segments", "demonstrations"),
    ("question", "questions"),
    ("prompt", "questions"),
    ("golden_answers", "questions"),
    ("reward_model", "questions"),
    ("reward_spec", "questions"),
    ("answers", "questions"),
    ("answer", "questions"),
    ("contents", "corpus"),
    ("text", "corpus"),
)


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Counts over the good rows of a file, and its problems.

    Attributes:
        rows: all rows, bad ones included; blank lines are none.
        by_source, by_hops, num_with_gold_passages: of questions; a row without hops counts under `None`.
        problems: the first of them, `num_problems` counts all.
        notes: what is done with rows that are odd, but no problem.
    """

    path: Path
    kind: Kind
    rows: int
    by_source: dict[str, int]
    by_hops: dict[int | None, int]
    num_with_gold_passages: int
    problems: tuple[Problem, ...]
    num_problems: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """The report as one JSON object."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "rows": self.rows,
            "by_source": self.by_source,
            "by_hops": {"unknown" if hops is None else str(hops): n for hops, n in self.by_hops.items()},
            "with_gold_passages": self.num_with_gold_passages,
            "notes": list(self.notes),
            "num_problems": self.num_problems,
            "problems": [{"file": str(p.path), "line": p.number, "message": p.message} for p in self.problems],
        }


class _Tally:
    """Counts that grow row by row."""

    def __init__(self) -> None:
        self.rows = 0
        self.by_source: Counter[str] = Counter()
        self.by_hops: Counter[int | None] = Counter()
        self.num_with_gold_passages = 0
        self.notes: list[str] = []


def check_file(path: str | Path) -> CheckReport:
    """Read a whole file of questions, passages or demonstrations; what is wrong is in the report, nothing raises."""
    file = Path(path)
    kind: Kind = "unknown"
    tally = _Tally()
    problems: list[Problem] = []
    num_problems = 0
    try:
        kind = recognise(file)
        # One by one, so that what came before a broken block is kept.
        for problem in _problems(file, kind, tally):
            num_problems += 1
            problems += [problem][: MAX_PROBLEMS - len(problems)]
        fault = None if tally.rows else "no rows; at least one is needed"
    except DataError as error:
        fault = str(error).removeprefix(f"{file}: ")
    if fault is not None:
        num_problems += 1
        problems.append(Problem(path=file, unit="file", number=None, message=fault))
    return CheckReport(
        path=file,
        kind=kind,
        rows=tally.rows,
        by_source=dict(sorted(tally.by_source.items())),
        by_hops=dict(sorted(tally.by_hops.items(), key=lambda item: (item[0] is None, item[0] or 0))),
        num_with_gold_passages=tally.num_with_gold_passages,
        problems=tuple(problems),
        num_problems=num_problems,
        notes=tuple(tally.notes),
    )


def recognise(path: Path) -> Kind:
    """What kind of file it is, by the columns of the first row that has a telling one.

    Raises:
        DataError: the file cannot be read.
    """
    for row in read_rows(path):
        if isinstance(row, Row):
            for column, kind in _KIND_BY_COLUMN:
                if row.values.get(column) is not None:
                    return kind
    return "unknown"


def _problems(path: Path, kind: Kind, tally: _Tally) -> Iterator[Problem]:
    if kind == "questions":
        return _check_questions(path, tally)
    if kind == "corpus":
        return _check_corpus(path, tally)
    if kind == "demonstrations":
        return _check_demonstrations(path, tally)
    return _check_unknown(path, tally)


def _check_questions(path: Path, tally: _Tally) -> Iterator[Problem]:
    identities = Identities()
    num_bare = 0
    for item in parse_rows(path, parse=parse_question):
        tally.rows += 1
        if isinstance(item, Problem):
            yield item
            continue
        question = identities.place(*item)
        if isinstance(question, Problem):
            yield question
            continue
        tally.by_source[question.data_source] += 1
        tally.by_hops[question.hops] += 1
        tally.num_with_gold_passages += question.gold_passage_ids is not None
        num_bare += has_bare_list(question.row)
    if num_bare:
        tally.notes.append(
            f'answers such as "[1, 2]", each number of which is read as an answer: {counted(num_bare, "row")}'
        )
    if identities.num_repeated:
        tally.notes.append(repeated_note(identities.num_repeated))


def _check_corpus(path: Path, tally: _Tally) -> Iterator[Problem]:
    hashes = array("q")
    num_empty = 0
    for item in parse_rows(path, parse=parse_passage):
        tally.rows += 1
        if isinstance(item, Problem):
            yield item
        elif item[1] is None:
            num_empty += 1
        else:
            hashes.append(hash(item[1].id))
    if num_empty:
        tally.notes.append(f"rows without text, which an index leaves out: {num_empty}")
    if num_empty == tally.rows > 0:
        yield Problem(path=path, unit="file", number=None, message="no passage in it; at least one is needed")
    yield from repeated_ids(path, hashes)


def _check_demonstrations(path: Path, tally: _Tally) -> Iterator[Problem]:
    for item in parse_rows(path, parse=parse_demonstration):
        tally.rows += 1
        if isinstance(item, Problem):
            yield item


def _check_unknown(path: Path, tally: _Tally) -> Iterator[Problem]:
    columns: set[str] = set()
    for row in read_rows(path):
        tally.rows += 1
        if isinstance(row, Problem):
            yield row
        else:
            columns.update(row.values)
    if columns:
        message = f"neither questions, nor a corpus, nor demonstrations: the columns are {', '.join(sorted(columns))}"
        yield Problem(path=path, unit="file", number=None, message=message)
