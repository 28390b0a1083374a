"""The benchmark of the search server at a small size: both servers answer, and its figures have their form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from free_ports import free_ports

pytestmark = [pytest.mark.system, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


def test_both_servers_are_measured(tmp_path: Path) -> None:
    words = "--passages 200 --dimension 32 --layers 1 --clients 1 4 --seconds 0.3 --threads 1"
    (port,) = free_ports(1)
    out = tmp_path / "out.json"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "retrieval.py"),
            *words.split(),
            "--port",
            str(port),
            "--work",
            tmp_path,
            "--out",
            out,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["machine"]["cpu"]
    assert report["commit"]
    (corpus,) = report["corpora"]
    assert [(load["server"], load["clients"]) for load in corpus["loads"]] == [
        ("one per call", 1), ("one per call", 4), ("rexrag", 1), ("rexrag", 4)
    ]  # fmt: skip
    assert all(load["qps"] > 0 and load["p99_ms"] >= load["p50_ms"] > 0 for load in corpus["loads"])
    assert all(load["cpu_s"] >= 0 and load["memory_mb"] > 10 for load in corpus["loads"])
    assert set(corpus["goals"]) == {"qps_ratio_1"}
    assert report["law"] is None, "of one size there is none"
