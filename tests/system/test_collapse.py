"""A run whose policy breaks goes back and on at a lower rate, and in the end gives up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from system_runs import assert_books_balance, read_lines, run_rexrag

pytestmark = pytest.mark.system


def test_a_run_that_breaks_goes_back_twice_and_then_ends(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # At such a rate nothing but noise is left of a policy within a few steps, and a quarter of it is no better.
    settings = ("guard=rewind", "optimizer.learning_rate=0.5", "train.steps=80", "eval.every=0", "eval.max_questions=2")
    words = [word for setting in settings for word in ("--set", setting)]
    told = run_rexrag("train", recipe, "--run-dir", run, *words, status=1, timeout_s=600)
    assert "and on at 0.25 as its learning rate" in told
    assert "and on at 0.125 as its learning rate" in told
    assert "it has gone back 2 times already" in told
    collapses = [json.loads(line) for line in (run / "guard.jsonl").open()]
    assert [line["action"] for line in collapses] == ["rewind"] * 3
    assert all("target/reward" in line["reasons"][0] for line in collapses)
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)), "each step once"
    assert len(read_lines(run / "metrics.lost.jsonl")) >= 10
    rates = {line["optimizer/learning_rate"] for line in read_lines(run / "metrics.jsonl")[-5:]}
    assert rates - {None} == {0.125}
    assert_books_balance(run)
