"""What a finished run tells at the end: EM before and after, dead ends over time, one that a probe left."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import rexrag.metrics as keys
from rexrag.errors import counted
from rexrag.files import read_jsonl
from rexrag.reporting.trace import coloured_trace, printable
from rexrag.run_folder import RunFolder, comparable

Line = dict[str, Any]

_BARS: Final = "▁▂▃▄▅▆▇█"
NUM_HINTS: Final = 3
"""Hints that are named."""


def print_report(run: RunFolder, *, console: Console) -> None:
    """Print all parts for which the run has figures."""
    console.print(Group(*_parts(run)))


def _parts(run: RunFolder) -> Iterator[RenderableType]:
    evaluations, steps = read_jsonl(run.eval), read_jsonl(run.metrics)
    for split in ("test", "dev"):
        lines = comparable(evaluations, split=split)
        if len(lines) > 1:
            yield em_table(lines[0], lines[-1], split=split)
    rates = [
        float(str(line[keys.TARGET_DEAD_END_RATE])) for line in steps if line[keys.TARGET_DEAD_END_RATE] is not None
    ]
    if rates:
        yield Text(f"dead ends among rollouts, step by step: {bars(rates)}  {rates[0]:.0%} to {rates[-1]:.0%}")
    yield from _weights_at_work(steps)
    yield from _rescue(read_jsonl(run.samples))
    if run.committed_checkpoints():
        yield Text(f"best checkpoint: {run.best_checkpoint()}")
    yield Text(f"run folder:      {run.root}")
    yield Text(f"curves:          tensorboard --logdir {run.tensorboard}")


def em_table(before: Line, after: Line, *, split: str) -> Table:
    """EM of two evaluations on the same questions, with 95% intervals, in all, by source and by hops.

    The mean over sources, where each counts the same, is what papers on several data sets call the average.
    """
    table = Table(title=f"EM on {counted(after['n'], f'{split} question')}")
    table.add_column("")
    table.add_column("before" if before["step"] == 0 else f"at step {before['step']}")
    table.add_column(f"after step {after['step']}")
    table.add_row("all", _with_interval(before), _with_interval(after))
    if len(before["by_source"]) > 1:
        table.add_row("mean over sources", f"{before['macro_em']:.2f}", f"{after['macro_em']:.2f}")
        _add_groups(table, before["by_source"], after["by_source"], name_of=printable)
    _add_groups(table, before["by_hops"], after["by_hops"], name_of=lambda hops: counted(int(hops), "hop"))
    return table


def _add_groups(
    table: Table, before: Mapping[str, Line], after: Mapping[str, Line], *, name_of: Callable[[str], str]
) -> None:
    for group, row in before.items():
        if later := after.get(group):
            name = Text(f"{name_of(group)} (n = {row['n']:.0f})")
            table.add_row(name, f"{row['em']:.2f}", f"{later['em']:.2f}")


def _with_interval(line: Line) -> str:
    return f"{line['em']:.2f} [{line['em_low']:.2f}, {line['em_high']:.2f}]"


def bars(shares: Sequence[float]) -> str:
    """Shares in [0, 1] as a line of bars.

    Example:
        >>> bars([0.0, 0.5, 1.0])
        '▁▅█'
    """
    return "".join(_BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in shares)


def _weights_at_work(steps: Sequence[Line]) -> Iterator[RenderableType]:
    """How much of the gradient came from probes, by which hints, and how many rows carried it."""
    shares = [float(line[key]) for line in steps if line.get(key := keys.GRADIENT_PROBE_SHARE) is not None]
    if not any(shares):
        return
    yield Text(f"gradient from probes, step by step:      {bars(shares)}  {shares[0]:.0%} to {shares[-1]:.0%}")
    by_hint: Counter[str] = Counter()
    for line in steps:
        by_hint.update({key: float(value) for key, value in line.items() if keys.described(key) == keys.GRADIENT_HINT})
    total = by_hint.total()
    told = [f"hint {keys.hint_of(key)} {pull / total:.0%}" for key, pull in by_hint.most_common(NUM_HINTS)]
    yield Text(f"hints that carried it:                   {', '.join(told)} (hints are counted from 0)")
    sizes = [
        f"{name} {statistics.median(values):.2f}"
        for name, key in (("targets", keys.WEIGHT_ESS_TARGET), ("probes", keys.WEIGHT_ESS_PROBE))
        if (values := [float(line[key]) for line in steps if line.get(key) is not None])
    ]
    yield Text(f"effective sample size, median of steps:  {', '.join(sizes)}")


def _rescue(samples: Sequence[Line]) -> Iterator[RenderableType]:
    """The last dead end of the run that a probe left."""
    for parent, probe in reversed(list(pairwise(samples))):
        if probe["rescued"] and parent["group_id"] == probe["group_id"]:
            yield Panel(coloured_trace(str(parent["text"]).strip()), title="a dead end")
            yield Panel(coloured_trace(str(probe["text"]).strip()), title="the probe that left it")
            return
