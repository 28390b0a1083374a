"""What a search server tells Prometheus: its answers, and the counters of the service behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from rexrag.retrieval.service import ServiceCounters

_SECONDS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_COUNTED: Final = {
    "requests": "Queries that were asked.",
    "searched": "Queries that the index was asked for.",
    "coalesced": "Queries that shared the search of an equal one.",
    "cached": "Queries that were answered from an earlier equal one's search.",
    "refused": "Queries refused for want of room.",
    "timed_out": "Queries whose time was over before their answer came.",
    "failed": "Distinct queries whose batch broke.",
    "abandoned": "Distinct queries that nobody waited for any more when their turn came.",
}


class ServerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "rexrag_http_responses", "Answers to /retrieve, by status.", ["status"], registry=self._registry
        )
        self._seconds = Histogram(
            "rexrag_http_request_seconds",
            "Seconds from a request's head to its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)

    def watch(self, counters: Callable[[], ServiceCounters], *, num_passages: int) -> None:
        """Tell of a service, too; it is asked for its counters whenever the metrics are read."""
        self._registry.register(_ServiceCollector(counters, num_passages=num_passages))

    def answered(self, status: int, *, seconds: float) -> None:
        self._responses.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        """All metrics, in the text format of Prometheus."""
        return generate_latest(self._registry)


class _ServiceCollector(Collector):
    def __init__(self, counters: Callable[[], ServiceCounters], *, num_passages: int) -> None:
        self._counters = counters
        self._num_passages = num_passages

    def collect(self) -> Iterator[Metric]:
        counters = self._counters()
        for name, description in _COUNTED.items():
            yield CounterMetricFamily(f"rexrag_search_{name}", description, value=getattr(counters, name))
        yield GaugeMetricFamily("rexrag_search_waiting", "Distinct queries that wait.", value=counters.waiting)
        yield GaugeMetricFamily("rexrag_index_passages", "Passages of the index.", value=self._num_passages)
        stages = CounterMetricFamily(
            "rexrag_search_stage_seconds", "Seconds that the index has worked.", labels=["stage"]
        )
        stages.add_metric(["prepare"], counters.prepare_s)
        stages.add_metric(["find"], counters.find_s)
        yield stages
        yield _batch_sizes(dict(counters.batch_sizes))


def _batch_sizes(counts: dict[int, int]) -> HistogramMetricFamily:
    below = [
        (f"{bound:g}", float(sum(count for size, count in counts.items() if size <= bound)))
        for bound in (*_BATCH_SIZES, float("inf"))
    ]
    below[-1] = ("+Inf", below[-1][1])
    total = sum(size * count for size, count in counts.items())
    return HistogramMetricFamily(
        "rexrag_search_batch_size", "Queries of one call of the index.", buckets=below, sum_value=total
    )
