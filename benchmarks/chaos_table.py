"""Print the section on faults of docs/results.md, from benchmarks/results/chaos.json."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any, Final

NODES: Final = Path(__file__).resolve().parent / "results" / "node_chaos.json"
FIGURES: Final = Path(__file__).resolve().parent / "results" / "chaos.json"


def section(report: dict[str, Any]) -> str:
    """What a run under faults came to: its books, and what each kind of fault cost."""
    return "\n".join(("## Under faults", "", *_body(report), "", _HOW))


def nodes_section(report: dict[str, Any]) -> str:
    """The same of a run over several nodes."""
    return "\n".join(("## Under faults, over several nodes", "", *_body(report), "", _HOW_NODES))


_HOW: Final = (
    "A killed learner, buffer or driver ends the command; it is given again at once. The time to the first new "
    "step has what is done again after the last checkpoint in it. `benchmarks/chaos.py` makes the run."
)
_HOW_NODES: Final = (
    "Four Ray nodes on one machine: a head that offers nothing, one for the learner, two for a rollout actor each. A "
    "killed node is one whose raylet is killed with all that it has started, and another takes its place at once; Ray "
    "notices by its default health checks. A node that is told to go is drained, as a preemption does. "
    "`benchmarks/node_chaos.py` makes the run."
)


def _body(report: dict[str, Any]) -> list[str]:
    machine, books = report["machine"], report["accounting"]
    dropped = ", ".join(f"{number} {reason}" for reason, number in books["dropped"].items()) or "none"
    rows = [
        f"| {fault} | {times} | {_seconds(report['to_next_step_s'].get(fault, []))} | "
        f"{_seconds(report['without_progress_s'].get(fault, []))} |"
        for fault, times in sorted(report["faults"].items())
    ]
    return [
        f"{report['steps']} steps of a tiny model in the invented world, hurt {sum(report['faults'].values())} "
        f"times and started {report['starts']} times, in {report['seconds'] / 60:.0f} minutes on "
        f"{machine['cores']} cores ({machine['cpu']}); a step by itself takes {report['step_s']:.1f} s.",
        "",
        f"Groups lost: {report['lost']}. Trained on twice: {report['trained_twice']}. Of {books['issued']} groups "
        f"{books['consumed']} were consumed, {books['pending']} were left at the end; dropped: {dropped}.",
        "",
        "| fault | times | s to the next step, median and longest | s to the first new step |",
        "| --- | --- | --- | --- |",
        *rows,
    ]


def _seconds(gaps: list[float]) -> str:
    return f"{statistics.median(gaps):.1f}, {max(gaps):.1f}" if gaps else "–"


if __name__ == "__main__":
    sys.stdout.write(section(json.loads(FIGURES.read_text(encoding="utf-8"))) + "\n")
    if NODES.exists():
        sys.stdout.write("\n" + nodes_section(json.loads(NODES.read_text(encoding="utf-8"))) + "\n")
