"""Passages: reading a corpus file, and getting single passages of one that is memory-mapped.

The user's jsonl is never copied: an offset file beside the index says where each row starts.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from rexrag.data.rows import Problem, Row, RowError, id_of, parse_rows, shown, text_of
from rexrag.errors import DataError, RetrievalIndexError
from rexrag.types import Passage


def iter_corpus(path: str | Path) -> Iterator[Passage]:
    """The passages of a corpus file, in order.

    Raises:
        DataError: a bad row, or (after the last row) an id that occurs twice; with file and line.
    """
    return (passage for _, passage in iter_corpus_rows(Path(path)))


def iter_corpus_rows(path: Path) -> Iterator[tuple[Row, Passage]]:
    """`iter_corpus` with each passage's place in the file. An empty corpus is an error too."""
    hashes = array("q")
    for item in parse_rows(path, parse=parse_passage):
        if isinstance(item, Problem):
            raise DataError(str(item))
        hashes.append(hash(item[1].id))
        yield item
    if not hashes:
        raise DataError(f"{path}: no passage in it; at least one is needed")
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
        if isinstance(item, Problem) or hash(item[1].id) not in suspects:
            continue
        row, passage = item
        if (earlier := first.setdefault(passage.id, row)) is not row:
            yield row.problem(f"id {passage.id!r} is also in {earlier.unit} {earlier.number}; ids must be unique")


def parse_passage(row: Row) -> Passage:
    """One row as a passage.

    Raises:
        RowError: no id, no text, or a column of the wrong type.
    """
    identity = id_of(row.values)
    if identity is None:
        raise RowError('expected an "id", a string or an integer, got nothing')
    return passage_of(row.values, identity=identity)


def passage_of(values: Mapping[str, object], *, identity: str, score: float | None = None) -> Passage:
    """A passage from `contents` (`"Title"\\ntext`), or from `title` and `text` where there is no `contents`.

    Raises:
        RowError: no text, or a column of the wrong type.
    """
    if values.get("contents") is not None:
        contents = text_of(values, "contents")
        assert contents is not None, "a required text is never None"
        title, text = split_contents(contents)
    elif values.get("text") is not None:
        title, text = text_of(values, "title", required=False) or "", text_of(values, "text") or ""
    else:
        raise RowError(f'expected "contents" or "text", got the columns {shown(sorted(values))}')
    return Passage(id=identity, title=title, text=text, score=score)


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of `"Title"\\ntext`; one pair of quotes is taken off. A single line is text without a title."""
    head, newline, text = contents.strip().partition("\n")
    if not newline:
        return "", head
    title = head.strip()
    if len(title) >= 2 and title[0] == title[-1] == '"':
        title = title[1:-1].strip()
    return title, text.strip()


class Corpus:
    """Random access to the passages of a jsonl file, memory-mapped: opens at once, a passage in microseconds.

        with Corpus.open(jsonl, offsets=offsets) as corpus:
            passage = corpus.get(17)

    The offsets file holds the byte at which each row starts, as little-endian u64.
    """

    def __init__(self, data: mmap.mmap, *, path: Path, starts: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        self._data = data
        self._path = path
        self._starts = starts

    @classmethod
    def open(cls, path: Path, *, offsets: Path) -> Corpus:
        """Map a corpus.

        Raises:
            RetrievalIndexError: one of the files is missing, empty, or of an impossible size.
        """
        try:
            starts = np.asarray(np.memmap(offsets, dtype="<u8", mode="r"))
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise RetrievalIndexError(
                f"{path} with {offsets}: cannot be opened ({error}); build the index again"
            ) from error
        return cls(data, path=path, starts=starts)

    def __len__(self) -> int:
        return len(self._starts)

    def get(self, row: int) -> Passage:
        """The passage of a row, counted from 0.

        Raises:
            RetrievalIndexError: the file no longer holds a passage there: it changed after it was indexed.
        """
        start = int(self._starts[row])
        end = self._data.find(b"\n", start)
        line = self._data[start : end if end >= 0 else len(self._data)]
        try:
            values = json.loads(line)
            return passage_of(values, identity=id_of(values) or "")
        except (ValueError, AttributeError) as error:
            raise RetrievalIndexError(
                f"{self._path}: no passage at byte {start}, where row {row} was; the file changed, index it again"
            ) from error

    def close(self) -> None:
        self._data.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
