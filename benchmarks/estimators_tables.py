"""The tables of docs/estimators.md, and last that of docs/results.md, from the figures that `estimators.py` wrote.

python benchmarks/estimators_tables.py [--figures FILE.json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
FIGURES: Final = ROOT / "benchmarks" / "results" / "estimators.json"
OURS: Final = "escape"
MIDDLE: Final = "1e-4"
QUICK_START: Final = "2e-4"
"""The real model's depth in its recipe as it is."""
BASELINES: Final = ("grpo", "paper")
MAIN: Final = (OURS, "none", *BASELINES)
"""Methods that the figures that count are about."""
AT_ALL_DEPTHS: Final = (
    *MAIN,
    "escape, plain penalty",
    "escape, each dead rollout",
    "rex",
    "rex, without preserving",
    "maxrl",
    "maxrl, preserving",
)
OUTCOME: Final = (
    "EM before",
    "EM after",
    "1 / 2 / 3 hops",
    "worst one-hop change",
    "half-way at step",
    "all rollouts",
)
STUDENT_95: Final = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}
"""Two-sided 95% quantiles of Student's t by degrees of freedom."""
ROUNDING: Final = 1e-9


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one run came to. EM is greedy.

    Attributes:
        commit: of the code that ran. gpu: it ran on, None: on the CPU. groups: questions asked, of all steps.
        think: probability of going on after the warm start, median of dev questions.
        escape_step: first step at which EM on dev questions, a line between evaluations, is half-way from the first to
            the last evaluation; None where EM on test questions rises by less than .1.
        escape_rollouts, escape_s: up to that step; no rollouts where groups were dropped on the way (refilled).
        worst_one_hop: lowest minus first EM on the one-hop dev questions.
        reflects: share of targets that wrote the words of a hint, mean of the last five steps.
        ess_probe: effective sample size of the probes' tokens, mean over steps with probes.
        seconds: of the training steps, evaluations left out; runs may share the machine.
    """

    world: str
    method: str
    depth: str
    seed: int
    commit: str
    gpu: str | None
    think: float
    group_size: int
    steps: int
    groups: int
    rollouts: int
    seconds: float
    em_before: float
    em_after: float
    by_hops_before: dict[str, float]
    by_hops_after: dict[str, float]
    worst_one_hop: float
    escape_step: int | None
    escape_rollouts: int | None
    escape_s: float | None
    reflects: float
    ess_probe: float | None
    dev_steps: list[int]
    dev_em: list[float]
    one_hop_em: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    rows = load(parser.parse_args().figures)
    print("\n\n".join([*tables(rows), quick_start_table(rows)]))


def load(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def tables(rows: Sequence[Row]) -> list[str]:
    """All tables that these rows fill, Markdown."""
    made = []
    for world in dict.fromkeys(row.world for row in rows):
        mine = [row for row in rows if row.world == world]
        if world == "synthetic":
            made.append(methods_table([row for row in mine if row.depth == MIDDLE]))
        made += [depths_table(mine), goals_table(mine), harm_table(mine)]
    return made


def methods_table(rows: Sequence[Row]) -> str:
    """A line per method, all at one depth."""
    titles = ["method", "EM after", f"`{OURS}` − it", "1 / 2 / 3 hops", "worst one-hop change", "half-way at step"]
    titles += ["rollouts until then", "seconds until then", "all rollouts", "all seconds", "ESS of probes"]
    lines = []
    for method, mine in by_method(rows):
        ess = [row.ess_probe for row in mine if row.ess_probe is not None]
        lines.append(
            [
                method,
                estimate(row.em_after for row in mine),
                "" if method == OURS else estimate(gains(rows, method)),
                by_hops(mine),
                by_seed(row.worst_one_hop for row in mine),
                steps(mine),
                typical(row.escape_rollouts for row in mine),
                typical(row.escape_s for row in mine),
                thousands(statistics.fmean(row.rollouts for row in mine)),
                f"{statistics.fmean(row.seconds for row in mine):.0f}",
                decimal(statistics.fmean(ess)) if ess else "",
            ]
        )
    return markdown(titles, lines)


def depths_table(rows: Sequence[Row]) -> str:
    """A line per depth and method of those that are tried at more than one depth."""
    titles = ["P(going on)", "method", f"`{OURS}` − it", *OUTCOME]
    lines = [
        [depth, method, "" if method == OURS else by_seed(gains(at_depth, method)), *outcome(mine)]
        for depth, at_depth in by_depth(rows)
        for method, mine in by_method([row for row in at_depth if row.method in AT_ALL_DEPTHS])
    ]
    return markdown(titles, lines)


def goals_table(rows: Sequence[Row]) -> str:
    """Whether ours is the best at each depth, and harmless: a line per depth."""
    titles = [
        "P(going on)",
        "measured, by seed",
        "best other method",
        f"`{OURS}` − it",
        f"`{OURS}` − better of GRPO and paper",
    ]
    titles += ["worst one-hop change of any seed", "reflecting, most of any seed", "steps later than `none`"]
    lines = []
    for depth, at_depth in by_depth(rows):
        ours = {row.seed: row for row in at_depth if row.method == OURS}
        others = [method for method, _ in by_method(at_depth) if method in MAIN and method != OURS]
        if not ours or not others:
            continue
        best = best_of(at_depth, others)
        baselines = [method for method in others if method in BASELINES]
        lines.append(
            [
                depth,
                " ".join(f"{row.think:.0e}".replace("e-0", "e-") for row in ours.values()),
                best,
                estimate(gains(at_depth, best)),
                estimate(gains(at_depth, best_of(at_depth, baselines))) if baselines else "",
                decimal(min(row.worst_one_hop for row in ours.values())),
                decimal(max(row.reflects for row in ours.values())),
                later_than_none(at_depth),
            ]
        )
    return markdown(titles, lines)


def harm_table(rows: Sequence[Row]) -> str:
    """In how many runs one-hop questions suffer, over all depths: a line per method."""
    titles = [
        "method",
        "runs",
        "EM on one-hop dev questions falls by more than .05",
        "by more than .4",
        "by more than .05 in the end",
    ]
    lines = []
    for method, mine in by_method([row for row in rows if row.method in AT_ALL_DEPTHS]):
        falls = [row.worst_one_hop for row in mine]
        counts = [sum(fall < -most - ROUNDING for fall in falls) for most in (0.05, 0.4)]
        last = sum(row.one_hop_em[-1] - row.one_hop_em[0] < -0.05 - ROUNDING for row in mine)
        lines.append([method, *(str(count) for count in (len(mine), *counts, last))])
    return markdown(titles, lines)


def quick_start_table(rows: Sequence[Row]) -> str:
    """The real model at the depth of its recipe, a line per method."""
    mine = [row for row in rows if row.world == "model" and row.depth == QUICK_START]
    seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in mine}))
    titles = ["method", f"EM after, seeds {seeds}", *OUTCOME]
    lines = [[f"`{method}`", by_seed(row.em_after for row in runs), *outcome(runs)] for method, runs in by_method(mine)]
    return markdown(titles, lines)


def outcome(rows: Sequence[Row]) -> list[str]:
    """What `OUTCOME` names, of one method's runs."""
    return [
        decimal(statistics.fmean(row.em_before for row in rows)),
        estimate(row.em_after for row in rows),
        by_hops(rows),
        by_seed(row.worst_one_hop for row in rows),
        steps(rows),
        thousands(statistics.fmean(row.rollouts for row in rows)),
    ]


