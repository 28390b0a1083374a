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
    QUICK_START,
    ROOT,
    Row,
    best_of,
    by_depth,
    by_method,
    gains,
    load,
)

WIDTH_HEIGHT: Final = (9.0, 3.2)
"""Of a figure, inches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    words = parser.parse_args()
    rows = [row for row in load(words.figures) if row.method in MAIN]
    synthetic, model = ([row for row in rows if row.world == world] for world in ("synthetic", "model"))
    words.out.mkdir(parents=True, exist_ok=True)
    matplotlib.use("svg")
    plt.rcParams["svg.hashsalt"] = "rexrag"
    curves([row for row in synthetic if row.depth == MIDDLE], path=words.out / "estimators-curves.svg")
    curves([row for row in model if row.depth == QUICK_START], path=words.out / "estimators-model.svg")
    depths(synthetic, path=words.out / "estimators-depths.svg")


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
    names = [depth for depth, _ in by_depth(rows)]
    for i, (method, mine) in enumerate(by_method(rows)):
        found = [[row.em_after for row in at_depth] for _, at_depth in by_depth(mine)]
        points(left, found, color=f"C{i}", shift=0.06 * i, label=method)
    better = [gains(at_depth, best_of(at_depth, BASELINES)) for _, at_depth in by_depth(rows)]
    points(right, better, color="black")
    right.axhline(0.0, color="grey", linewidth=0.8)
    left.set(ylabel="EM after training", ylim=(0, 1))
    right.set(ylabel=f"{OURS} − better of {' and '.join(BASELINES)}")
    for axes in (left, right):
        axes.set(xlabel="P(going on) after the warm start, about")
        axes.set_xticks(range(len(names)), names)
    left.legend(fontsize=8)
    save(figure, path)


def points(  # matplotlib's stubs leave axes open
    axes: Any,  # noqa: ANN401
    found: Sequence[Sequence[float]],
    *,
    color: str,
    shift: float = 0.0,
    label: str | None = None,
) -> None:
    """A point per seed, a line through the means."""
    for i, values in enumerate(found):
        axes.plot([i + shift] * len(values), values, "o", color=color, markersize=3, alpha=0.6)
    places = [i + shift for i in range(len(found))]
    axes.plot(places, [statistics.fmean(values) for values in found], color=color, label=label)


def save(figure: Any, path: Path) -> None:  # noqa: ANN401  matplotlib's stubs leave it open
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
