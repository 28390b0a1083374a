"""The metrics of a run where Prometheus collects those of Ray, over HTTP."""

from __future__ import annotations

import time
import urllib.request

import pytest
import ray

import rexrag.metrics as keys
from rexrag.run.ray_metrics import RayMetrics

pytestmark = pytest.mark.system


def test_a_step_can_be_collected(ray_session: None) -> None:
    RayMetrics("rexrag-mine").record({keys.TARGET_EM: 0.25, keys.PROBE_EM: None})
    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 120
    lines: list[str] = []
    while not lines:
        assert time.monotonic() < deadline, "nothing was collected"
        time.sleep(1.0)
        with urllib.request.urlopen(url, timeout=30) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_rexrag_")]
    (line,) = lines
    assert line.startswith("ray_rexrag_target_em{")
    assert 'run="rexrag-mine"' in line
    assert line.endswith(" 0.25")
