"""The scripts of a corpus, as far as the choice of a tokeniser goes: those that put no spaces between words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

CJK: Final = "Chinese, Japanese or Korean"
"""Korean has spaces, but its words carry endings that no other word has."""

_RANGES: Final = {
    CJK: "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f"
    "\uac00-\ud7af\uf900-\ufaff\uff66-\uffdc\U00020000-\U000323af",
    "Thai": "\u0e00-\u0e7f",
    "Lao": "\u0e80-\u0eff",
    "Tibetan": "\u0f00-\u0fff",
    "Burmese": "\u1000-\u109f\uaa60-\uaa7f",
    "Khmer": "\u1780-\u17ff",
    "Tai Lue or Tai Tham": "\u1980-\u19df\u1a20-\u1aaf",
    "Balinese or Javanese": "\u1b00-\u1b7f\ua980-\ua9df",
}
_PATTERNS: Final = {script: re.compile(f"[{ranges}]+") for script, ranges in _RANGES.items()}
_LETTERS: Final = re.compile(r"[^\W\d_]+")
_ESCAPE: Final = re.compile(r"\\u([0-9a-fA-F]{4})")
_MIN_SHARE: Final = 0.002
"""Names in an encyclopaedia of another language stay below."""
_NUM_BLOCKS: Final = 256
_BLOCK_BYTES: Final = 1 << 16


def is_spaceless(letter: str) -> bool:
    """Whether a letter belongs to a script that puts no spaces between words."""
    return any(pattern.match(letter) for pattern in _PATTERNS.values())


def spaceless_scripts(jsonl: Path) -> dict[str, float]:
    """Share of a corpus's letters in each script that puts no spaces between words, largest first.

    Shares below a five-hundredth are left out. Blocks all over the file are looked at, of a small one all of it.
    """
    size = jsonl.stat().st_size
    step = max(_BLOCK_BYTES, size // _NUM_BLOCKS)
    counts = dict.fromkeys(_PATTERNS, 0)
    num_letters = 0
    with jsonl.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            text = file.read(_BLOCK_BYTES).decode("utf-8", "ignore")
            text = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)
            num_letters += sum(map(len, _LETTERS.findall(text)))
            for script, pattern in _PATTERNS.items():
                counts[script] += sum(map(len, pattern.findall(text)))
    shares = {script: min(1.0, count / max(1, num_letters)) for script, count in counts.items()}
    return {s: share for s, share in sorted(shares.items(), key=lambda item: -item[1]) if share >= _MIN_SHARE}
