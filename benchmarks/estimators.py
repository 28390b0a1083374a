"""Which method leaves a dead end, at what cost, and what it forgets on the way: the study of docs/estimators.md.

    python benchmarks/estimators.py --work DIR [--study methods depths model] [--only METHOD ...] [--depths DEPTH ...]
        [--seeds SEED ...] [--gpu] [--out FILE.json]

`methods` and `depths`: the invented world of `recipes/synthetic.toml`, every method at one depth of the dead end, the
main ones at five. `model`: the real language model of `recipes/quickstart.toml`, the main methods at two depths. The
runs of a world, depth and seed share one warm start. A run whose row is in FILE.json is not made again (remove the row
to have it made), one that was interrupted goes on where it stopped, so the command may be given again until the tables
are whole. GRPO gets the group size that spends in a step at least as many rollouts as `escape` does at the same depth
and seed (targets and probes).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from estimators_tables import (
    AT_ALL_DEPTHS,
    BASELINES,
    FIGURES,
    MAIN,
    MIDDLE,
    OURS,
    QUICK_START,
    ROOT,
    Row,
    load,
    tables,
)
from machine import commit, machine

from rexrag.files import read_jsonl, write_atomic
from rexrag.preparation.prepare import prepare
from rexrag.recipe import Recipe, flatten, load_recipe, make_config, prepared_values, resolved_toml
from rexrag.reporting.terminal import Progress


@dataclass(frozen=True, kw_only=True)
class World:
    """Where a method is tried.

    Attributes:
        depths: name of a dead end's depth, the probability of going on after the warm start in round numbers -> the
            dial that makes it.
        size: further dials. settings: over the recipe. by_method: over these, what each does best with on other seeds.
        threads: of the warm start. jobs: runs at once.
    """

    recipe: Path
    depths: dict[str, float]
    size: dict[str, float]
    settings: tuple[str, ...]
    by_method: dict[str, tuple[str, ...]]
    threads: int
    jobs: int


ON_GPU: Final = ("rollout.num_gpus=0.5", "learner.micro_batch_tokens=8192")
"""Actor and learner share the card. The larger micro-batches change what is added up in one pass, nothing else."""
PLAIN: Final = ("loss.preserve=3", "loss.preserve_knee=0")
"""Penalty on what was right: the fall in log-prob itself."""
WORLDS: Final = {
    "synthetic": World(
        recipe=ROOT / "recipes" / "synthetic.toml",
        depths={"1e-1": 0.3, "1e-2": 0.03, "1e-3": 0.002, "1e-4": 0.0002, "1e-5": 0.0},
        size={"one_hop": 0.4, "train_one_hop": 0.2, "dev": 250, "test": 400},
        settings=("eval.every=3", "train.checkpoint_every=36", "train.keep_checkpoints=1"),
        by_method={},
        threads=1,
        jobs=2,
    ),
    "model": World(
        recipe=ROOT / "recipes" / "quickstart.toml",
        depths={"2e-4": 0.0, "2e-3": 0.01},
        size={"demonstrations": 480, "test": 200, "dev": 40, "train_one_hop": 0.2},
        settings=("train.checkpoint_every=16", "learner.threads=1", "rollout.threads_per_actor=1"),
        by_method={
            **dict.fromkeys((OURS, *BASELINES), ("optimizer.warmup_steps=5", "optimizer.decay_steps=14")),
            "rex": ("optimizer.warmup_steps=5", "optimizer.decay_steps=22", "train.steps=24"),
        },
        threads=2,
        jobs=2,
    ),
}
NONE: Final = ("method=paper", "correction.mixture=none")
ESCAPE: Final = (*NONE, "probe.dead_end=group", "loss.preserve=1", "loss.preserve_knee=0.5")
HINT_FREE: Final = ("probe.transfer=hint_free", "probe.filter=none")
HALF: Final = "optimizer.learning_rate=2e-4"
METHODS: Final[dict[str, tuple[str, ...]]] = {
    "escape": ESCAPE,
    "none": NONE,
    "paper": ("method=paper",),
    "grpo": ("method=grpo",),
    "grpo, as many seconds": ("method=grpo",),
    "grpo, refilled": ("method=grpo", "replay.refill=true", "train.groups_per_step=5"),
    "fork without a hint": (*NONE, "probe.filter=none", "probe.hints={folder}/no-hint.txt"),
    "exact": ("method=exact",),
    "exact, hint-free": ("method=exact", "probe.transfer=hint_free"),
    "hint-free, preserving": (*ESCAPE, *PLAIN, *HINT_FREE),
    "paper, preserving": ("method=paper", *PLAIN),
    "grpo, preserving": ("method=grpo", *PLAIN),
    "none, baseline target": (*NONE, "loss.baseline=target"),
    "escape, plain penalty": (*ESCAPE, *PLAIN),
    "escape, each dead rollout": (*ESCAPE, *PLAIN, "probe.dead_end=rollout"),
    "none, half the learning rate": (*NONE, HALF),
    "paper, half the learning rate": ("method=paper", HALF),
    "grpo, half the learning rate": ("method=grpo", HALF),
    "rex": ("method=rex",),
    "rex, without preserving": ("method=rex", "loss.preserve=0", "loss.preserve_knee=0"),
    "maxrl": ("method=maxrl",),
    "maxrl, preserving": ("method=maxrl", "loss.preserve=1", "loss.preserve_knee=0.5"),
    "rex, adapters": ("method=rex", "learner.lora=16", "optimizer.learning_rate=1.2e-3"),
}
"""Name -> settings over the recipe; {folder} is where the study's own files are."""
AS_MANY_SECONDS: Final = "grpo, as many seconds"
"""Plain GRPO with as many steps as fit into the time of `OURS`."""
AS_MANY_ROLLOUTS: Final = frozenset(
    {"grpo", AS_MANY_SECONDS, "grpo, preserving", "grpo, half the learning rate", "maxrl", "maxrl, preserving"}
)
"""Methods without probes: their groups grow until they spend in a step what `OURS` spends."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the study."""

    world: str
    method: str
    depth: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.world}-{self.method.replace(', ', '+').replace(' ', '-')}-{self.depth}-{self.seed}"

    @property
    def prepared(self) -> str:
        return f"{self.world}-{self.depth}-{self.seed}"


