"""Passages: reading a corpus file, and getting single passages of one that is memory-mapped.

The user's jsonl is never copied: an offset file beside the index says where each row starts.
"""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import numpy as np

from rexrag.data.rows import Problem, Row, RowError, id_of, parse_rows, shown, text_of, valid_text
from rexrag.errors import DataError, RetrievalIndexError, counted
from rexrag.types import Passage

_BLOCK_BYTES: Final = 1 << 20


def iter_corpus(path: str | Path) -> Iterator[Passage]:
    """The passages of a corpus file, in order.

    Raises:
        DataError: a bad row, or (after the last row) an id that occurs twice; with file and line.
    """
    return (passage for _, passage in iter_corpus_rows(Path(path)))


def iter_corpus_rows(path: Path, *, on_empty: Callable[[Row], None] | None = None) -> Iterator[tuple[Row, Passage]]:
    """`iter_corpus` with each passage's place in the file. An empty corpus is an error too.

    Args:
        on_empty: called with each row that has an id and no text; such rows are left out.
    """
    hashes = array("q")
    num_empty = 0
    for item in parse_rows(path, parse=parse_passage):
        if isinstance(item, Problem):
            raise DataError(str(item))
        row, passage = item
        if passage is None:
            num_empty += 1
            if on_empty is not None:
                on_empty(row)
            continue
        hashes.append(hash(passage.id))
        yield row, passage
    if not hashes:
        raise DataError(f"{path}: no passage in it ({counted(num_empty, 'row')} without text); at least one is needed")
    for problem in repeated_ids(path, hashes):
        raise DataError(str(problem))


def repeated_ids(path: Path, hashes: array[int]) -> Iterator[Problem]:
    """A problem for each passage whose id stood earlier in the file.

    Args:
        hashes: `hash(id)` of the good rows: eight bytes a passage, where the ids themselves would take
            gigabytes. The file is read again only where two of them are equal.
    """
    values, counts = np.unique(np.frombuffer(hashes, dtype=np.int64), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    first: dict[str, Row] = {}
    for item in parse_rows(path, parse=parse_passage):
        if isinstance(item, Problem) or item[1] is None or hash(item[1].id) not in suspects:
            continue
        row, passage = item[0], item[1]
        if (earlier := first.setdefault(passage.id, row)) is not row:
            yield row.problem(f"id {passage.id!r} is also in {earlier.unit} {earlier.number}; ids must be unique")


def parse_passage(row: Row) -> Passage | None:
    """One row as a passage; None where there is an id and no text, as dumps have it for a few pages.

    Raises:
        RowError: no id, no column for a text, or a column of the wrong type.
    """
    identity = id_of(row.values)
    if identity is None:
        columns = ", ".join(sorted(map(str, row.values))) or "none"
        raise RowError(f'expected an "id" (or "_id"), a string or an integer, got nothing; the columns are {columns}')
    return passage_of(row.values, identity=identity)


def passage_of(values: Mapping[str, object], *, identity: str, score: float | None = None) -> Passage | None:
    """A passage from `contents` (`"Title"\\ntext`), or from `text` where that has none; None where both are blank.

    A `title` beside them is the title: of `contents` its first line is taken off then if it says the same.

    Raises:
        RowError: no column for a text, or one of the wrong type.
    """
    if not {"contents", "text"} & values.keys():
        columns = ", ".join(sorted(map(str, values))) or "none"
        raise RowError(f'expected "contents" or "text", got the columns {columns}')
    given = text_of(_without_gaps(values), "title", required=False) or ""
    contents, text = _raw_text(values, "contents"), _raw_text(values, "text")
    if contents.strip():
        title, text = split_contents(contents)
        if given and title != given:
            title, text = given, contents.strip()
    else:
        title, text = given, text.strip()
    return Passage(id=identity, title=title, text=text, score=score) if text else None


def _raw_text(values: Mapping[str, object], name: str) -> str:
    """A text as it stands, since line breaks at its head mean something; "" for a gap."""
    value = _without_gaps(values).get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f'expected a non-empty string "{name}", got {shown(value)}')
    return valid_text(value, name)


