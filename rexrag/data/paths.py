"""From what a user wrote as a path of data to files: a file, or a pattern such as `shards/*.parquet`."""

from __future__ import annotations

import glob
from pathlib import Path

from rexrag.errors import DataError


def matching_files(path: str | Path) -> list[Path]:
    """The files that a pattern matches, in the order of their names; anything else is the one file that it names.

    A file whose very name holds the characters of a pattern is itself.

    Raises:
        DataError: a pattern that matches nothing.
    """
    file = Path(path)
    if not glob.has_magic(str(path)) or file.exists():
        return [file]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise DataError(f"{path}: no file matches this pattern; give the path of a jsonl or parquet file")
    return found