STUDIES: Final[dict[str, list[tuple[str, range, tuple[str, ...]]]]] = {
    "methods": [(MIDDLE, range(5), tuple(METHODS))],
    "depths": [(depth, range(3), AT_ALL_DEPTHS) for depth in WORLDS["synthetic"].depths],
    "model": [
        (QUICK_START, range(3, 6), (*MAIN, "rex", "rex, without preserving")),
        ("2e-3", range(3, 6), ("escape", "none", "rex")),
    ],
}
"""Study -> (depth, seeds, methods). Settings were chosen on other seeds: 10 to 13, of the model 0 to 2; the learning
rate of adapters on seed 1."""


def main() -> None:
    """Run what is missing, write the figures, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=["methods", "depths"])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--depths", nargs="+", choices=sorted({depth for world in WORLDS.values() for depth in world.depths})
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="of those of the study")
    parser.add_argument("--gpu", action="store_true", help="train and generate on the machine's GPU")
    parser.add_argument("--out", type=Path, default=FIGURES)
    words = parser.parse_args()
    study = Study(work=words.work, out=words.out, gpu=torch.cuda.get_device_name() if words.gpu else None)
    cells = plan(words.study, only=words.only, depths=words.depths, seeds=words.seeds)
    for world in dict.fromkeys(cell.world for cell in cells):
        study.run_all([cell for cell in cells if cell.world == world])
    print("\n\n".join(tables(study.rows())))


def plan(
    studies: Sequence[str],
    *,
    only: Sequence[str] = tuple(METHODS),
    depths: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Cell]:
    """All runs of the studies, each once, those of a world, depth and seed together."""
    cells = dict.fromkeys(
        Cell(world="model" if study == "model" else "synthetic", method=method, depth=depth, seed=seed)
        for study in studies
        for depth, all_seeds, methods in STUDIES[study]
        for seed in all_seeds
        for method in methods
        if method in only and (depths is None or depth in depths) and (seeds is None or seed in seeds)
    )
    order, worlds = list(METHODS), list(WORLDS)
    main = (MIDDLE, QUICK_START)
    return sorted(
        cells, key=lambda c: (worlds.index(c.world), c.depth not in main, c.seed, c.depth, order.index(c.method))
    )


class Study:
    """Runs and their rows. Several threads run cells at once, in order; a cell waits for what it is measured by."""

    def __init__(self, *, work: Path, out: Path, gpu: str | None = None) -> None:
        self._work, self._out, self._gpu = work, out, gpu
        self._head = commit()
        self._lock = threading.Lock()
        # torch's random numbers are one sequence per process: starts made at once would not be made twice alike.
        self._preparing = threading.Lock()
        self._rows = {cell_of(row): row for row in (load(out) if out.exists() else [])}
        self._running: dict[Cell, Future[None]] = {}

    def rows(self) -> list[Row]:
        """In the order of the plan."""
        return [self._rows[cell] for cell in plan(list(STUDIES)) if cell in self._rows]

    def run_all(self, cells: Sequence[Cell]) -> None:
        """All runs of a world that have no row yet."""
        with ThreadPoolExecutor(WORLDS[cells[0].world].jobs) as pool:
            for cell in cells:
                if cell not in self._rows:
                    self._running[cell] = pool.submit(self._run, cell)
            for future in self._running.values():
                future.result()

    def _run(self, cell: Cell) -> None:
        with self._preparing:
            prepare_start(cell, work=self._work)
        self._check_start(cell)
        run(cell, settings=self._settings(cell), work=self._work)
        row = read(cell, work=self._work, head=self._head, gpu=self._gpu)
        with self._lock:
            self._rows[cell] = row
            write(self._out, self.rows())

    def _check_start(self, cell: Cell) -> None:
        """A start that was made again must be the one that earlier rows began from: another CPU may round otherwise."""
        think = depth_of(cell, work=self._work)
        others = {row.think for row in self.rows() if cell_of(row).prepared == cell.prepared} - {think}
        if others:
            raise SystemExit(
                f"the warm start of {cell.prepared} has P(going on) {think}, that of its rows in {self._out} "
                f"{', '.join(map(str, others))}: remove these rows, they are from another start"
            )

    def _settings(self, cell: Cell) -> list[str]:
        """Over the recipe beside the warm start."""
        world = WORLDS[cell.world]
        words = [*world.settings, *(word.format(folder=self._work.resolve()) for word in METHODS[cell.method])]
        words += [*world.by_method.get(cell.method, ()), *(ON_GPU if self._gpu else ())]
        if cell.method in AS_MANY_ROLLOUTS:
            ours = self._row(replace(cell, method=OURS))
            words.append(f"rollout.group_size={max(2, math.ceil(ours.rollouts / ours.groups))}")
        if cell.method == AS_MANY_SECONDS:
            grpo = self._row(replace(cell, method="grpo"))
            words.append(f"train.steps={round(grpo.steps * ours.seconds / grpo.seconds)}")
        return words

    def _row(self, cell: Cell) -> Row:
        """Of a cell that comes earlier in the plan, so that it is finished or another thread's."""
        if cell in self._running:
            self._running[cell].result()
        if cell not in self._rows:
            raise SystemExit(
                f"{cell.name} must be finished before what is measured by it; name its method in --only, too"
            )
        return self._rows[cell]


