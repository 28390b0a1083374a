"""What kind of file a data file is, by its first bytes: jsonl, a JSON array, JSON objects, parquet, or foreign.

The suffix decides nothing but the advice: files are renamed, and pointers of Git LFS keep the name of what they
point to.
"""

from __future__ import annotations

import codecs
import json
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final, Literal

from rexrag.errors import DataError

FileFormat = Literal["jsonl", "array", "objects", "parquet"]
"""`array`: one JSON array of rows; `objects`: rows as JSON objects that spread over lines."""

_HEAD_BYTES: Final = 1 << 16
_LINES_LOOKED_AT: Final = 8
_SHOWN_FILES: Final = 5
_LOOKED_AT: Final = 2000
"""Entries of a folder that was named in place of a file: the tree below it may be a whole disk."""

_FOREIGN: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\x1f\x8b", "is compressed with gzip; unpack it first: gunzip --keep {path}"),
    (b"PK\x03\x04", "is a zip archive; unpack it first: unzip {path}"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first: zstd -d {path}"),
    (b"BZh", "is compressed with bzip2; unpack it first: bunzip2 --keep {path}"),
    (b"\xfd7zXZ", "is compressed with xz; unpack it first: unxz --keep {path}"),
    (b"7z\xbc\xaf", "is a 7-Zip archive; unpack it first: 7z x {path}"),
    (b"ARROW1", "is an Arrow file; {arrow}"),
    (b"\xff\xff\xff\xff", "is an Arrow file; {arrow}"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself; fetch it: git lfs pull"),
    (b"PARE", "is an encrypted parquet file; write it again without encryption"),
    (b"\x00\x00\xfe\xff", "is UTF-32 text; write it as UTF-8: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe\x00\x00", "is UTF-32 text; write it as UTF-8: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "is UTF-16 text; write it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "is UTF-16 text; write it as UTF-8: iconv -f UTF-16 -t UTF-8"),
)
_ARROW: Final = (
    'write parquet: python -c \'import datasets; datasets.load_from_disk("FOLDER").to_parquet("q.parquet")\''
)
_TABLE: Final = (
    'is a table with columns (CSV or TSV); jsonl is needed: python -c \'import pandas; pandas.read_csv("{path}", '
    'sep=None, engine="python").to_json("q.jsonl", orient="records", lines=True)\''
)
_NEEDED: Final = "jsonl (one JSON object a line) or parquet is needed"


def format_of(path: Path) -> FileFormat:
    """How rows are written in a file. An empty file is jsonl without a row.

    Raises:
        DataError: the file cannot be read, or holds no rows that this package reads; says what it is instead.
    """
    with open_data(path) as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return "parquet"
    advice = next((advice for magic, advice in _FOREIGN if head.startswith(magic)), None)
    if advice is not None:
        raise DataError(f"{path}: {advice.format(path=path, arrow=_ARROW)}")
    if b"\x00" in head:
        raise DataError(f"{path}: {_binary(head)}")
    if path.suffix.lower() == ".parquet":
        raise DataError(f"{path}: not a readable parquet file (no PAR1 at its start); write it again, or give jsonl")
    return _text_format(path, head.removeprefix(codecs.BOM_UTF8))


def open_data(path: Path) -> BinaryIO:
    """Open a data file for reading.

    Raises:
        DataError: there is none, or it is a folder: then the message names files in it.
    """
    if path.is_dir():
        raise DataError(f"{path}: {folder_advice(path)}")
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is a pipe or a device, and rows are read more than once; write them into a file")
    try:
        return path.open("rb")
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if has_magic(str(path)):
            matched = ", and none that this pattern matches", "; patterns are for questions: name one file"
            reason += matched[bool(glob(str(path)))]
        raise DataError(f"{path}: cannot be read ({reason}); give the path of a jsonl or parquet file") from error


def _text_format(path: Path, head: bytes) -> FileFormat:
    lines = [line.strip() for line in head.split(b"\n") if line.strip()]
    if not lines:
        return "jsonl"
    first = lines[0]
    if first.startswith(b"["):
        return "array"
    if first == b"{" or (first.startswith(b"{") and len(lines) > 1 and _goes_on(first, lines[1])):
        return "objects"
    if any(line.startswith(b"{") for line in lines[:_LINES_LOOKED_AT]):
        return "jsonl"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{path}: is a web page, not the file that was to be downloaded; {_NEEDED}")
    if path.suffix.lower() in (".csv", ".tsv", ".tab") or b"\t" in first:
        raise DataError(f"{path}: {_TABLE.format(path=path)}")
    shown = first[:60].decode("utf-8", "replace")
    raise DataError(
        f"{path}: neither jsonl nor parquet: no line begins an object, the first one is {shown!r}; {_NEEDED}"
    )


def _goes_on(first: bytes, second: bytes) -> bool:
    """Whether an object that begins in the first line is continued in the second, as pretty printers write it."""
    if second.startswith(b"{") or not first.endswith((b",", b"{", b"[")):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False


def _binary(head: bytes) -> str:
    zeros = [head[parity::2].count(0) * 4 > len(head) for parity in (0, 1)]
    if any(zeros) and not all(zeros):
        return "is UTF-16 text; write it as UTF-8: iconv -f UTF-16 -t UTF-8"
    return f"is binary and no parquet file; {_NEEDED}"


def folder_advice(path: Path) -> str:
    """What to do where a folder was named and a file is needed."""
    found = list(islice(path.rglob("*"), _LOOKED_AT))
    files = sorted(p for p in found if p.suffix.lower() in (".parquet", ".jsonl", ".json"))
    files = [p for p in files if p.name not in ("dataset_info.json", "state.json", "dataset_dict.json")]
    if not files and any(p.suffix == ".arrow" for p in found):
        return f"is a folder of Arrow files (datasets.save_to_disk); {_ARROW.replace('FOLDER', str(path))}"
    if not files:
        return "is a folder without jsonl or parquet files; name the file"
    names = ", ".join(str(p.relative_to(path)) for p in files[:_SHOWN_FILES])
    more = f" and {len(files) - _SHOWN_FILES} more" if len(files) > _SHOWN_FILES else ""
    if len(found) == _LOOKED_AT:
        more = ", ..."
    return (
        f"is a folder; name the files in it that are meant ({names}{more}), each by itself or with a pattern such as "
        f"{path}/*{files[0].suffix}"
    )
