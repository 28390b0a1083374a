"""JSON values of a file, one after the other: the items of one array, or objects that spread over lines.

Only the value at hand is in memory, so that an array of gigabytes can be read.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO, Final

_BLOCK_BYTES: Final[int] = 1 << 16
_MAX_VALUE_CHARS: Final = 1 << 26
_DECODER: Final = json.JSONDecoder()


def json_values(file: BinaryIO, *, is_array: bool) -> Iterator[object]:
    """The items of the array that a file consists of, or the values that stand in it one after the other.

    Raises:
        ValueError: what is there is no JSON (or no UTF-8), is cut short, or one value takes more than 64 M characters.
    """
    window = _Window(file)
    if is_array:
        window.take("[")
    end = "]" if is_array else ""
    is_first = True
    while window.next() != end:
        if is_array and not is_first:
            window.take(",")
        yield window.value()
        is_first = False
    if is_array:
        window.take("]")
        if rest := window.next():
            raise ValueError(f"{rest!r} after the end of the array")


class _Window:
    """The part of a file that is being decoded."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._ended = False

    def next(self) -> str:
        """The next character that is no blank, "" at the end of the file; it stays."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._read(_BLOCK_BYTES)

    def take(self, character: str) -> None:
        """Go past one character."""
        found = self.next()
        if found != character:
            raise ValueError(f"expected {character!r}, got {repr(found) if found else 'the end of the file'}")
        self._at += 1

    def value(self) -> object:
        """Go past one value."""
        self.next()
        size = _BLOCK_BYTES
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise ValueError("too deeply nested") from error
            except json.JSONDecodeError:
                # Where more may follow, the value is taken to be cut by the window.
                if self._ended or len(self._text) - self._at > _MAX_VALUE_CHARS:
                    raise
            else:
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            self._read(size)
            size *= 2

    def _read(self, size: int) -> None:
        block = self._file.read(size)
        self._ended = len(block) < size
        self._text = self._text[self._at :] + self._decoder.decode(block, final=self._ended)
        self._at = 0
