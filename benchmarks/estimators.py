"""Which method leaves a dead end, at what cost, and what it forgets on the way: the study of docs/estimators.md.

    python benchmarks/estimators.py --work DIR [--study methods depths] [--only NAME ...] [--jobs 2] [--out FILE.json]

On the invented world of `recipes/synthetic.toml`, at dead ends of five depths. The runs of a depth and seed share one
world and one warm start. A run that is there is only read, one that was interrupted goes on where it stopped, so the
command may be given again until the tables are whole. GRPO beside a method gets the group size that spends as many
rollouts as that method's run of the same depth and seed (targets and probes), rounded to the nearest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from machine import commit, machine

from rexrag.prepare import prepare
from rexrag.progress import Progress
from rexrag.recipe import Recipe, flatten, load_recipe, make_config, prepared_values, resolved_toml

ROOT: Final = Path(__file__).resolve().parent.parent
RECIPE: Final = ROOT / "recipes" / "synthetic.toml"

DECISION_WEIGHTS: Final = {"1e-1": 0.3, "1e-2": 0.03, "1e-3": 0.002, "1e-4": 0.0002, "1e-5": 0.0}
"""Depth, the probability of going on after the warm start in round numbers -> the dial that makes it."""
MIDDLE: Final = "1e-4"
WORLD: Final = {"one_hop": 0.4, "train_one_hop": 0.2, "dev": 250, "test": 400}
SETTINGS: Final = ("eval.every=3", "eval.max_questions=400", "train.checkpoint_every=36", "train.keep_checkpoints=1")

NONE: Final = ("method=rex", "correction.mixture=none")
HINT_FREE: Final = ("probe.transfer=hint_free", "probe.filter=none")
METHODS: Final[dict[str, tuple[str, ...]]] = {
    "escape": ("method=escape",),
    "none": NONE,
    "paper": ("method=rex",),
    "grpo": ("method=grpo",),
    "grpo, refilled": ("method=grpo", "replay.refill=true", "train.groups_per_step=12"),
    "fork without a hint": (*NONE, "probe.filter=none", "probe.hints={folder}/no-hint.txt"),
    "exact": ("method=exact",),
    "exact, hint-free": ("method=exact", "probe.transfer=hint_free"),
    "hint-free": (*NONE, *HINT_FREE),
    "hint-free, preserving": ("method=escape", *HINT_FREE),
    "paper, preserving": ("method=rex", "loss.preserve=3"),
    "grpo, preserving": ("method=grpo", "loss.preserve=3"),
    "paper, floor 0.5": ("method=rex", "correction.floor=0.5"),
    "none, baseline target": (*NONE, "loss.baseline=target"),
    "none, dead groups only": (*NONE, "probe.dead_end=group"),
    "none, half the learning rate": (*NONE, "optimizer.learning_rate=2e-4"),
}
"""Name -> settings over the recipe; {folder} is where the study's own files are."""
OURS: Final = "escape"
AS_MANY_ROLLOUTS: Final = frozenset({"grpo", "grpo, preserving"})
"""Methods without probes: their groups grow until they spend what `OURS` spends."""

ON_EVERY_DEPTH: Final = frozenset({"escape", "none", "paper", "grpo"})
SEEDS: Final = {"methods": range(5), "depths": range(3)}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the study."""

    method: str
    depth: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.replace(', ', '+').replace(' ', '-')}-{self.depth}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one run came to. EM is greedy; `escape_step` is the first step at which the mean sampled EM of three
    steps reaches half of the final EM, None where the run gains less than .1.

    Attributes:
        worst_one_hop: lowest minus first EM on the one-hop dev questions.
        reflects: share of targets that wrote the words of a hint, mean of the last five steps.
        ess_probe: effective sample size of the probes' tokens, mean over steps with probes.
        seconds: of the training steps, evaluations left out; two runs share the machine.
    """

    method: str
    depth: str
    seed: int
    think: float
    group_size: int
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
    target_em: list[float]
    dev_steps: list[int]
    one_hop_em: list[float]


