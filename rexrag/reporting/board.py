"""The one writer of a run's TensorBoard events, `metrics.jsonl`, `eval.jsonl` and `samples.jsonl`.

Keys of the jsonl files are the TensorBoard tags. A metric without a value is `null` there and no point here.
What is compared in one chart has one tag, `compare/...`, and a run of its own for each curve (`target` and `probe`,
`dev` and `test`): TensorBoard tells runs apart by colour.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

import rexrag.metrics as keys
from rexrag.files import append_line
from rexrag.run_folder import RunFolder
from rexrag.types import Sample

_COMPARED: Final[Mapping[str, tuple[str, str]]] = {
    keys.TARGET_EM: ("target", "compare/rollouts_em"),
    keys.PROBE_EM: ("probe", "compare/rollouts_em"),
    keys.WEIGHT_ESS_TARGET: ("target", "compare/effective_sample_size"),
    keys.WEIGHT_ESS_PROBE: ("probe", "compare/effective_sample_size"),
    "eval/dev/em": ("dev", "compare/evaluation_em"),
    "eval/test/em": ("test", "compare/evaluation_em"),
}
"""Tag of a curve -> the run that it has for itself, and the tag that it shares with what it is compared with."""

_CHARTS: Final[Mapping[str, Sequence[str]]] = {
    "exact match: targets, probes": ("compare/rollouts_em",),
    "exact match: dev, test": ("compare/evaluation_em",),
    "dead ends and rescue": (keys.TARGET_DEAD_END_RATE, keys.GROUP_DEAD_END_RATE, keys.GROUP_RESCUED),
    "effective sample size": ("compare/effective_sample_size",),
    "gradient from probes": (keys.GRADIENT_PROBE_SHARE,),
    "what weights are owed to": (keys.WEIGHT_BY_MIXTURE, keys.WEIGHT_BY_STALENESS, keys.WEIGHT_BY_MISMATCH),
    "age, learner steps": (keys.STALENESS_MEAN, keys.STALENESS_MAX),
}
_RESULTS: Final = ("eval/test/em", "eval/dev/em", keys.TARGET_EM)
"""What the table of runs compares beside their settings."""
_EVAL_SCALARS: Final = ("em", "em_low", "em_high", "f1", "macro_em")


class Board:
    """Writes what a run tells of itself; each line and event is on disk when the call returns.

        with Board(run, purge_step=None) as board:
            board.step(1, metrics={"target/em": 0.1}, histograms={})

    Args:
        purge_step: on a resume the first step that is written anew: TensorBoard forgets later points.
        settings: of the run, by their keys, for TensorBoard's table of runs.
    """

    def __init__(self, run: RunFolder, *, purge_step: int | None, settings: Mapping[str, object] | None = None) -> None:
        self._run = run
        names = ["", *dict.fromkeys(name for name, _ in _COMPARED.values())]
        self._writers = {name: SummaryWriter(run.tensorboard / name, purge_step=purge_step) for name in names}
        if settings:
            shown = {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)}
            for summary in _hparams(shown):
                self._writers[""]._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
        if purge_step is None:
            charts = {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in _CHARTS.items()}
            self._writers[""].add_custom_scalars({"REX-RAG": charts})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            # What is left to be written may fail as what went before did: the first error is the one to be told.
            with suppress(OSError) if error is not None else nullcontext():
                writer.close()

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
                self._writers[""].add_histogram(key, np.asarray(values, np.float64), step)
        self._flush()

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
        by_source = line.get("by_source")
        if isinstance(by_source, Mapping) and len(by_source) > 1:
            for source, row in by_source.items():
                name = re.sub(r"[^\w.-]", "_", str(source))
                self._scalar(f"eval/{line['split']}/source/{name}", float(row["em"]), step=step)
        self._flush()

    def sample(self, step: int, sample: Sample) -> None:
        """One trajectory to read: a line of `samples.jsonl`, and a text under `samples/<tag>`."""
        _append(self._run.samples, {keys.STEP: step, "tag": sample.tag, **sample.fields, "text": sample.text})
        self._writers[""].add_text(f"samples/{sample.tag}", _as_markdown_code(sample.text), step)
        self._flush()

    def _scalar(self, tag: str, value: float, *, step: int) -> None:
        self._writers[""].add_scalar(tag, value, step)
        if tag in _COMPARED:
            name, shared = _COMPARED[tag]
            self._writers[name].add_scalar(shared, value, step)

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()


def _hparams(settings: Mapping[str, bool | int | float | str]) -> Sequence[object]:
    """Summaries of what the settings are, and of those of this run."""
    experiment, start, _ = hparams(settings, dict.fromkeys(_RESULTS))  # type: ignore[no-untyped-call]
    return experiment, start


def _append(path: Path, line: Mapping[str, object]) -> None:
    append_line(path, json.dumps(line, ensure_ascii=False, allow_nan=False))


def _as_markdown_code(text: str) -> str:
    """Text as an indented block, which nothing inside it can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())
