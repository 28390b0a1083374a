"""A run whose storage fails after it has begun."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rexrag.config import Config
from rexrag.errors import RunFailure
from rexrag.reporting.terminal import Progress
from rexrag.run import train
from rexrag.run_folder import RunFolder


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EROFS, "Read-only file system", "run/metrics.jsonl"), RunFailure),
        (OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"), OSError),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), BrokenPipeError),
    ],
)
def test_it_is_a_failure_and_no_mistake_of_the_command(
    error: OSError, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(train, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(train, "read_inputs", lambda _: SimpleNamespace(notes=()))
    monkeypatch.setattr(train, "_train_once", broken)
    request = SimpleNamespace(run=RunFolder(tmp_path), config=Config())
    with Progress() as progress, pytest.raises(kind, match=error.strerror) as caught:
        train.train(cast("Any", request), progress=progress)
    assert isinstance(caught.value, RunFailure) == (kind is RunFailure)
