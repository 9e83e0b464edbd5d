"""Metrics of finding engines. The sources come from the configuration, so they are few."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge


class DiscoveryMetrics:
    """The observer of a router's sources.

    Args:
        registry: where they are registered.
        clock: seconds since the epoch.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._last_sync = Gauge(
            "rempart_discovery_last_sync_timestamp_seconds",
            "When the source's endpoints were last known to be as they are; seconds since the epoch.",
            ("source",),
            registry=registry,
        )
        self._endpoints = Gauge(
            "rempart_discovery_endpoints", "Endpoints of the source.", ("source", "state"), registry=registry
        )
        self._errors = Counter(
            "rempart_discovery_errors",
            "Failures to read or follow the source's endpoints.",
            ("source", "reason"),
            registry=registry,
        )

    def synced(self, source: str, num_serving: int, num_terminating: int) -> None:
        self._last_sync.labels(source).set(self._clock())
        self._endpoints.labels(source, "serving").set(num_serving)
        self._endpoints.labels(source, "terminating").set(num_terminating)

    def failed(self, source: str, reason: str) -> None:
        self._errors.labels(source, reason).inc()
        self._last_sync.labels(source)  # 0 while it never was
