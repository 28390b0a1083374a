"""The files of a replay log: `segment-000001.log`, `segment-000002.log`, … and `last-segment`, the newest one's number.

The number is noted so that the loss of the newest one is seen too, and its number never used again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rexrag.errors import RunFolderError
from rexrag.files import write_atomic

_LAST_SEGMENT: Final = "last-segment"


def segments(folder: Path) -> list[Path]:
    """The segments of a log, oldest first."""
    return sorted(folder.glob("segment-*.log"), key=segment_number)


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"segment-{number:06d}.log"


def segment_number(path: Path) -> int:
    """The number in a segment's name.

    Raises:
        RunFolderError: it has none.
    """
    text = path.stem.removeprefix("segment-")
    if not text.isdecimal():
        raise RunFolderError(f"{path} is no segment of a replay log: move it out of the folder")
    return int(text)


def newest_number(folder: Path) -> int:
    """The highest number that a segment has or was noted to have; 0 where there is no log."""
    return max([_noted_number(folder), *map(segment_number, segments(folder))])


def note_newest(folder: Path, number: int) -> None:
    write_atomic(folder / _LAST_SEGMENT, f"{number}\n")


def _noted_number(folder: Path) -> int:
    try:
        text = (folder / _LAST_SEGMENT).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return 0
    return int(text) if text.isdecimal() else 0
