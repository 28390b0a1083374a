"""What asynchrony brings on one machine: the same steps with a staleness bound S of 0, 1, 2 and 4.

    python benchmarks/asynchrony.py --work DIR [--steps 24] [--seeds 0] [--out FILE.json]

The recipe `recipes/synthetic.toml`, one rollout actor and the learner with a core each, one warm start for all runs of
a seed. Two loads: the recipe as it is, whose generation takes longer than its learning; and balanced, where the learner
takes small micro-batches, so that its step lasts about as long as the generation of its groups.

The bound of a run is the time of a step in which nobody waits for anybody: max(t_gen, t_train) + t_sync. t_train and
t_sync (all of a step that is neither learning nor waiting for groups) are the run's own; t_gen, the time that the
groups of a step take, is the learner's wait at S = 0, where nothing goes on beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from machine import origin

from rexrag import metrics as keys
from rexrag.files import read_jsonl
from rexrag.preparation.prepare import prepare
from rexrag.recipe import Recipe, flatten, load_recipe, make_config, prepared_values, resolved_toml
from rexrag.reporting.terminal import Progress

RECIPE: Final = Path(__file__).resolve().parents[1] / "recipes" / "synthetic.toml"
STALENESS: Final = (0, 1, 2, 4)
LOADS: Final = {"as it is": (), "balanced": ("learner.micro_batch_tokens=128",)}
SETTINGS: Final = ("rollout.num_actors=1", "eval.every=0", "train.checkpoint_every=1000")
NUM_FIRST: Final = 2
"""Steps that fill the buffer and warm up, and count for nothing."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run; times in seconds, means over its steps after the first.

    Attributes:
        step_s: of a step. train_s: of that, learning; sync_s: all else but waiting for groups.
        generate_s: of the groups of a step, from the run of the same load and seed at S = 0.
        idle: share of the time that the learner waits for groups.
        of_bound: the bound's time of a step over the run's.
        em: on test questions, before and after.
    """

    load: str
    max_staleness: int
    seed: int
    steps: int
    step_s: float
    train_s: float
    sync_s: float
    generate_s: float
    idle: float
    of_bound: float
    staleness: float
    em: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs; what is there counts")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    results: list[Result] = []
    for seed in words.seeds:
        recipe = prepared(words.work / f"prepared-{seed}", seed=seed)
        for load in words.loads:
            for max_staleness in STALENESS:
                run = words.work / f"{load.replace(' ', '-')}-{max_staleness}-{seed}"
                settings = (*SETTINGS, *LOADS[load], f"replay.max_staleness={max_staleness}")
                train(recipe, run, settings=(*settings, f"train.steps={words.steps}"))
                first = None if max_staleness == 0 else results[-STALENESS.index(max_staleness)]
                results.append(measured(run, load=load, max_staleness=max_staleness, seed=seed, first=first))
                print(json.dumps(asdict(results[-1])), flush=True)
    if words.out is not None:
        told = {
            **origin(),
            "results": [asdict(result) for result in results],
        }
        words.out.write_text(json.dumps(told, indent=1) + "\n")


def prepared(folder: Path, *, seed: int) -> Path:
    """World, index and warm start, made once; returns a recipe over them."""
    path = folder / "recipe.toml"
    if not path.exists():
        recipe = load_recipe(RECIPE, overrides=[f"train.seed={seed}"])
        with Progress() as progress:
            prepare(recipe.config, folder=folder, num_threads=2, progress=progress)
        values = {key: value for key, value in flatten(recipe.config).items() if not key.startswith("prepare.")}
        values |= prepared_values(recipe.config, prepared=folder.resolve())
        sources = dict.fromkeys(flatten(recipe.config), "asynchrony")
        config = make_config(values, sources=sources)
        path.write_text(resolved_toml(Recipe(name="asynchrony", config=config, sources=sources)))
    return path


def train(recipe: Path, run: Path, *, settings: Sequence[str]) -> None:
    """A whole run, unless it is there."""
    record = run / "run.json"
    if record.exists() and json.loads(record.read_text())["status"] == "finished":
        return
    command = [sys.executable, "-m", "rexrag", "train", str(recipe), "--run-dir", str(run)]
    command += [word for setting in settings for word in ("--set", setting)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measured(run: Path, *, load: str, max_staleness: int, seed: int, first: Result | None) -> Result:
    """What a run's metrics say; `first`: the run at S = 0, None where this is it."""
    lines = list(read_jsonl(run / "metrics.jsonl"))[NUM_FIRST:]
    step_s, wait_s, train_s = (
        statistics.mean(float(line[key]) for line in lines)
        for key in (keys.TIME_STEP, keys.TIME_LEARNER_WAIT, keys.TIME_UPDATE)
    )
    generate_s = wait_s if first is None else first.generate_s
    sync_s = step_s - wait_s - train_s
    bound_s = max(generate_s, train_s) + sync_s if max_staleness else step_s
    em = [float(line["em"]) for line in read_jsonl(run / "eval.jsonl") if line["split"] == "test"]
    return Result(
        load=load,
        max_staleness=max_staleness,
        seed=seed,
        steps=len(lines),
        step_s=round(step_s, 3),
        train_s=round(train_s, 3),
        sync_s=round(sync_s, 3),
        generate_s=round(generate_s, 3),
        idle=round(wait_s / step_s, 3),
        of_bound=round(bound_s / step_s, 3),
        staleness=round(statistics.mean(float(line[keys.STALENESS_MEAN]) for line in lines), 2),
        em=(em[0], em[-1]),
    )


if __name__ == "__main__":
    main()
