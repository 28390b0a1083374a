"""A trajectory's text for the terminal: each part in the colour of its tag."""

from __future__ import annotations

import re
from typing import Final

from rich.text import Text

_STYLES: Final = {"think": "dim", "search": "cyan", "information": "blue", "answer": "bold green"}
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PART: Final = re.compile(r"<(think|search|information|answer)>.*?(?:</\1>|\Z)", re.DOTALL)


def printable(text: str) -> str:
    """The text without what a terminal would act on: passages may hold anything, such as sequences that clear it."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def coloured_trace(text: str) -> Text:
    """The text in print, with thoughts dimmed, searches, passages and the answer in colours of their own."""
    text = printable(text)
    trace = Text(text)
    for part in _PART.finditer(text):
        trace.stylize(_STYLES[part[1]], part.start(), part.end())
    return trace
