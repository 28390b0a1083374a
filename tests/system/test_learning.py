"""The synthetic recipe as it is shipped, until it is out of the dead end, to answers over several searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from system_runs import assert_books_balance, run_rexrag

pytestmark = pytest.mark.system

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "synthetic.toml"


def test_probes_lead_out_of_the_dead_end(tmp_path: Path) -> None:
    words = ("--set", "train.steps=20", "--set", "eval.every=0")
    run_rexrag("train", RECIPE, *words, "--run-dir", tmp_path / "run", timeout_s=850)
    lines: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").open()]
    before, after = [line for line in lines if line["split"] == "test"]
    assert before["em"] < 0.22, "a fifth of the questions has one hop"
    assert before["by_hops"]["2"]["em"] < 0.05
    # The order of arrival, hence the run, differs from time to time, and rounding from one processor to the next.
    # Seen on 64 dev questions in six runs on two loaded cores: 0.31 to 0.56 after step 14, 0.61 to 0.64 after step 20.
    assert after["em"] > 0.4
    assert after["by_hops"]["1"]["em"] > 0.7
    assert after["by_hops"]["2"]["em"] > 0.35
    assert_books_balance(tmp_path / "run")