def _without_gaps(values: Mapping[str, object]) -> Mapping[str, object]:
    """Only the columns of a passage, without NaN, which pandas writes for a missing text."""
    return {
        name: value
        for name in ("title", "contents", "text")
        if not (isinstance(value := values.get(name), float) and math.isnan(value))
    }


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of `"Title"\\ntext`; one pair of quotes is taken off.

    A single line is text without a title, and so is what begins with a line break.
    """
    head, newline, text = contents.partition("\n")
    if not newline or not head.strip():
        return "", contents.strip()
    title = head.strip()
    if _is_quoted(title):
        return title[1:-1].strip(), text.strip()
    return (title, text.strip()) if text.strip() else ("", title)


def contents_of(passage: Passage) -> str:
    """The `contents` of a row that is read as this passage: `"Title"\ntext`, or the text alone.

    A line break in a title has no form there; it becomes a space.
    """
    if not passage.title:
        return f"\n{passage.text}" if "\n" in passage.text else passage.text
    title = passage.title.replace("\n", " ")
    quoted = f'"{title}"\n{passage.text}'
    if split_contents(quoted) == (title, passage.text):
        return quoted
    return f"{title}\n{passage.text}"  # a title with quotes in it stands by itself


def _is_quoted(title: str) -> bool:
    """Whether one pair of quotes is around the whole: `"Heroes" and "Villains"` begins and ends with two others."""
    if len(title) < 2 or not title[0] == title[-1] == '"':
        return False
    inner = re.search(r'(?<!\\)"', title[1:-1])
    return inner is None or inner.start() == 0 or title[inner.start()] in " ([-\u2013"


class Corpus:
    """Random access to the passages of a jsonl file: opens at once, a passage in microseconds.

        with Corpus.open(jsonl, offsets=offsets) as corpus:
            passage = corpus.get(17)

    The offsets file holds the byte at which each row starts, as little-endian u64. The file is read, not mapped: of one
    that is written anew in place a map would end the process.
    """

    def __init__(self, file: BinaryIO, *, path: Path, starts: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        self._file = file
        self._path = path
        self._starts = starts

    @classmethod
    def open(cls, path: Path, *, offsets: Path) -> Corpus:
        """Open a corpus.

        Raises:
            RetrievalIndexError: one of the files is missing, empty, or of an impossible size.
        """
        try:
            starts = np.asarray(np.memmap(offsets, dtype="<u8", mode="r"))
            file = path.open("rb")
        except (OSError, ValueError) as error:
            raise RetrievalIndexError(
                f"{path} with {offsets}: cannot be opened ({error}); build the index again"
            ) from error
        return cls(file, path=path, starts=starts)

    def __len__(self) -> int:
        return len(self._starts)

    def get(self, row: int) -> Passage:
        """The passage of a row, counted from 0.

        Raises:
            RetrievalIndexError: the file no longer holds a passage there: it changed after it was indexed.
        """
        start = int(self._starts[row])
        try:
            values = json.loads(self._line(row, start))
            passage = passage_of(values, identity=id_of(values) or "")
        except (OSError, ValueError, AttributeError) as error:
            raise self._changed(row, start) from error
        if passage is None:
            raise self._changed(row, start)
        return passage

    def _line(self, row: int, start: int) -> bytes:
        descriptor = self._file.fileno()
        end = os.fstat(descriptor).st_size
        if row + 1 < len(self):
            end = min(end, int(self._starts[row + 1]))
        line = bytearray()
        while start < end:  # the last row of a file that has grown since is no longer than it was
            block = os.pread(descriptor, min(end - start, _BLOCK_BYTES), start)
            head, newline, _ = block.partition(b"\n")
            line += head
            if newline or not block:
                break
            start += len(block)
        return bytes(line)

    def _changed(self, row: int, start: int) -> RetrievalIndexError:
        return RetrievalIndexError(
            f"{self._path}: no passage at byte {start}, where row {row} was; the file changed, index it again"
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
