"""Quick starts that are done, engine beside engine: EM as it went, and how long it took.

    python benchmarks/quickstart.py RUN... [--out FILE.json]

RUN is the folder of a finished run of recipes/quickstart.toml or recipes/quickstart-vllm.toml.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from estimators import think_of
from machine import origin

from rexrag.files import read_jsonl
from rexrag.recipe import load_recipe
from rexrag.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run.

    Attributes:
        think: P(going on) after the warm start, median over dev questions.
        em: on the test questions before and after; by_hops: after.
        dev_em, one_hop_em: at `dev_steps`, on all dev questions and on those of one hop.
        mismatch_kl: largest of any step. steps_s: of all steps; total_s: from the start to the end of its last start.
    """

    engine: str
    seed: int
    think: float
    em: tuple[float, float]
    by_hops: dict[str, float]
    dev_steps: list[int]
    dev_em: list[float]
    one_hop_em: list[float]
    mismatch_kl: float
    steps_s: float
    total_s: float
    starts: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    rows = sorted((read(RunFolder(run)) for run in words.runs), key=lambda row: (row.seed, row.engine))
    print("| seed | engine | EM before → after | 1 / 2 / 3 hops | dev EM | one-hop dev EM | minutes of steps, of all |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        em, hops = " → ".join(f"{em:.3f}" for em in row.em), " / ".join(f"{em:.2f}" for em in row.by_hops.values())
        dev, one_hop = (" ".join(f"{em:.2f}" for em in column) for column in (row.dev_em, row.one_hop_em))
        took = f"{row.steps_s / 60:.0f}, {row.total_s / 60:.0f}"
        print(f"| {row.seed} | `{row.engine}` | {em} | {hops} | {dev} | {one_hop} | {took} |")
    if words.out is not None:
        words.out.write_text(json.dumps({**origin(), "runs": [asdict(row) for row in rows]}, indent=1) + "\n")


def read(run: RunFolder) -> Row:
    config, record = load_recipe(run.config).config, json.loads((run.root / "run.json").read_text())
    if record["status"] != "finished":
        raise SystemExit(f"{run.root} is {record['status']}: let it end first")
    evaluations, steps = read_jsonl(run.eval), read_jsonl(run.metrics)
    before, after = [line for line in evaluations if line["split"] == "test"]
    dev = [line for line in evaluations if line["split"] == "dev"]
    started, ended = (datetime.fromisoformat(record[key]) for key in ("started", "ended"))
    return Row(
        engine="vllm" if config.rollout.engine == "vllm" else "torch",
        seed=config.train.seed,
        think=think_of(Path(str(config.model.path))),
        em=(before["em"], after["em"]),
        by_hops={hops: part["em"] for hops, part in after["by_hops"].items()},
        dev_steps=[line["step"] for line in dev],
        dev_em=[line["em"] for line in dev],
        one_hop_em=[line["by_hops"]["1"]["em"] for line in dev],
        mismatch_kl=max(step["policy/mismatch_kl"] for step in steps),
        steps_s=round(sum(step["time/step_s"] for step in steps), 1),
        total_s=(ended - started).total_seconds(),
        starts=record["starts"],
    )


if __name__ == "__main__":
    main()
