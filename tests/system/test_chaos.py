"""A short run that is hurt once in each way: all steps in the end, nothing lost, nothing trained twice."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("chaos", BENCHMARKS / "chaos.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "chaos", module)
    spec.loader.exec_module(module)
    return module


def test_a_report_can_be_written_and_shown(chaos: ModuleType) -> None:
    report = chaos.Report(steps=3, faults=Counter(learner=1), without_progress_s={"learner": [2.0, 4.0]})
    report.accounting = {"issued": 5, "consumed": 3, "pending": 1, "dropped": {"lost": 1}}
    told = json.loads(chaos.text_of(report, began_at="0123"))
    assert (told["faults"], told["commit"]) == ({"learner": 1}, "0123")
    section = runpy.run_path(str(BENCHMARKS / "chaos_table.py"))["section"](told)
    assert "| learner | 1 | – | 3.0, 4.0 |" in section
    assert "Of 5 groups 3 were consumed, 1 were left at the end; dropped: 1 lost." in section


@pytest.mark.slow
def test_a_run_that_is_hurt_in_each_way_loses_nothing(chaos: ModuleType, tmp_path: Path) -> None:
    faults = ("rollout actor", "learner", "buffer", "driver", "server refuses", "server vanishes")
    report = chaos.play(tmp_path, steps=24, faults=faults, seed=1, timeout_s=800.0)
    assert report.steps == 24
    assert (report.lost, report.trained_twice) == (0, 0)
    assert report.starts >= 2, "a dead learner or driver ends a start"
    accounting = report.accounting
    assert accounting["issued"] == accounting["consumed"] + sum(accounting["dropped"].values()) + accounting["pending"]
    assert accounting["consumed"] == 24 * chaos.GROUPS_PER_STEP
    assert {**report.faults, **report.unplayed}.keys() == set(faults)
    assert report.without_progress_s.keys() == report.faults.keys(), "each fault was got over"
