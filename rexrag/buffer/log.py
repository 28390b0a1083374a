"""The replay log on disk: append-only segments of checksummed records.

Each process that opens the log begins a new segment, and a segment that has grown to `segment_bytes` is followed by
another (`rexrag.buffer.segments` has their names). Each begins with a snapshot of what all records before come to: old
ones can be deleted, and the loss of one costs no more than the finished groups in it. All integers are little-endian:

    segment = "REXRAG\\xff\\n"  version u32  crc32 u32 (of the 12 bytes before)  record*
    record  = "RX\\xff\\xfe"  header_length u32  payload_length u64  payload_crc32 u32
              crc32 u32 (of the 20 bytes before and the header)  header  payload

The header is JSON (`rexrag.buffer.records`). The payload of a `group` record is the very Arrow IPC stream that was
appended: one record batch of `GROUP_SCHEMA`; that of a `snapshot` is JSON. 0xff never occurs in UTF-8, so text in a
payload cannot pass for a record.

Reading survives anything on disk. A record that was being written when the process or the machine died is a torn
tail: it was never acknowledged, and is cut. A damaged record elsewhere is reported, and reading goes on at the next
whole one.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, TypeAlias

from rexrag.buffer.records import Record, decode, encode
from rexrag.buffer.segments import newest_number, segment_number, segment_path, segments
from rexrag.errors import RunFolderError, counted

LOG = logging.getLogger(__name__)

LOG_VERSION: Final = 1
_SEGMENT_MAGIC: Final = b"REXRAG\xff\n"
_RECORD_MAGIC: Final = b"RX\xff\xfe"
_SEGMENT_HEAD: Final = struct.Struct("<8sII")
_RECORD_HEAD: Final = struct.Struct("<4sIQI")
_CRC: Final = struct.Struct("<I")
_HEAD_SIZE: Final = _RECORD_HEAD.size + _CRC.size
_MAX_HEADER_BYTES: Final = 1 << 26

Chunk: TypeAlias = bytes | memoryview


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Bytes [start, end) of a segment that are no whole record; none of them: the segment is missing.

    `torn`: the end of the last segment, as a crash leaves it. `group_id`: the group whose bytes are damaged, where
    its header is readable.
    """

    segment: Path
    start: int
    end: int
    torn: bool = False
    group_id: str | None = None

    @property
    def is_missing(self) -> bool:
        return self.end == 0

    def __str__(self) -> str:
        if self.is_missing:
            return f"{self.segment} is missing"
        whose = "" if self.group_id is None else f", the bytes of group {self.group_id}"
        return f"{self.segment} is damaged from byte {self.start} to {self.end}{whose}"


def read_log(folder: Path) -> Iterator[Record | Damage]:
    """All records in the order they were written, and the damage between them, missing segments included.

    The payload of a `Finish` is a view of the mapped file, its checksum verified.

    Raises:
        RunFolderError: a log of another version.
    """
    newest = newest_number(folder)  # before a segment is begun meanwhile
    paths = {segment_number(path): path for path in segments(folder)}
    for number in range(1, max([newest, *paths]) + 1):
        if number in paths:
            yield from _read_segment(paths[number], is_last=number == newest)
        else:
            yield Damage(segment=segment_path(folder, number), start=0, end=0)


def read_head(segment: Path) -> Iterator[Record | Damage]:
    """What a segment begins with: the snapshot, and the record after it.

    Raises:
        RunFolderError: a log of another version.
    """
    yield from islice(_read_segment(segment, is_last=False), 2)


def cut_torn_tail(damage: Damage) -> None:
    """Cut what a crash left at the end of the last segment."""
    LOG.warning(
        "%s: %s of an unfinished record cut at %d",
        damage.segment,
        counted(damage.end - damage.start, "byte"),
        damage.start,
    )
    with damage.segment.open("r+b") as file:
        file.truncate(damage.start)
        os.fsync(file.fileno())


def frame(record: Record) -> list[Chunk]:
    """A record as the bytes that stand in a segment."""
    header, payload = encode(record)
    text = json.dumps(header, separators=(",", ":")).encode()
    head = _RECORD_HEAD.pack(_RECORD_MAGIC, len(text), len(payload), zlib.crc32(payload))
    return [head + _CRC.pack(zlib.crc32(text, zlib.crc32(head))) + text, payload]


def segment_head() -> bytes:
    """The bytes that every segment begins with."""
    crc = zlib.crc32(_SEGMENT_MAGIC + _CRC.pack(LOG_VERSION))
    return _SEGMENT_HEAD.pack(_SEGMENT_MAGIC, LOG_VERSION, crc)


def _read_segment(path: Path, *, is_last: bool) -> Iterator[Record | Damage]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:  # created, and then the machine died
            return
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    view = memoryview(data)
    position = _check_segment_head(path, view)
    while position < size:
        header_end = _header_end(view, position)
        if header_end is None:
            resume = _next_record(data, view, position + 1)
            yield Damage(segment=path, start=position, end=resume or size, torn=is_last and resume is None)
            position = resume or size
            continue
        end, header, is_whole = _split(view, position, header_end)
        if is_whole:
            yield decode(header, view[header_end:end])
        else:
            owner = None if (group_id := header.get("group_id")) is None else str(group_id)
            yield Damage(segment=path, start=position, end=min(end, size), torn=is_last and end > size, group_id=owner)
        position = end


def _check_segment_head(path: Path, view: memoryview) -> int:
    """Where records begin; 0 where the head is damaged, so that it is reported like any other damage."""
    if len(view) < _SEGMENT_HEAD.size:
        return 0
    magic, version, crc = _SEGMENT_HEAD.unpack_from(view)
    if magic != _SEGMENT_MAGIC or crc != zlib.crc32(view[: _SEGMENT_HEAD.size - _CRC.size]):
        return 0
    if version != LOG_VERSION:
        raise RunFolderError(
            f"{path} is a replay log of version {version}, this build reads version {LOG_VERSION}: "
            "use the version of rexrag that wrote it, or a new run folder"
        )
    return _SEGMENT_HEAD.size


def _header_end(view: memoryview, position: int) -> int | None:
    """Where the header of the record at `position` ends; None where there is no whole header."""
    start = position + _HEAD_SIZE
    if start > len(view):
        return None
    magic, length, _, _ = _RECORD_HEAD.unpack_from(view, position)
    if magic != _RECORD_MAGIC or length > _MAX_HEADER_BYTES or start + length > len(view):
        return None
    (crc,) = _CRC.unpack_from(view, position + _RECORD_HEAD.size)
    head = zlib.crc32(view[position : position + _RECORD_HEAD.size])
    return start + length if crc == zlib.crc32(view[start : start + length], head) else None


def _split(view: memoryview, position: int, header_end: int) -> tuple[int, dict[str, object], bool]:
    """End of the record, its header, and whether its payload is all there."""
    _, _, payload_length, payload_crc = _RECORD_HEAD.unpack_from(view, position)
    end = header_end + payload_length
    header: dict[str, object] = json.loads(bytes(view[position + _HEAD_SIZE : header_end]))
    is_whole = end <= len(view) and zlib.crc32(view[header_end:end]) == payload_crc
    return end, header, is_whole


def _next_record(data: mmap.mmap, view: memoryview, position: int) -> int | None:
    found = data.find(_RECORD_MAGIC, position)
    while found >= 0 and _header_end(view, found) is None:
        found = data.find(_RECORD_MAGIC, found + 1)
    return found if found >= 0 else None
