"""The audit log's metrics."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rempart_platform.audit.buffer import AuditBuffer
from rempart_platform.audit.values import Entry

_PREFIX = "rempart_router_audit_"


class AuditMetrics:
    """On a router's registry.

    Args:
        registry: where they are registered.
        buffer: read at each scrape, from the scraping thread.
        clock: seconds since the epoch.
    """

    def __init__(
        self, registry: CollectorRegistry, buffer: AuditBuffer, clock: Callable[[], float] = time.time
    ) -> None:
        self._records = Counter(_PREFIX + "records", "Records sealed, by what they tell.", ("kind",), registry=registry)
        self._segments = Counter(_PREFIX + "segments", "Segments sealed.", registry=registry)
        self._failures = Counter(_PREFIX + "seal_failures", "Attempts that storage did not take.", registry=registry)
        registry.register(_BufferCollector(buffer, clock))

    def sealed(self, entries: list[Entry]) -> None:
        self._segments.inc()
        for entry in entries:
            self._records.labels(entry.kind.value).inc()

    def seal_failed(self) -> None:
        self._failures.inc()


class _BufferCollector(Collector):
    def __init__(self, buffer: AuditBuffer, clock: Callable[[], float]) -> None:
        self._buffer = buffer
        self._clock = clock

    def collect(self) -> list[Metric]:
        oldest_s = self._buffer.oldest_s
        behind_s = 0.0 if oldest_s is None else max(self._clock() - oldest_s, 0.0)
        return [
            GaugeMetricFamily(_PREFIX + "buffered_records", "Records that wait to be sealed.", len(self._buffer)),
            GaugeMetricFamily(_PREFIX + "behind_seconds", "For how long the oldest of them waits.", behind_s),
            CounterMetricFamily(_PREFIX + "lost_records", "Records that could not be kept.", self._buffer.num_lost),
        ]
