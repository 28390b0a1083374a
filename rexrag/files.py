"""Files that are either whole or not there, their hashes, and the lines of a text."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a disk that is full."""
_HASH_BLOCK_BYTES: Final = 1 << 20
_TEMPORARY: Final = re.compile(r"\..+\.\d+-[0-9a-f]+\.tmp")
"""Names that `write_atomic` gives."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace a file's content durably: readers see the old bytes or the new ones, never a part.

    Text is written as UTF-8. The file's name is durable too: its folder is synced.

    Raises:
        OSError: the folder is missing, full or not writable; the old content is then untouched. It names the path.
    """
    with naming(path):
        _write_atomic(path, data)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the operating system the path that they lack: a full disk does not say where."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def take_lock(fd: int) -> None:
    """Lock an open file for this process alone, for as long as it is open.

    Raises:
        BlockingIOError: another process holds the lock, and not only to look (`is_locked`).
    """
    for _ in range(5):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.1)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def append_line(path: Path, text: str) -> None:
    """One more line of a file that several processes may append to; after a torn line it begins a new one.

    Raises:
        OSError: it cannot be written; it names the path.
    """
    data = f"{text}\n".encode("utf-8", "replace")
    with naming(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # Without the lock another process's line, half written, looks torn. Some file systems have no locks.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            while data:  # at once, but where the disk is full
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether a file is what `write_atomic` leaves where it is killed."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _write_atomic(path: Path, data: bytes | str) -> None:
    content = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_user_text(path: Path) -> str:
    """A text file that a user wrote: UTF-8, without the byte order mark that some editors put before it.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is no UTF-8.
    """
    return path.read_text(encoding="utf-8-sig")


def lines_of(text: str) -> list[str]:
    r"""The lines of a text file, parted at `\n` and `\r\n` alone.

    `str.splitlines` also parts at U+2028, U+2029, U+0085 and more, which stand inside JSON strings and sentences.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a jsonl file of our own; a torn last line is left out, no file is no line."""
    if not path.exists():
        return []
    lines = []
    for text in lines_of(path.read_text(encoding="utf-8", errors="replace")):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder, some of which may be going away."""
    total = 0
    with contextlib.suppress(OSError):  # of the walk: a folder in it was renamed
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                total += path.stat().st_size
    return total


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
