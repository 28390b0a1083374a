"""The synthetic recipe as it is shipped: from a dead end to answers over several searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from system_runs import assert_books_balance, run_rexrag

pytestmark = pytest.mark.system

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "synthetic.toml"


def test_probes_lead_out_of_the_dead_end(tmp_path: Path) -> None:
    run_rexrag("train", RECIPE, "--run-dir", tmp_path / "run", timeout_s=500)
    lines: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").open()]
    before, after = [line for line in lines if line["split"] == "test"]
    assert before["em"] < 0.2
    assert after["em"] > 0.5
    assert after["by_hops"]["2"]["em"] > 0.5
    assert_books_balance(tmp_path / "run")
