from __future__ import annotations

import errno
import os
import pickle
import shutil
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from rexrag.buffer import log_writer as log_module
from rexrag.buffer.log import Damage, cut_torn_tail, read_log
from rexrag.buffer.log_writer import LogWriteError, LogWriter
from rexrag.buffer.records import Assign, Begin, Drop, DropReason, Finish, Issue, Outcome, Record, Snapshot, Then
from rexrag.buffer.segments import segments
from rexrag.errors import RunFolderError

RECORDS: tuple[Record, ...] = (
    Begin(incarnation="1", resume_step=0, num_questions=2, questions_hash="ab"),
    Issue(group_id="1-0", epoch=0, question="world/ä", attempt=0, version=0),
    Finish(
        group_id="1-0",
        epoch=0,
        question="world/ä",
        attempt=0,
        version=0,
        min_version=0,
        max_version=None,
        payload=b"RX\xff\xfe and other bytes",
    ),
    Drop(group_id="1-0", reason=DropReason.ENV_ERROR, then=Then.AGAIN),
    Assign(incarnation="1", step=1, groups=("1-1", "1-2"), rho=0.18),
    Outcome(incarnation="1", step=1, groups=("1-1", "1-2"), applied=True),
)

HEAD = Snapshot(payload=b"{}")


def write(folder: Path, records: tuple[Record, ...] = RECORDS, *, segment_bytes: int = 1 << 20) -> Path:
    writer = LogWriter(folder, segment_bytes=segment_bytes)
    for record in records:
        if writer.is_full:
            writer.roll(HEAD)
        writer.write([record])
        writer.sync()
    writer.close()
    return segments(folder)[-1]


def read(folder: Path) -> tuple[list[Record], list[Damage]]:
    items = [item for item in read_log(folder) if item != HEAD]
    records = [item for item in items if not isinstance(item, Damage)]
    return records, [item for item in items if isinstance(item, Damage)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    assert read(tmp_path) == (list(RECORDS), [])
    assert read(tmp_path / "absent") == ([], [])


def test_segments_roll_and_every_writer_begins_its_own(tmp_path: Path) -> None:
    write(tmp_path, segment_bytes=200)
    num = len(segments(tmp_path))
    assert num > 2
    second = LogWriter(tmp_path, segment_bytes=200)
    assert second.first_segment == num + 1
    second.write([RECORDS[1]])
    assert read(tmp_path) == ([*RECORDS, RECORDS[1]], [])


def test_a_tail_torn_at_any_byte_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands, for which a busy disk takes minutes
    monkeypatch.setattr(log_module, "_sync_data", lambda _: None)
    path = write(tmp_path / "whole")
    data = path.read_bytes()
    for size in range(len(data)):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / path.name).write_bytes(data[:size])
        records, damages = read(folder)
        assert records == list(RECORDS[: len(records)])
        assert all(damage.torn and damage.end == size for damage in damages)
        for damage in damages:
            cut_torn_tail(damage)
        write(folder, RECORDS[:2])
        assert read(folder) == (records + list(RECORDS[:2]), [])
        shutil.rmtree(folder)


def test_a_damaged_byte_costs_at_most_its_own_record(tmp_path: Path) -> None:
    path = write(tmp_path)
    write(tmp_path, RECORDS[:1])
    data, whole = path.read_bytes(), [*RECORDS, RECORDS[0]]
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :])
        records, damages = read(tmp_path)
        assert len(damages) == 1
        assert not damages[0].torn
        assert damages[0].start <= position < damages[0].end
        if position < 16:  # the head of the segment
            assert records == whole
        else:
            assert records in [whole[:lost] + whole[lost + 1 :] for lost in range(len(RECORDS))]


def test_a_damaged_group_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"and other", b"and OTHER"))
    records, (damage,) = read(tmp_path)
    assert damage.group_id == "1-0"
    assert len(records) == len(RECORDS) - 1


