"""The plots of docs/estimators.md, from the figures that `estimators.py` wrote.

pip install 'rexrag[plots]'
python benchmarks/estimators_plots.py [--figures FILE.json] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import matplotlib.pyplot as plt

ROOT: Final = Path(__file__).resolve().parent.parent
SHOWN: Final = ("grpo", "paper", "none", "escape")
STUDENT_95: Final = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}
"""Two-sided 95% quantiles of Student's t by degrees of freedom."""

Rows = Sequence[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=ROOT / "benchmarks" / "results" / "estimators.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    words = parser.parse_args()
    figures = json.loads(words.figures.read_text())
    words.out.mkdir(parents=True, exist_ok=True)
    matplotlib.use("svg")
    plt.rcParams["svg.hashsalt"] = "rexrag"
    curves(figures["rows"], depth=figures["middle"], path=words.out / "estimators-curves.svg")
    depths(figures["rows"], path=words.out / "estimators-depths.svg")


def curves(rows: Rows, *, depth: str, path: Path) -> None:
    """Sampled EM over all questions, and greedy EM on one-hop dev questions, step by step: mean over seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for method in SHOWN:
        mine = [row for row in rows if (row["method"], row["depth"]) == (method, depth)]
        if not mine:
            continue
        em = [statistics.fmean(values) for values in zip(*(row["target_em"] for row in mine), strict=True)]
        left.plot(range(1, len(em) + 1), em, label=f"{method} ({len(mine)} seeds)")
        steps = mine[0]["dev_steps"]
        right.plot(steps, [statistics.fmean(v) for v in zip(*(row["one_hop_em"] for row in mine), strict=True)])
    left.set(xlabel="learner step", ylabel="EM of sampled targets", title=f"P(going on) about {depth}")
    right.set(xlabel="learner step", ylabel="EM, one-hop questions (dev, greedy)", ylim=(0, 1))
    left.legend(fontsize=8)
    save(figure, path)


def depths(rows: Rows, *, path: Path) -> None:
    """EM after training over the depth of the dead end, and `escape` minus the better of the others."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = sorted({row["depth"] for row in rows}, key=lambda depth: -float(depth))
    for method in SHOWN:
        found = [(d, [r["em_after"] for r in rows if (r["method"], r["depth"]) == (method, d)]) for d in names]
        found = [(depth, values) for depth, values in found if len(values) > 1]
        means = [statistics.fmean(values) for _, values in found]
        left.errorbar(
            [depth for depth, _ in found], means, yerr=[interval(v) for _, v in found], label=method, capsize=2
        )
    gains = [(depth, gains_at(rows, depth)) for depth in names]
    gains = [(depth, values) for depth, values in gains if len(values) > 1]
    right.errorbar(
        [depth for depth, _ in gains],
        [statistics.fmean(values) for _, values in gains],
        yerr=[interval(values) for _, values in gains],
        capsize=2,
        color="black",
    )
    right.axhline(0.0, color="grey", linewidth=0.8)
    left.set(xlabel="P(going on) after the warm start, about", ylabel="EM after training", ylim=(0, 1))
    right.set(xlabel="P(going on) after the warm start, about", ylabel="escape − best of the others, per seed")
    left.legend(fontsize=8)
    save(figure, path)


def gains_at(rows: Rows, depth: str) -> list[float]:
    """`escape` minus the best of the other shown methods of the same seed."""
    by_seed: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["depth"] == depth and row["method"] in SHOWN:
            by_seed.setdefault(row["seed"], {})[row["method"]] = row["em_after"]
    return [
        values["escape"] - max(others)
        for values in by_seed.values()
        if "escape" in values and (others := [em for method, em in values.items() if method not in ("escape", "none")])
    ]


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95% interval of the mean (Student's t)."""
    return STUDENT_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def save(figure: Any, path: Path) -> None:  # noqa: ANN401  matplotlib's stubs leave it open
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
