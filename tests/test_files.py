"""`rexrag.files`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from rexrag.files import lines_of, read_user_text, sha256_file, write_atomic


def test_content_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    write_atomic(path, "Gabón\n")
    assert path.read_bytes() == "Gabón\n".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failing_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_text_that_is_no_unicode_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "a.json", "\ud800")
    assert not list(tmp_path.iterdir())


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


SEPARATORS_WITHIN = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""What `str.splitlines` takes for line ends, and no editor, `wc` or JSON does."""


def test_lines_part_at_line_feeds_alone() -> None:
    text = f"one {SEPARATORS_WITHIN} still one\r\n\ntwo\r\nthree"
    assert lines_of(text) == [f"one {SEPARATORS_WITHIN} still one", "", "two", "three"]
    assert lines_of("") == []
    assert lines_of("a\n") == ["a"]


def test_a_byte_order_mark_is_no_part_of_a_users_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfGab\xc3\xb3n\r\n")
    assert read_user_text(tmp_path / "a.txt") == "Gabón\n"