@given(junk=st.binary(max_size=300), at=st.integers(0, 2000), length=st.integers(0, 300))
@settings(deadline=None, max_examples=200)
def test_reading_survives_anything(tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int, length: int) -> None:
    folder = tmp_path_factory.mktemp("log")
    path = write(folder)
    data = path.read_bytes()
    at %= len(data)
    path.write_bytes(data[:at] + junk + data[at + length :])
    records, _ = read(folder)
    assert all(record in RECORDS for record in records)
    shutil.rmtree(folder)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    head = b"REXRAG\xff\n" + struct.pack("<I", 2)
    path.write_bytes(head + struct.pack("<I", zlib.crc32(head)) + path.read_bytes()[16:])
    with pytest.raises(RunFolderError, match=r"version 2, this build reads version 1"):
        read(tmp_path)


def test_a_record_of_the_future_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rexrag.buffer.log.encode", lambda record: ({"type": "merge"}, b""))
    write(tmp_path, RECORDS[:1])
    with pytest.raises(RunFolderError, match="'merge', unknown"):
        read(tmp_path)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "segment-old.log").touch()
    with pytest.raises(RunFolderError, match=r"segment-old\.log is no segment"):
        read(tmp_path)


def test_acknowledged_records_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a file has what was synced, and nothing more."""
    durable: dict[int, int] = {}
    sync_data = log_module._sync_data

    def record_sync(fd: int) -> None:
        sync_data(fd)
        status = os.fstat(fd)
        durable[status.st_ino] = status.st_size

    monkeypatch.setattr(log_module, "_sync_data", record_sync)
    writer = LogWriter(tmp_path, segment_bytes=700)
    written, acknowledged = [], 0
    for number in range(42):
        record = Issue(group_id=f"1-{number}", epoch=0, question="world/0", attempt=0, version=0)
        if writer.is_full:
            writer.roll(HEAD)
        writer.write([record])
        written.append(record)
        if number % 3 == 0:
            writer.sync()
            acknowledged = len(written)
    for path in segments(tmp_path):
        with path.open("r+b") as file:
            file.truncate(durable.get(path.stat().st_ino, 16))
    records, _ = read(tmp_path)
    assert records == written[: len(records)]
    assert acknowledged <= len(records) < len(written)


def test_after_a_failed_sync_nothing_more_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    writer = LogWriter(tmp_path, segment_bytes=1 << 20)
    writer.write(RECORDS[:1])
    writer.sync()
    with monkeypatch.context() as patch:
        patch.setattr(log_module, "_sync_data", fail)
        with pytest.raises(LogWriteError, match="Input/output error"):
            writer.write(RECORDS[1:2])
            writer.sync()
    with pytest.raises(LogWriteError, match="check the disk"):
        writer.write(RECORDS[1:2])
    with pytest.raises(LogWriteError, match="check the disk"):
        writer.sync()
    assert read(tmp_path) == ([RECORDS[0]], [])


def test_what_is_written_during_a_sync_is_synced_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread syncs while another writes, and begins a new segment: each record is counted once it is on disk."""
    syncing, go_on = threading.Event(), threading.Event()
    sync_data = log_module._sync_data

    def slowly(fd: int) -> None:
        syncing.set()
        assert go_on.wait(30)
        sync_data(fd)

    writer = LogWriter(tmp_path, segment_bytes=1 << 20)
    writer.write(RECORDS[:1])
    monkeypatch.setattr(log_module, "_sync_data", slowly)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(writer.sync)
        assert syncing.wait(30)
        writer.write(RECORDS[1:2])
        monkeypatch.setattr(log_module, "_sync_data", sync_data)
        writer.roll(HEAD)
        writer.write(RECORDS[2:])
        assert (writer.num_durable, writer.num_written) == (2, 4)
        go_on.set()
        first.result(30)
    assert writer.num_durable == 2
    writer.sync()
    assert writer.num_durable == writer.num_written
    assert read(tmp_path) == (list(RECORDS), [])


def test_segments_before_a_number_are_deleted(tmp_path: Path) -> None:
    write(tmp_path, segment_bytes=100)
    writer = LogWriter(tmp_path, segment_bytes=100)
    writer.delete_before(3)
    assert segments(tmp_path)[0].name == "segment-000003.log"
    writer.delete_before(10**6)
    assert segments(tmp_path) == [tmp_path / f"segment-{writer.number:06d}.log"]
    assert LogWriter(tmp_path, segment_bytes=100).first_segment == writer.number + 1


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(LogWriteError("cannot write")))
    assert isinstance(error, LogWriteError)
    assert str(error) == "cannot write"