def prepare_start(cell: Cell, *, work: Path) -> None:
    """World, index and warm start, made once; `recipe.toml` beside them uses them."""
    world = WORLDS[cell.world]
    folder = work / "prepared" / cell.prepared
    path = folder / "recipe.toml"
    if path.exists():
        return
    size = ", ".join(f"{k} = {v}" for k, v in {**world.size, "decision_weight": world.depths[cell.depth]}.items())
    words = [f"train.seed={cell.seed}", f"prepare.world_size={{ {size} }}"]
    recipe = load_recipe(world.recipe, overrides=words)
    with Progress() as progress:
        prepare(recipe.config, folder=folder, num_threads=world.threads, progress=progress)
    values = {k: v for k, v in flatten(recipe.config).items() if not k.startswith("prepare.")}
    values |= prepared_values(recipe.config, prepared=folder.resolve())
    sources = dict.fromkeys(flatten(recipe.config), "study")
    path.write_text(resolved_toml(Recipe(name="study", config=make_config(values, sources=sources), sources=sources)))


def run(cell: Cell, *, settings: Sequence[str], work: Path) -> None:
    """Train, or go on, unless the run is finished."""
    folder = work / "runs" / cell.name
    if is_done(folder):
        return
    command = [sys.executable, "-m", "rexrag", "train", "--run-dir", str(folder)]
    if not (folder / "run.json").exists():
        (work / "no-hint.txt").write_text("|\n")
        recipe = work / "prepared" / cell.prepared / "recipe.toml"
        command += [str(recipe), *(word for setting in settings for word in ("--set", setting))]
    print(f"{time.strftime('%H:%M:%S')} {cell.name}", file=sys.stderr, flush=True)
    log = work / "logs" / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, check=False)
    if done.returncode:
        raise SystemExit(f"{cell.name} ended with status {done.returncode}; see {log}")


