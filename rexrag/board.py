"""The one writer of a run's TensorBoard events, `metrics.jsonl`, `eval.jsonl`, `samples.jsonl` and `log.jsonl`.

Keys of the jsonl files are the TensorBoard tags. A metric without a value is `null` there and no point here.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, create_summary_metadata
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

import rexrag.metrics as keys
from rexrag.run_folder import RunFolder

_CHARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "exact match: targets, probes": (keys.TARGET_EM, keys.PROBE_EM),
    "exact match: dev, test": ("eval/dev/em", "eval/test/em"),
    "dead ends and rescue": (keys.TARGET_DEAD_END_RATE, keys.GROUP_DEAD_END_RATE, keys.GROUP_RESCUED),
    "effective sample size": (keys.WEIGHT_ESS_TARGET, keys.WEIGHT_ESS_PROBE),
    "age, learner steps": (keys.STALENESS_MEAN, keys.STALENESS_MAX),
}
_EVAL_SCALARS: Final = ("em", "em_low", "em_high", "f1")


class Board:
    """Writes what a run tells of itself; each line and event is on disk when the call returns.

        with Board(run, purge_step=None) as board:
            board.step(1, metrics={"target/em": 0.1}, histograms={})

    Args:
        purge_step: on a resume the first step that is written anew: TensorBoard forgets later points.
    """

    def __init__(self, run: RunFolder, *, purge_step: int | None) -> None:
        self._run = run
        self._events = EventFileWriter(str(run.tensorboard))
        if purge_step is None:
            self._summary(0, _layout())
        else:
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._events.close()

    def step(
        self, step: int, *, metrics: Mapping[str, float | None], histograms: Mapping[str, Sequence[float]]
    ) -> None:
        """One learner step: a line of `metrics.jsonl`, its scalars and histograms. No value is NaN or infinite."""
        broken = {key: value for key, value in metrics.items() if value is not None and not math.isfinite(value)}
        assert not broken, f"metrics without a finite value must be None: {broken}"
        _append(self._run.metrics, {**metrics, keys.STEP: step})
        for key, value in metrics.items():
            if value is not None and key != keys.STEP:
                self._scalar(key, value, step=step)
        for key, values in histograms.items():
            if len(values):
                self._summary(step, histogram_pb(key, np.asarray(values, np.float64)))
        self._events.flush()

    def evaluation(self, line: Mapping[str, object]) -> None:
        """One evaluation: a line of `eval.jsonl`, scalars `eval/<split>/<name>`."""
        _append(self._run.eval, line)
        step = int(str(line["step"]))
        for name in _EVAL_SCALARS:
            self._scalar(f"eval/{line['split']}/{name}", float(str(line[name])), step=step)
        by_hops = line.get("by_hops")
        if isinstance(by_hops, Mapping):
            for hops, row in by_hops.items():
                self._scalar(f"eval/{line['split']}/em_{hops}_hops", float(row["em"]), step=step)
        self._events.flush()

    def sample(self, step: int, *, tag: str, text: str, fields: Mapping[str, object]) -> None:
        """One trajectory to read: a line of `samples.jsonl`, and a text under `samples/<tag>`."""
        _append(self._run.samples, {keys.STEP: step, "tag": tag, **fields, "text": text})
        self._summary(step, text_pb(f"samples/{tag}", _as_markdown_code(text)))
        self._events.flush()

    def _scalar(self, tag: str, value: float, *, step: int) -> None:
        self._summary(step, Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

    def _summary(self, step: int, summary: Summary) -> None:
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write this package's log records, from INFO on, to a `log.jsonl` while the block runs."""
    handler = _JsonlHandler(path)
    logger = logging.getLogger("rexrag")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _JsonlHandler(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "source": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = logging.Formatter().formatException(record.exc_info)
        _append(self._path, line)


def _append(path: Path, line: Mapping[str, object]) -> None:
    """One line at the end of a jsonl file; after a torn line it begins a new one."""
    text = json.dumps(line, ensure_ascii=False, allow_nan=False)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = f"\n{text}"
        file.write(f"{text}\n".encode())


def _as_markdown_code(text: str) -> str:
    """Text as an indented block, which nothing inside it can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _layout() -> Summary:
    """The page of TensorBoard's custom scalars that shows targets beside probes."""
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
        for title, tags in _CHARTS.items()
    ]
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title="REX-RAG", chart=charts)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[layout.SerializeToString()])
    metadata = create_summary_metadata()
    return Summary(value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, metadata=metadata, tensor=tensor)])
