"""A run whose replay log does not reach up to its checkpoint, as the copy of a run that was going on has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from system_runs import assert_books_balance, run_rexrag

pytestmark = pytest.mark.system


def test_what_is_missing_is_told_everywhere_and_the_run_goes_on(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train.steps=2", "eval.every=0", "eval.max_questions=1", "train.groups_per_step=4"]
    first = run_rexrag("train", recipe, "--run-dir", run, *(f"--set={word}" for word in words))
    assert "oken authentication" not in first
    log = run / "buffer" / "segment-000001.log"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    resumed = run_rexrag("train", "--run-dir", run, "--set=train.steps=3")
    assert "warning: the replay log does not say which groups step" in resumed
    books = assert_books_balance(run)
    assert "does not say which groups step" in str(books["damages"])
    lines = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    assert any(line["part"] == "buffer" and "does not say which groups" in line["message"] for line in lines)
    (run / "buffer" / "segment-000001.log").unlink()
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "1", "question": "q?", "golden_answers": ["a"]}\n')
    train = Path(next(line for line in recipe.read_text().splitlines() if line.startswith("train =")).split('"')[1])
    kept = train.read_text()
    try:
        train.write_text(other.read_text())
        refused = run_rexrag("train", "--run-dir", run, "--set=train.steps=4", status=2)
    finally:
        train.write_text(kept)
    assert "other questions than the 1 given" in refused
    assert "starting Ray" not in refused
