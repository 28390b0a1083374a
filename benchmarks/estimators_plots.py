"""The plots of docs/estimators.md, from the figures that `estimators.py` wrote.

pip install 'rexrag[plots]'
python benchmarks/estimators_plots.py [--figures FILE.json] [--out DIR]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import matplotlib.pyplot as plt
from estimators_tables import (
    BASELINES,
    FIGURES,
    MAIN,
    MIDDLE,
    OURS,
    ROOT,
    Row,
    best_of,
    by_depth,
    by_method,
    gains,
    interval,
    load,
)

WIDTH_HEIGHT: Final = (9.0, 3.2)
"""Of a figure, inches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    words = parser.parse_args()
    rows = [row for row in load(words.figures) if row.world == "synthetic" and row.method in MAIN]
    words.out.mkdir(parents=True, exist_ok=True)
    matplotlib.use("svg")
    plt.rcParams["svg.hashsalt"] = "rexrag"
    curves([row for row in rows if row.depth == MIDDLE], path=words.out / "estimators-curves.svg")
    depths(rows, path=words.out / "estimators-depths.svg")


def curves(rows: Sequence[Row], *, path: Path) -> None:
    """EM on all and on the one-hop dev questions, step by step: mean over seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=WIDTH_HEIGHT, layout="constrained")
    for method, mine in by_method(rows):
        left.plot(mine[0].dev_steps, means([row.dev_em for row in mine]), label=f"{method} ({len(mine)} seeds)")
        right.plot(mine[0].dev_steps, means([row.one_hop_em for row in mine]))
    left.set(xlabel="learner step", ylabel="EM, all dev questions", ylim=(0, 1))
    right.set(xlabel="learner step", ylabel="EM, one-hop dev questions", ylim=(0, 1))
    left.legend(fontsize=8)
    save(figure, path)


def means(curves: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]


def depths(rows: Sequence[Row], *, path: Path) -> None:
    """EM after training over the depth of the dead end, and ours minus the better baseline at equal rollouts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=WIDTH_HEIGHT, layout="constrained")
    for method, mine in by_method(rows):
        found = [(depth, [row.em_after for row in at_depth]) for depth, at_depth in by_depth(mine)]
        bars(left, found, label=method)
    better = [
        (depth, gains(at_depth, best_of(at_depth, BASELINES)))
        for depth, at_depth in by_depth(rows)
        if {OURS, *BASELINES} <= {row.method for row in at_depth}
    ]
    bars(right, better, color="black")
    right.axhline(0.0, color="grey", linewidth=0.8)
    left.set(xlabel="P(going on) after the warm start, about", ylabel="EM after training", ylim=(0, 1))
    right.set(xlabel="P(going on) after the warm start, about", ylabel=f"{OURS} − better of {' and '.join(BASELINES)}")
    left.legend(fontsize=8)
    save(figure, path)


def bars(axes: Any, found: Sequence[tuple[str, Sequence[float]]], **style: str) -> None:  # noqa: ANN401
    """Means with 95% intervals, those of one run left out."""
    found = [(depth, values) for depth, values in found if len(values) > 1]
    heights = [statistics.fmean(values) for _, values in found]
    widths = [interval(values) for _, values in found]
    axes.errorbar([depth for depth, _ in found], heights, yerr=widths, capsize=2, **style)


def save(figure: Any, path: Path) -> None:  # noqa: ANN401  matplotlib's stubs leave it open
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
