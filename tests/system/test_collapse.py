"""A run whose policy breaks goes back and on at a lower rate, and in the end gives up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from system_runs import assert_books_balance, read_lines, run_rexrag

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_a_run_that_breaks_goes_back_and_in_the_end_gives_up(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("eval.every=0", "eval.max_questions=2", "train.groups_per_step=4", "guard=rewind")
    words = ["--run-dir", str(run), *(word for setting in settings for word in ("--set", setting))]
    run_rexrag("train", recipe, *words, "--set", "train.steps=6")
    # What it is compared with is a past in which it was right and wrote otherwise, and it has gone back once before.
    past = [{**line, "target/reward": 1.0, "policy/entropy": 0.01} for line in read_lines(run / "metrics.jsonl")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in past[:1] * 4 + past))
    (run / "guard.jsonl").write_text('{"action": "rewind"}\n')

    told = run_rexrag("train", recipe, *words, "--set", "train.steps=40", status=1, timeout_s=400)
    assert "the policy breaks at step" in told
    assert "policy/entropy is" in told
    assert "the run goes back to step 4, and on at 0.00025 as its learning rate" in told
    assert "it has gone back 2 times already" in told
    collapses = [json.loads(line) for line in (run / "guard.jsonl").open()][1:]
    assert [line["action"] for line in collapses] == ["rewind"] * 2
    lost, kept = (read_lines(run / name) for name in ("metrics.lost.jsonl", "metrics.jsonl"))
    assert [line["step"] for line in lost] == list(range(5, collapses[0]["step"] + 1))
    assert [line["step"] for line in kept[8:]] == list(range(5, collapses[1]["step"] + 1))
    assert {line["optimizer/learning_rate"] for line in lost[2:]} - {None} == {0.0005}
    assert {line["optimizer/learning_rate"] for line in kept[8:]} - {None} == {0.00025}
    assert_books_balance(run)
