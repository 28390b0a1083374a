"""Appends to the replay log, and makes what was appended durable.

Writing and syncing are two things, so that one sync serves all who wait for one: `write` is fast and takes its place in
the log, `sync` may run in another thread meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from rexrag.buffer.log import Chunk, frame, segment_head
from rexrag.buffer.records import Record
from rexrag.buffer.segments import newest_number, note_newest, segment_number, segment_path, segments
from rexrag.errors import RunFailure
from rexrag.files import sync_folder

_sync_data = getattr(os, "fdatasync", os.fsync)


class LogWriteError(RunFailure):
    """A record could not be made durable: the disk is full or broken. What was acknowledged before is intact."""


class LogWriter:
    """Appends records, each call all or nothing. It begins a segment of its own.

        writer = LogWriter(folder, segment_bytes=64 << 20)
        writer.write([record])
        writer.sync()                         # durable when it returns

    Attributes:
        first_segment: number of the segment that this writer began with; no other writer ever has the same.
        number: of the segment that it writes to now.
        num_written, num_durable: calls of `write` that came through, and how many of them are on disk.
    """

    def __init__(self, folder: Path, *, segment_bytes: int) -> None:
        if not folder.exists():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._failure: str | None = None
        self._lock = threading.Lock()
        self.first_segment = self.number = newest_number(folder) + 1
        self.num_written = self.num_durable = 0
        self._fd, self._written = self._create(self.number)
        self._durable = self._written

    @property
    def is_full(self) -> bool:
        """Whether the segment has grown to its size, so that the next one should begin."""
        return self._written >= self._segment_bytes

    def write(self, records: Sequence[Record]) -> None:
        """Append records.

        Raises:
            LogWriteError: nothing of these records is in the log.
        """
        chunks = [chunk for record in records for chunk in frame(record)]
        with self._lock:
            self._check()
            try:
                _write_all(self._fd, chunks)
            except OSError as error:
                self._take_back(self._written)
                raise LogWriteError(f"cannot write to {self._path}: {error.strerror}; free space and resume") from error
            self._written += sum(len(chunk) for chunk in chunks)
            self.num_written += 1

    def sync(self) -> None:
        """Put on disk what was written before the call; other threads may write meanwhile.

        Raises:
            LogWriteError: what was not on disk yet is lost, and nothing more can be written.
        """
        with self._lock:
            self._check()
            number, written, num_written = self.number, self._written, self.num_written
            if self.num_durable == num_written:
                return
            fd = os.dup(self._fd)  # `roll` may close its own
        try:
            _sync_data(fd)
        except OSError as error:
            # The kernel may have dropped earlier unsynced pages too: nothing more may follow in this segment.
            with self._lock:
                path = segment_path(self._folder, number)
                self._failure = f"cannot sync {path}: {error.strerror}; check the disk and resume"
                if number == self.number:
                    self._take_back(self._durable)
            raise LogWriteError(self._failure) from error
        finally:
            os.close(fd)
        with self._lock:
            self.num_durable = max(self.num_durable, num_written)
            if number == self.number:
                self._durable = max(self._durable, written)

    def roll(self, head: Record) -> None:
        """Go on in a new segment, which begins with `head`.

        Raises:
            LogWriteError: it cannot be begun.
        """
        self.sync()  # a segment is whole before the next one begins
        with self._lock:
            old = self._fd
            self._fd, self._written = self._create(self.number + 1)
            self.number += 1
            self._durable = self._written
            os.close(old)
        self.write([head])

    def delete_before(self, number: int) -> None:
        """Delete the segments before `number`, oldest first.

        Raises:
            LogWriteError: a file cannot be deleted.
        """
        for path in segments(self._folder):
            if segment_number(path) < min(number, self.number):
                try:
                    path.unlink()
                except OSError as error:
                    raise LogWriteError(f"cannot delete {path}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._fd)

    @property
    def _path(self) -> Path:
        return segment_path(self._folder, self.number)

    def _check(self) -> None:
        if self._failure is not None:
            raise LogWriteError(self._failure)

    def _take_back(self, end: int) -> None:
        try:
            os.ftruncate(self._fd, end)
            os.lseek(self._fd, end, os.SEEK_SET)
        except OSError as error:
            self._failure = f"cannot truncate {self._path} after a failed write: {error.strerror}; check the disk"

    def _create(self, number: int) -> tuple[int, int]:
        path = segment_path(self._folder, number)
        head = segment_head()
        fd = -1
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            _write_all(fd, [head])
            os.fsync(fd)
            sync_folder(self._folder)
            note_newest(self._folder, number)  # before any record, after what it speaks of
        except OSError as error:
            if fd >= 0:
                os.close(fd)
                path.unlink(missing_ok=True)
            raise LogWriteError(f"cannot begin {path}: {error.strerror}; free space and resume") from error
        return fd, len(head)


def _write_all(fd: int, chunks: Sequence[Chunk]) -> None:
    for chunk in chunks:
        view = memoryview(chunk)
        while view:
            view = view[os.write(fd, view) :]
