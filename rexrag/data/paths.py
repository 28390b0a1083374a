"""From what a user wrote as a path of data to files: a file, or a pattern such as `shards/*.parquet`."""

from __future__ import annotations

import glob
from pathlib import Path


def matching_files(path: str | Path, *, base: Path | None = None) -> list[Path]:
    """The files that a pattern matches, in the order of their names; without any the one that it names literally.

    Args:
        path: a name that exists is no pattern, whatever it holds.
        base: folder that a relative path starts from; None: the working directory.
    """
    pattern = Path(path).expanduser()
    file = pattern if base is None else base / pattern
    if not glob.has_magic(str(pattern)) or file.exists():
        return [file]
    names = sorted(glob.glob(str(pattern), root_dir=base, recursive=True))
    found = [Path(name) if base is None else base / name for name in names]
    return [file for file in found if file.is_file()] or [file]
