"""Demonstrations for a supervised start: a question, and what is written after it, piece by piece, with weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeGuard

from rexrag.data.rows import Problem, Row, RowError, parse_rows, shown, text_of, valid_text
from rexrag.errors import DataError
from rexrag.files import write_atomic

GOING_ON: Final = "<think>"
"""The segment at which a demonstration goes on instead of answering: the tag that opens a second thought."""


@dataclass(frozen=True)
class Segment:
    """A piece of text that is tokenised by itself, as a rollout produces it.

    `weight` multiplies the loss of its tokens, ≥ 0: one for all, or one per token. Observations have weight 0.
    """

    text: str
    weight: float | tuple[float, ...]

    @property
    def is_trained(self) -> bool:
        return any(w > 0 for w in self.weight) if isinstance(self.weight, tuple) else self.weight > 0


@dataclass(frozen=True)
class Demonstration:
    """A question and the trajectory to imitate."""

    question: str
    segments: tuple[Segment, ...]


def load_demonstrations(path: str | Path) -> tuple[Demonstration, ...]:
    """Read demonstrations, jsonl or parquet: `{"question", "segments": [{"text", "weight"}]}`.

    Raises:
        DataError: a file that cannot be read, a bad row (with its line), or no demonstration at all.
    """
    demonstrations = []
    for item in parse_rows(Path(path), parse=parse_demonstration):
        if isinstance(item, Problem):
            raise DataError(str(item))
        demonstrations.append(item[1])
    if not demonstrations:
        raise DataError(f"{path}: no demonstration in it; at least one is needed")
    return tuple(demonstrations)


def write_demonstrations(path: Path, demonstrations: Iterable[Demonstration]) -> None:
    """Write demonstrations as jsonl, whole or not at all."""
    lines = []
    for demonstration in demonstrations:
        segments = [{"text": segment.text, "weight": segment.weight} for segment in demonstration.segments]
        row = {"question": demonstration.question, "segments": segments}
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomic(path, "".join(lines))


def parse_demonstration(row: Row) -> Demonstration:
    """One row as a demonstration.

    Raises:
        RowError: no question, no segment, none with a positive weight, or a column of the wrong type.
    """
    question = text_of(row.values, "question")
    assert question is not None, "a required text is never None"
    listed = row.values.get("segments")
    if not isinstance(listed, list) or not listed:
        raise RowError(f'expected a non-empty list "segments", got {shown(listed)}')
    segments = tuple(_segment(value, number) for number, value in enumerate(listed, start=1))
    if not any(segment.is_trained for segment in segments):
        raise RowError("no segment has a weight above 0: there is nothing to learn from this row")
    return Demonstration(question=question, segments=segments)


def _segment(value: object, number: int) -> Segment:
    if not isinstance(value, dict):
        raise RowError(f'expected {{"text", "weight"}} as segment {number}, got {shown(value)}')
    # Blanks count here: a segment is tokenised exactly as it stands.
    text = value.get("text")
    if not isinstance(text, str) or not text:
        raise RowError(f'expected a non-empty string "text" in segment {number}, got {shown(text)}')
    weight = value.get("weight")
    weights = weight if isinstance(weight, list) else [weight]
    numbers = tuple(float(w) for w in weights if _is_weight(w))
    if not weights or len(numbers) < len(weights):
        raise RowError(
            f'expected a number ≥ 0, or a list of them, as "weight" of segment {number}, got {shown(weight)}'
        )
    return Segment(valid_text(text, "text"), numbers if isinstance(weight, list) else numbers[0])


def _is_weight(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
