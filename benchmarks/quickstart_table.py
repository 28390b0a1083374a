"""The quick start over seeds, REX-RAG beside plain GRPO with as many rollouts: the table of the README.

    python benchmarks/quickstart_table.py --work DIR [--seeds 0 1 2] [--grpo-seeds 0] [--out FILE.json]

Every seed draws its own world split, demonstrations, warm start and training. A run that is there goes on where it
stopped, a finished one is only read, so the command may be given again until the table is whole. GRPO's group size
is that which spends the rollouts of the REX-RAG run of the same seed (targets and probes), rounded to the nearest.
Wall time and memory are those of `rexrag train` with all its processes: preparation, both evaluations, training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from machine import commit, machine

from rexrag.run_folder import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "quickstart.toml"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: EM on the held-out questions before and after, by hops, and what it cost."""

    method: str
    seed: int
    group_size: int
    rollouts: int
    seconds: float
    wall_s: float
    peak_gb: float
    em_before: float
    em_after: float
    by_hops_before: dict[str, float]
    by_hops_after: dict[str, float]
    worst_one_hop_on_dev: float
    num_questions: int


def main() -> None:
    """Run what is missing, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--grpo-seeds", type=int, nargs="*", default=[0], help="those of --seeds with GRPO beside")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quickstart.json")
    words = parser.parse_args()
    rows: list[Row] = []
    head = commit()
    for seed in words.seeds:
        rows.append(run("rex", seed=seed, work=words.work))
        write(words.out, rows, head=head)
    for seed in words.grpo_seeds:
        rex = next(row for row in rows if row.seed == seed)
        group_size = max(2, round(rex.rollouts / num_groups(words.work / f"rex-{seed}")))
        rows.append(run("grpo", seed=seed, work=words.work, group_size=group_size))
        write(words.out, rows, head=head)
    print(table(rows))


def run(method: str, *, seed: int, work: Path, group_size: int | None = None) -> Row:
    """Train, or go on, or only read; returns the run's row."""
    folder = work / f"{method}-{seed}"
    command = [sys.executable, "-m", "rexrag", "train", "--run-dir", str(folder)]
    if not (folder / "run.json").exists():
        command += [str(RECIPE), "--set", f"train.seed={seed}"]
        command += ["--set", f"method={method}"] if method == "grpo" else []
        command += ["--set", f"rollout.group_size={group_size}"] if group_size is not None else []
    if not is_done(folder):
        run_and_measure(command, cost_file=work / f"{method}-{seed}.cost.json")
    return read(folder, method=method, seed=seed)


def is_done(folder: Path) -> bool:
    path = folder / "run.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def run_and_measure(command: list[str], *, cost_file: Path) -> None:
    """Run it; wall time and peak memory are added to those of earlier parts of the same run."""
    cost = json.loads(cost_file.read_text()) if cost_file.exists() else {"wall_s": 0.0, "peak_gb": 0.0}
    began, before = time.monotonic(), cost["wall_s"]
    cost_file.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            cost["peak_gb"] = max(cost["peak_gb"], memory_gb(process.pid))
            cost["wall_s"] = before + time.monotonic() - began
            cost_file.write_text(json.dumps(cost))
            time.sleep(2.0)
    if process.returncode:
        raise SystemExit(process.returncode)


def memory_gb(pid: int) -> float:
    """Memory of a process and all below it; what several share counts once (proportional set size)."""
    total = 0
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for member in family:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 1e9


def read(folder: Path, *, method: str, seed: int) -> Row:
    evaluations, steps = read_jsonl(folder / "eval.jsonl"), read_jsonl(folder / "metrics.jsonl")
    test = [line for line in evaluations if line["split"] == "test"]
    one_hop = [line["by_hops"]["1"]["em"] for line in evaluations if line["split"] == "dev" and "1" in line["by_hops"]]
    targets = sum(line["target/count"] for line in steps)
    before, after = test[0], test[-1]
    cost = json.loads((folder.parent / f"{method}-{seed}.cost.json").read_text())
    return Row(
        method=method,
        seed=seed,
        group_size=round(targets / num_groups(folder)),
        rollouts=round(targets + sum(line["probe/count"] for line in steps)),
        seconds=round(sum(line["time/step_s"] for line in steps)),
        wall_s=round(cost["wall_s"]),
        peak_gb=round(cost["peak_gb"], 2),
        em_before=before["em"],
        em_after=after["em"],
        by_hops_before={hops: row["em"] for hops, row in before["by_hops"].items()},
        by_hops_after={hops: row["em"] for hops, row in after["by_hops"].items()},
        worst_one_hop_on_dev=min(one_hop),
        num_questions=after["n"],
    )


def num_groups(folder: Path) -> int:
    return sum(round(line["group/count"]) for line in read_jsonl(folder / "metrics.jsonl"))


def table(rows: list[Row]) -> str:
    """Markdown: a line per run, then mean and spread per method."""
    titles = ["method", "seed", "rollouts", "all, min", "training, min", "peak, GB", "EM before", "EM after"]
    titles += ["1/2/3 hops before", "1/2/3 hops after", "worst 1 hop on dev"]
    out = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in sorted(rows, key=lambda row: (row.method != "rex", row.seed)):
        out.append(
            f"| {row.method} | {row.seed} | {row.rollouts} | {row.wall_s / 60:.1f} | {row.seconds / 60:.1f} "
            f"| {row.peak_gb:.1f} "
            f"| {row.em_before:.2f} | {row.em_after:.2f} "
            f"| {hops(row.by_hops_before)} | {hops(row.by_hops_after)} | {row.worst_one_hop_on_dev:.2f} |"
        )
    for method in ("rex", "grpo"):
        ends = [row.em_after for row in rows if row.method == method]
        if len(ends) > 1:
            out.append(
                f"| {method} | all | | | | | | {statistics.mean(ends):.2f} ± {statistics.stdev(ends):.2f} | | | |"
            )
    return "\n".join(out)


def hops(values: dict[str, float]) -> str:
    return " / ".join(f"{values[key]:.2f}" for key in sorted(values))


def write(path: Path, rows: list[Row], *, head: str) -> None:
    result = {
        "commit": head,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
