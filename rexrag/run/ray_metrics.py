"""The metrics of a run as Ray's own, which a cluster's Prometheus collects: `target/em` is `ray_rexrag_target_em`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge

from rexrag.metrics import DESCRIPTIONS, described


class RayMetrics:
    """Gauges with the label `run`, made when a metric first has a value.

    Args:
        run: the run's name.
    """

    def __init__(self, run: str) -> None:
        self._labels = {"run": run}
        self._gauges: dict[str, Gauge] = {}

    def record(self, metrics: Mapping[str, float | None]) -> None:
        """The values of a step, by their tags; a metric without a value keeps the last one."""
        for key, value in metrics.items():
            if value is None:
                continue
            if key not in self._gauges:
                name = re.sub(r"[^a-z0-9_]", "_", f"rexrag_{key}")
                told = DESCRIPTIONS[described(key)].encode("ascii", "replace").decode()  # Ray takes no other letters
                self._gauges[key] = Gauge(name, description=told, tag_keys=("run",))
            self._gauges[key].set(value, tags=self._labels)
