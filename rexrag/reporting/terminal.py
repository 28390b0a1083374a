"""What the terminal shows of a run, on stderr: a line per stage, step and evaluation, and under them a live bar.

Without a terminal there is no bar; a long stage then tells how far it is now and then.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

import rexrag.metrics as keys
from rexrag.errors import counted
from rexrag.reporting.trace import printable

_PLAIN_EVERY_S: Final = 10.0
_RECENT_STEPS: Final = 3
"""Steps that the time left is told by: they grow longer once a policy has learnt to go on."""


class Progress:
    """Shows stages one after another, then the steps of the training.

    with Progress() as progress:
        progress.stage("building the index")
        progress.training(done=0, total=12)
        progress.step(1, metrics={"target/em": 0.1})
    """

    def __init__(self, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, emoji=False)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._stage: tuple[str, float | None, float] | None = None
        self._stage_task: TaskID | None = None
        self._steps_task: TaskID | None = None
        self._total_steps = 0
        self._step_began = 0.0
        self._last_steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._last_plain = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.end_stage()
        self._bar.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(printable(text), markup=False, soft_wrap=True)

    def stage(self, name: str, *, total: float | None = None) -> None:
        """Begin a stage; the one before it has ended. `total`: what `advance_to` counts up to."""
        self.end_stage()
        self._stage = (name, total, time.monotonic())
        self._last_plain = time.monotonic()
        self._stage_task = self._bar.add_task(name, total=total)
        if not self._console.is_terminal:
            self.note(f"{name} ...")

    def advance_to(self, done: float) -> None:
        """How far the stage is, out of its total."""
        assert self._stage is not None, "advance_to belongs to a stage"
        assert self._stage_task is not None
        self._bar.update(self._stage_task, completed=done)
        name, total, started = self._stage
        now = time.monotonic()
        if self._console.is_terminal or now - self._last_plain < _PLAIN_EVERY_S:
            return
        self._last_plain = now
        if total and done > 0:
            left = (now - started) * (total - done) / done
            self.note(f"  {name}: {done / total:.0%}, {duration(left)} left")

    def end_stage(self) -> None:
        """Say how long the stage took."""
        if self._stage is None:
            return
        assert self._stage_task is not None
        self._bar.remove_task(self._stage_task)
        name, _, started = self._stage
        self._stage, self._stage_task = None, None
        self.note(f"{name}: {duration(time.monotonic() - started)}")

    def training(self, *, done: int, total: int) -> None:
        """The steps begin: `done` of `total` are behind."""
        self.end_stage()
        self._total_steps = total
        self._step_began = time.monotonic()
        self._steps_task = self._bar.add_task("training", total=total, completed=done)

    def waiting(self, step: int, *, finished: int, needed: int) -> None:
        """The learner waits for the groups of a step."""
        if self._steps_task is not None:
            self._bar.update(self._steps_task, description=f"step {step}: {finished} of {counted(needed, 'group')}")

    def step(self, step: int, *, metrics: Mapping[str, float | None]) -> None:
        """A step is done."""
        self.end_stage()
        if self._steps_task is not None:
            self._bar.update(self._steps_task, completed=step, description="training")
        now = time.monotonic()
        self._last_steps.append(now - self._step_began)
        self._step_began = now
        left = statistics.fmean(self._last_steps) * (self._total_steps - step)
        self.note(f"{step_line(step, total=self._total_steps, metrics=metrics)}  {duration(left)} left")

    def evaluation(self, line: Mapping[str, object]) -> None:
        """An evaluation is done: its line of `eval.jsonl`."""
        self.end_stage()
        em, low, high = (float(str(line[name])) for name in ("em", "em_low", "em_high"))
        self.note(f"EM on {line['split']} at step {line['step']}: {em:.2f} [{low:.2f}, {high:.2f}], n = {line['n']}")


def step_line(step: int, *, total: int, metrics: Mapping[str, float | None]) -> str:
    """A learner step on one line; a dash where a metric has no value."""

    def shown(key: str, form: str, scale: float = 1.0) -> str:
        value = metrics.get(key)
        return "-" if value is None else f"{scale * value:{form}}"

    width = len(str(total))
    return (
        f"step {step:>{width}}/{total}"
        f"  EM target {shown(keys.TARGET_EM, '.2f')} probe {shown(keys.PROBE_EM, '.2f')}"
        f"  dead ends {shown(keys.TARGET_DEAD_END_RATE, '.0f', 100)}%"
        f"  rescued {shown(keys.GROUP_RESCUED, '.0f', 100)}%"
        f"  age {shown(keys.STALENESS_MEAN, '.1f')}"
        f"  {shown(keys.ROLLOUT_TOKENS_PER_S, '.0f')} tokens/s"
    )


def duration(seconds: float) -> str:
    """Seconds for a reader: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