def is_done(folder: Path) -> bool:
    path = folder / "run.json"
    return path.exists() and bool(json.loads(path.read_text())["status"] == "finished")


def cell_of(row: Row) -> Cell:
    return Cell(world=row.world, method=row.method, depth=row.depth, seed=row.seed)


def read(cell: Cell, *, work: Path, head: str, gpu: str | None) -> Row:
    """What the finished run came to."""
    folder = work / "runs" / cell.name
    evaluations, steps = read_jsonl(folder / "eval.jsonl"), read_jsonl(folder / "metrics.jsonl")
    before, after = [line for line in evaluations if line["split"] == "test"]
    dev = [line for line in evaluations if line["split"] == "dev"]
    one_hop = [line["by_hops"]["1"]["em"] for line in dev]
    dev_steps, dev_em = [line["step"] for line in dev], [line["em"] for line in dev]
    escape = half_way(dev_steps, dev_em) if after["em"] >= before["em"] + 0.1 else None
    until = steps[:escape]
    num_groups = round(sum(step["group/count"] for step in steps))
    group_size = round(sum(step["target/count"] for step in steps) / num_groups)
    num_dropped = json.loads((folder / "accounting.json").read_text())["dropped"].get("flat", 0)
    ess = [value for step in steps if (value := step["weight/ess_probe"]) is not None]
    return Row(
        world=cell.world,
        method=cell.method,
        depth=cell.depth,
        seed=cell.seed,
        commit=head,
        gpu=gpu,
        think=depth_of(cell, work=work),
        group_size=group_size,
        steps=len(steps),
        groups=num_groups + num_dropped,
        rollouts=num_rollouts(steps) + num_dropped * group_size,
        seconds=round(seconds(steps), 1),
        em_before=before["em"],
        em_after=after["em"],
        by_hops_before={hops: part["em"] for hops, part in before["by_hops"].items()},
        by_hops_after={hops: part["em"] for hops, part in after["by_hops"].items()},
        worst_one_hop=min(one_hop) - one_hop[0],
        escape_step=escape,
        escape_rollouts=None if escape is None or num_dropped else num_rollouts(until),
        escape_s=None if escape is None else round(seconds(until), 1),
        reflects=statistics.fmean(step["target/reflect_rate"] for step in steps[-5:]),
        ess_probe=statistics.fmean(ess) if ess else None,
        dev_steps=dev_steps,
        dev_em=dev_em,
        one_hop_em=one_hop,
    )


def depth_of(cell: Cell, *, work: Path) -> float:
    """Probability of going on after the warm start, median of dev questions."""
    return think_of(work / "prepared" / cell.prepared / "warmstart")


def think_of(model: Path) -> float:
    """Probability of going on, of a model that was warm-started."""
    report = json.loads((model / "warmstart.json").read_text())
    return float(report["depth"]["think_median"])


def half_way(steps: Sequence[int], values: Sequence[float]) -> int | None:
    """First step at which a line through the values is half-way from the first to the last, if that is higher."""
    half = (values[0] + values[-1]) / 2
    for (left, low), (right, high) in pairwise(zip(steps, values, strict=True)):
        if low < half <= high:
            return left + math.ceil((right - left) * (half - low) / (high - low))
    return None


def num_rollouts(steps: Iterable[dict[str, Any]]) -> int:
    return int(sum(step["target/count"] + step["probe/count"] for step in steps))


def seconds(steps: Iterable[dict[str, Any]]) -> float:
    return float(sum(step["time/step_s"] for step in steps))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Whole or not at all: the rows are the memory of the study."""
    result = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
