"""A run that goes on is watched, scaled and stopped from other processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from system_runs import TIMEOUT_S, Watch, assert_books_balance, read_lines, run_rexrag, start_rexrag

pytestmark = pytest.mark.system


def status_of(run: Path) -> dict[str, Any]:
    """What `rexrag status --json` says."""
    process = start_rexrag("status", "--run", run, "--json")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    told: dict[str, Any] = json.loads(out)
    return told


def versions_of(told: dict[str, Any], *actors: str) -> list[Any]:
    """Of actors that are at work; None: not there, or without weights."""
    held = {actor["actor_id"]: actor["version"] for actor in told["actors"] if actor["actor_id"] in at_work(told)}
    return [held.get(actor) for actor in actors]


def at_work(told: dict[str, Any]) -> list[str]:
    return [actor["actor_id"] for actor in told["actors"] if actor["state"] in ("healthy", "stale", "suspect")]


def test_a_run_is_scaled_up_and_down_while_it_goes_on_and_stopped(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--set", "train.steps=100000", "--set", "eval.every=0", "--set", "eval.max_questions=2")
    process = start_rexrag("train", recipe, "--run-dir", run, *words, "--set", "rollout.num_actors=1")
    watch = Watch(run)
    try:
        first = watch.until(lambda told: told["step"] >= 2, process=process)
        assert at_work(first) == ["rollout-0"]
        assert first["num_steps"] == 100000
        assert first["buffer"]["capacity"] == 16
        assert 0 <= first["age_s"] < 300

        run_rexrag("scale", "--actors", "2", "--run", run)
        watch.until(lambda told: None not in versions_of(told, "rollout-0", "rollout-1"), process=process)
        working = watch.until(lambda told: told["actors"][1]["num_groups"] > 0, process=process)
        assert working["actors"][1]["version"] >= first["step"] - 1, "it joined with the weights of the time"

        run_rexrag("scale", "--actors", "1", "--run", run)
        left = watch.until(lambda told: len(told["actors"]) == 1, process=process)
        assert left["num_wanted"] == 1
        watch.until(lambda told: told["step"] > left["step"], process=process)
        assert status_of(run)["step"] > left["step"]

        run_rexrag("stop", "--run", run)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        watch.end()
    assert process.returncode == 130, errors
    assert "stopped by rexrag stop" in errors
    assert not (run / "cluster.json").exists()
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    saved = max(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))
    assert saved == len(steps) == max(step for step in steps if step is not None)
    accounting = assert_books_balance(run)
    assert accounting["dropped"] == {}, "an actor that drains wastes nothing"
    assert json.loads((run / "wanted.json").read_text()) == {"num_actors": 1, "instead_of": 1}
    log = (run / "log.jsonl").read_text()
    assert "rollout-1 is let go" in log
    assert "does not go on (it is interrupted)" in run_rexrag("status", "--run", run, status=2)
    assert "cannot be reached" in run_rexrag("status", "--run", run, "--address", "127.0.0.1:1", status=2)
    assert "is a folder without a run" in run_rexrag("stop", "--run", tmp_path, status=2)
