"""`log.jsonl`: what all parts of a run log, a JSON object a line. Light enough for every process of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from rexrag.errors import Interrupted
from rexrag.files import append_line

LOG = logging.getLogger(__name__)


@contextmanager
def log_to(path: Path, *, part: str = "driver") -> Iterator[None]:
    """Write this package's log records, from INFO on, to a `log.jsonl` while the block runs, and what ends it."""
    handler = _JsonlHandler(path, part=part)
    logger = logging.getLogger("rexrag")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        handler.handle(_record_of(error))
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def log_process(path: Path | None, *, part: str) -> None:
    """From now on all of this process's records go to the run's `log.jsonl`; None: nowhere but to stderr."""
    if path is not None:
        logger = logging.getLogger("rexrag")
        logger.setLevel(logging.INFO)
        logger.addHandler(_JsonlHandler(path, part=part))


@contextmanager
def log_instead(*kinds: type[Exception]) -> Iterator[None]:
    """Log such errors of a clean-up instead of raising them: what made it necessary is what the user must see."""
    try:
        yield
    except kinds:
        LOG.exception("while ending")


class _JsonlHandler(logging.Handler):
    def __init__(self, path: Path, *, part: str) -> None:
        super().__init__(logging.INFO)
        self._path = path
        self._part = part

    def emit(self, record: logging.LogRecord) -> None:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "part": self._part,
            "level": record.levelname,
            "source": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = logging.Formatter().formatException(record.exc_info)
        with suppress(OSError):  # a full disk ends the run where its data is written, with a better message
            append_line(self._path, json.dumps(line, ensure_ascii=False))


def _record_of(error: Exception) -> logging.LogRecord:
    message = f"ended with {type(error).__name__}: {error}"
    if isinstance(error, Interrupted):  # as it was asked to
        return logging.LogRecord("rexrag", logging.INFO, __file__, 0, message, None, None)
    info = (type(error), error, error.__traceback__)
    return logging.LogRecord("rexrag", logging.ERROR, __file__, 0, message, None, info)
