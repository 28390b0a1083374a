"""Rows of jsonl, JSON and parquet files, one by one, each with the place it stands at.

    file -> read_rows -> Row | Problem -> parse_rows (one kind of row) -> (Row, value) | Problem

What is wrong with one row is a value, so that a reader may stop, skip, or list it; what is wrong with the
file as a whole raises.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rexrag.data.formats import format_of, open_data
from rexrag.data.json_values import json_values
from rexrag.errors import DataError

MAX_PROBLEMS: Final = 100
"""Problems of one kind of call that are kept; the others are counted."""
_PARQUET_BATCH_ROWS: Final = 1024
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a file: where, and what was expected there.

    Attributes:
        unit: `line` (jsonl) or `row` (parquet, JSON array).
        number: counted from 1; None where the file as a whole is meant.
    """

    path: Path
    unit: str
    number: int | None
    message: str

    def __str__(self) -> str:
        place = "" if self.number is None else f", {self.unit} {self.number}"
        return f"{self.path}{place}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row and its place: line or row number from 1, and the byte a jsonl line starts at (None in other files)."""

    path: Path
    unit: str
    number: int
    offset: int | None
    values: Mapping[str, object]

    def problem(self, message: str) -> Problem:
        return Problem(path=self.path, unit=self.unit, number=self.number, message=message)


class RowError(ValueError):
    """A row that does not have the form asked for; the message says what was expected."""


def read_rows(path: Path) -> Iterator[Row | Problem]:
    """All rows of a file in order; blank lines are none.

    Raises:
        DataError: the file cannot be read, or is of a kind that holds no rows.
    """
    match format_of(path):
        case "parquet":
            return _read_parquet(path)
        case "jsonl":
            return _read_jsonl(path)
        case kind:
            return _read_json(path, is_array=kind == "array")


def parse_rows(path: Path, *, parse: Callable[[Row], _T]) -> Iterator[tuple[Row, _T] | Problem]:
    """`read_rows`, each row turned into a value; a `RowError` of `parse` becomes a `Problem`."""
    for row in read_rows(path):
        if isinstance(row, Problem):
            yield row
            continue
        try:
            value = parse(row)
        except RowError as error:
            yield row.problem(str(error))
        else:
            yield row, value


def text_of(values: Mapping[str, object], name: str, *, required: bool = True) -> str | None:
    """A text column without surrounding blanks; None where it is absent or null and not required.

    Raises:
        RowError: absent though required, not a string, blank though required, or no valid Unicode.
    """
    value = values.get(name)
    if value is None and not required:
        return None
    if not isinstance(value, str) or (required and not value.strip()):
        raise RowError(f'expected a non-empty string "{name}", got {shown(value)}')
    return valid_text(value.strip(), name)


def id_of(values: Mapping[str, object], *, names: Sequence[str] = ("id", "_id")) -> str | None:
    """The id in the first of these columns that has one, a string or a whole number, as a string; None without one.

    A column with gaps comes as floats with NaN.

    Raises:
        RowError: of another type, or blank.
    """
    for name in names:
        value = values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if value % 1 == 0:
                return str(int(value))
            if math.isnan(value):
                continue
        if value is not None:
            return text_of(values, name)
    return None


def encodable(text: str) -> str:
    """The text with question marks for halves of surrogate pairs, which have no UTF-8 form."""
    return text.encode("utf-8", "replace").decode("utf-8")


def valid_text(text: str, name: str) -> str:
    """The text itself; a `RowError` where it holds half a surrogate pair, which no file can store."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f'"{name}" holds half a surrogate pair at character {error.start + 1}') from error
    return text


def shown(value: object) -> str:
    """A value as an error shows it: short."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_jsonl(path: Path) -> Iterator[Row | Problem]:
    offset = 0
    with open_data(path) as file:
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                start, line = len(codecs.BOM_UTF8), line[len(codecs.BOM_UTF8) :]
            if not line.strip():
                continue
            try:
                yield Row(path=path, unit="line", number=number, offset=start, values=_parse_line(line))
            except RowError as error:
                yield Problem(path=path, unit="line", number=number, message=str(error))


def _parse_line(line: bytes) -> Mapping[str, object]:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"expected UTF-8, got byte 0x{line[error.start]:02x} at byte {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"expected one JSON object on a line ({error})") from error
    if not isinstance(values, dict):
        raise RowError(f"expected a JSON object, got {shown(values)}")
    return values


def _read_json(path: Path, *, is_array: bool) -> Iterator[Row | Problem]:
    number = 0
    with open_data(path) as file:
        try:
            for values in json_values(file, is_array=is_array):
                number += 1
                if isinstance(values, dict):
                    yield Row(path=path, unit="row", number=number, offset=None, values=values)
                else:
                    message = f"expected a JSON object, got {shown(values)}"
                    yield Problem(path=path, unit="row", number=number, message=message)
        except ValueError as error:
            what = "array" if is_array else "sequence of objects"
            raise DataError(
                f"{path}: no readable JSON {what} after row {number} ({error}); write one object a line: jq -c "
                f"{chr(39)}{'.[]' if is_array else '.'}{chr(39)} {path}"
            ) from error


def _read_parquet(path: Path) -> Iterator[Row | Problem]:
    number = 0
    with open_data(path) as file:
        for batch in _parquet_batches(path, file):
            for values in batch:
                number += 1
                yield Row(path=path, unit="row", number=number, offset=None, values=values)


def _parquet_batches(path: Path, file: BinaryIO) -> Iterator[list[dict[str, object]]]:
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_PARQUET_BATCH_ROWS):
            columns = [_python_values(column) for column in batch.columns]
            names = batch.schema.names
            yield [dict(zip(names, (column[i] for column in columns), strict=True)) for i in range(batch.num_rows)]
    # Damaged bytes surface as Arrow, OS, Unicode, overflow or memory errors, depending on where they lie.
    except Exception as error:
        message = f"not a readable parquet file ({type(error).__name__}: {error}); write it again, or give jsonl"
        raise DataError(str(Problem(path=path, unit="row", number=None, message=message))) from error


def _python_values(column: pa.Array) -> list[object]:
    """A column as Python values; times that Python has no value for (nanoseconds, odd zones) as text, else None.

    Times are in no column that is read here, so that they are no reason to refuse a file.
    """
    try:
        values: list[object] = column.to_pylist()
        return values
    except (ValueError, OverflowError, LookupError, pa.ArrowException):
        if not _holds_times(column.type):
            raise
    if pa.types.is_struct(column.type):
        names = [field.name for field in column.type]
        parts = [_python_values(part) for part in column.flatten()]
        rows = zip(column.is_valid().to_pylist(), *parts, strict=True)
        return [dict(zip(names, row, strict=True)) if is_there else None for is_there, *row in rows]
    try:
        texts: list[object] = column.cast(pa.string()).to_pylist()
        return texts
    except (ValueError, pa.ArrowException):
        return [None] * len(column)


def _holds_times(kind: pa.DataType) -> bool:
    return pa.types.is_temporal(kind) or any(_holds_times(kind.field(i).type) for i in range(kind.num_fields))
