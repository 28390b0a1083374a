from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from rexrag.errors import Interrupted
from rexrag.reporting.log_file import log_instead, log_to

PART = """
import logging, sys
from pathlib import Path
from rexrag.errors import Interrupted
from rexrag.reporting.log_file import log_process
log_process(Path(sys.argv[1]), part=sys.argv[2])
for number in range(300):
    logging.getLogger("rexrag.somewhere").warning("%d %s", number, "x" * 500)
"""


def test_parts_write_whole_lines_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    names = ["learner", "rollout-0", "buffer"]
    parts = [subprocess.Popen([sys.executable, "-c", PART, str(path), name]) for name in names]
    assert [part.wait(timeout=60) for part in parts] == [0, 0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for name in names:
        messages = [line["message"] for line in lines if line["part"] == name]
        assert [int(message.split()[0]) for message in messages] == list(range(300))


def test_what_ends_the_block_is_in_the_log_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(LookupError), log_to(tmp_path / "log.jsonl"):
        raise LookupError("gone")
    (line,) = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (line["part"], line["level"], line["message"]) == ("driver", "ERROR", "ended with LookupError: gone")
    assert "Traceback" in line["traceback"]


def test_a_stop_that_was_asked_for_is_no_error(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), log_to(tmp_path / "log.jsonl"):
        raise Interrupted("stopped by SIGTERM")
    (line,) = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert line["level"] == "INFO"
    assert "traceback" not in line


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    with log_to(tmp_path / "none" / "log.jsonl"):
        logging.getLogger("rexrag.somewhere").warning("unheard")


def test_the_errors_of_a_clean_up_do_not_hide_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    def clean_up() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="the cause"):
        try:
            raise ValueError("the cause")
        except ValueError:
            with log_instead(OSError):
                clean_up()
            raise
    assert "No space left" in caplog.text