def best_of(rows: Sequence[Row], methods: Iterable[str]) -> str:
    """The method with the highest mean EM."""
    return max(methods, key=lambda method: statistics.fmean(row.em_after for row in rows if row.method == method))


def gains(rows: Sequence[Row], method: str) -> list[float]:
    """EM of ours minus that of the method, seed by seed."""
    theirs = {row.seed: row.em_after for row in rows if row.method == method}
    return [row.em_after - theirs[row.seed] for row in rows if row.method == OURS and row.seed in theirs]


def later_than_none(rows: Sequence[Row]) -> str:
    theirs = {row.seed: row.escape_step for row in rows if row.method == "none"}
    ours = {row.seed: row.escape_step for row in rows if row.method == OURS}
    both = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    return " ".join("–" if a is None or b is None else f"{a - b:+d}" for a, b in both)


def by_method(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for method in dict.fromkeys(row.method for row in rows):
        yield method, [row for row in rows if row.method == method]


def by_depth(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Shallow first."""
    for depth in sorted({row.depth for row in rows}, key=float, reverse=True):
        yield depth, [row for row in rows if row.depth == depth]


def estimate(values: Iterable[float]) -> str:
    """Mean and half the width of its 95% interval over seeds."""
    numbers = list(values)
    return decimal(statistics.fmean(numbers)) + (f" ± {decimal(interval(numbers))}" if len(numbers) > 1 else "")


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95% interval of the mean (Student's t)."""
    return STUDENT_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def by_hops(rows: Sequence[Row]) -> str:
    return " / ".join(decimal(statistics.fmean(row.by_hops_after[hops] for row in rows)) for hops in ("1", "2", "3"))


def by_seed(values: Iterable[float]) -> str:
    return " ".join(decimal(value) for value in values)


def steps(rows: Sequence[Row]) -> str:
    """Step of each seed's escape."""
    return " ".join("–" if row.escape_step is None else str(row.escape_step) for row in rows)


def typical(values: Iterable[float | None]) -> str:
    """The median of the runs that escape; a dash where half of them or fewer do."""
    numbers = list(values)
    known = [value for value in numbers if value is not None]
    return thousands(statistics.median(known)) if 2 * len(known) > len(numbers) else "–"


def decimal(value: float) -> str:
    """Two decimals without the leading zero, a true minus."""
    value = round(value, 2) + 0.0  # no negative zero
    return f"{value:.2f}".replace("-0.", "−.").replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


def thousands(value: float) -> str:
    return f"{value:,.0f}"


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    main()