def main() -> None:
    """Run what is missing, write the figures, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--study", nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the study's")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "estimators.json")
    words = parser.parse_args()
    cells = plan(words.study, only=words.only, seeds=words.seeds)
    head = commit()
    with ThreadPoolExecutor(words.jobs) as pool:
        for depth, seed in dict.fromkeys((cell.depth, cell.seed) for cell in cells):
            prepared_recipe(depth, seed=seed, work=words.work)
            here = [cell for cell in cells if (cell.depth, cell.seed) == (depth, seed)]
            for wave in ([cell for cell in here if cell.method not in AS_MANY_ROLLOUTS], here):
                list(pool.map(lambda cell: run(cell, work=words.work), wave))
    rows = [read(cell, work=words.work) for cell in cells]
    write(words.out, rows, head=head)
    print(table(rows))


def plan(studies: Sequence[str], *, only: Sequence[str], seeds: Sequence[int] | None) -> list[Cell]:
    """All runs of the studies, each once, by depth and seed."""
    cells = {
        Cell(method=method, depth=depth, seed=seed)
        for study in studies
        for method in (only if study == "methods" else [name for name in only if name in ON_EVERY_DEPTH])
        for depth in ([MIDDLE] if study == "methods" else DECISION_WEIGHTS)
        for seed in (SEEDS[study] if seeds is None else seeds)
    }
    order = list(METHODS)
    return sorted(cells, key=lambda cell: (cell.depth != MIDDLE, cell.seed, cell.depth, order.index(cell.method)))


def prepared_recipe(depth: str, *, seed: int, work: Path) -> Path:
    """World, index and warm start of a depth and seed, made once; the recipe that uses them."""
    folder = work / "prepared" / f"{depth}-{seed}"
    path = folder / "recipe.toml"
    if path.exists():
        return path
    size = ", ".join(f"{k} = {v}" for k, v in {**WORLD, "decision_weight": DECISION_WEIGHTS[depth]}.items())
    words = [*SETTINGS, f"train.seed={seed}", f"prepare.world_size={{ {size} }}"]
    recipe = load_recipe(RECIPE, overrides=words)
    with Progress() as progress:
        prepare(recipe.config, folder=folder, num_threads=1, progress=progress)
    values = {k: v for k, v in flatten(recipe.config).items() if not k.startswith("prepare.")}
    values |= prepared_values(recipe.config, prepared=folder.resolve())
    sources = dict.fromkeys(flatten(recipe.config), "study")
    path.write_text(resolved_toml(Recipe(name="study", config=make_config(values, sources=sources), sources=sources)))
    return path


def run(cell: Cell, *, work: Path) -> None:
    """Train, or go on, unless the run is finished."""
    folder = work / "runs" / cell.name
    if is_done(folder):
        return
    command = [sys.executable, "-m", "rexrag", "train", "--run-dir", str(folder)]
    if not (folder / "run.json").exists():
        (work / "no-hint.txt").write_text("|\n")
        words = [word.format(folder=work.resolve()) for word in METHODS[cell.method]]
        if cell.method in AS_MANY_ROLLOUTS:
            words.append(f"rollout.group_size={as_many_rollouts(cell, work=work)}")
        recipe = work / "prepared" / f"{cell.depth}-{cell.seed}" / "recipe.toml"
        command += [str(recipe), *(word for setting in words for word in ("--set", setting))]
    print(f"{time.strftime('%H:%M:%S')} {cell.name}", file=sys.stderr, flush=True)
    log = work / "logs" / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, check=False)
    if done.returncode:
        raise SystemExit(f"{cell.name} ended with status {done.returncode}; see {log}")


def as_many_rollouts(cell: Cell, *, work: Path) -> int:
    """Targets per question that spend the rollouts of `OURS` at the same depth and seed."""
    other = work / "runs" / Cell(method=OURS, depth=cell.depth, seed=cell.seed).name
    if not is_done(other):
        raise SystemExit(f"{cell.name} needs the run of {OURS} beside it; leave --only out, or name both")
    steps = lines(other / "metrics.jsonl")
    groups = sum(step["group/count"] for step in steps)
    return max(2, round(num_rollouts(steps) / groups))


def is_done(folder: Path) -> bool:
    path = folder / "run.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def read(cell: Cell, *, work: Path) -> Row:
    folder = work / "runs" / cell.name
    evaluations, steps = lines(folder / "eval.jsonl"), lines(folder / "metrics.jsonl")
    before, after = [line for line in evaluations if line["split"] == "test"]
    dev = [line for line in evaluations if line["split"] == "dev"]
    one_hop = [line["by_hops"]["1"]["em"] for line in dev]
    depth = json.loads((work / "prepared" / f"{cell.depth}-{cell.seed}" / "warmstart" / "warmstart.json").read_text())
    escape = escape_step([step["target/em"] for step in steps], before=before["em"], after=after["em"])
    until = steps[:escape]
    group_size = round(sum(step["target/count"] for step in steps) / sum(step["group/count"] for step in steps))
    num_dropped = json.loads((folder / "accounting.json").read_text())["dropped"].get("flat", 0)
    ess = [value for step in steps if (value := step["weight/ess_probe"]) is not None]
    return Row(
        method=cell.method,
        depth=cell.depth,
        seed=cell.seed,
        think=depth["depth"]["think_median"],
        group_size=group_size,
        rollouts=num_rollouts(steps) + num_dropped * group_size,
        seconds=round(sum(step["time/step_s"] for step in steps), 1),
        em_before=before["em"],
        em_after=after["em"],
        by_hops_before={hops: part["em"] for hops, part in before["by_hops"].items()},
        by_hops_after={hops: part["em"] for hops, part in after["by_hops"].items()},
        worst_one_hop=min(one_hop) - one_hop[0],
        escape_step=escape,
        escape_rollouts=None if escape is None else num_rollouts(until),
        escape_s=None if escape is None else round(sum(step["time/step_s"] for step in until), 1),
        reflects=statistics.fmean(step["target/reflect_rate"] for step in steps[-5:]),
        ess_probe=statistics.fmean(ess) if ess else None,
        target_em=[round(step["target/em"], 4) for step in steps],
        dev_steps=[line["step"] for line in dev],
        one_hop_em=one_hop,
    )


def escape_step(sampled: Sequence[float], *, before: float, after: float) -> int | None:
    if after < before + 0.1:
        return None
    means = [statistics.fmean(sampled[max(0, i - 2) : i + 1]) for i in range(len(sampled))]
    return next((step for step, mean in enumerate(means, start=1) if mean >= after / 2), None)


def num_rollouts(steps: Iterable[dict[str, Any]]) -> int:
    return round(sum(step["target/count"] + step["probe/count"] for step in steps))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per depth and method, mean ± standard deviation over seeds."""
    titles = ["depth", "method", "seeds", "EM before", "EM after", "1/2/3 hops after", "escape at step"]
    titles += ["worst 1 hop", "reflects", "rollouts", "ESS of probes"]
    out = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for depth in DECISION_WEIGHTS:
        for method in METHODS:
            mine = [row for row in rows if (row.depth, row.method) == (depth, method)]
            if mine:
                out.append(f"| {' | '.join([depth, method, *cells_of(mine)])} |")
    return "\n".join(out)


def cells_of(rows: Sequence[Row]) -> list[str]:
    hops = "/".join(f"{statistics.fmean(row.by_hops_after[h] for row in rows):.2f}" for h in ("1", "2", "3"))
    escapes = " ".join("–" if row.escape_step is None else str(row.escape_step) for row in rows)
    ess = [row.ess_probe for row in rows if row.ess_probe is not None]
    return [
        str(len(rows)),
        spread(row.em_before for row in rows),
        spread(row.em_after for row in rows),
        hops,
        escapes,
        spread(row.worst_one_hop for row in rows),
        spread(row.reflects for row in rows),
        f"{statistics.fmean(row.rollouts for row in rows):.0f}",
        f"{statistics.fmean(ess):.2f}" if ess else "",
    ]


def spread(values: Iterable[float]) -> str:
    numbers = list(values)
    deviation = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.2f}{deviation}"


def write(path: Path, rows: Sequence[Row], *, head: str) -> None:
    result = {
        "commit": head,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "middle": MIDDLE,
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
