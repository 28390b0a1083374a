"""A trajectory's text for the terminal: each part in the colour of its tag."""

from __future__ import annotations

import re
from typing import Final

from rich.text import Text

_STYLES: Final = {"think": "dim", "search": "cyan", "information": "blue", "answer": "bold green"}
_PART: Final = re.compile(r"<(think|search|information|answer)>.*?(?:</\1>|\Z)", re.DOTALL)


def coloured_trace(text: str) -> Text:
    """The text as it is, with thoughts dimmed, searches, passages and the answer in colours of their own."""
    trace = Text(text)
    for part in _PART.finditer(text):
        trace.stylize(_STYLES[part[1]], part.start(), part.end())
    return trace
