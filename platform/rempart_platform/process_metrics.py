"""What a router says of itself beside its requests: its build, its limits, whether Redis answers, how late its loop is.

A router is one event loop. When that is late, every stream of the router is, and no metric of requests says why.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from rempart_platform.config import RouterConfig

_LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LAG_PERIOD_S = 0.25


@dataclass(frozen=True, slots=True)
class RouterState:
    """Questions that are asked at each scrape, from the scraping thread."""

    is_ready: Callable[[], bool]
    is_redis_up: Callable[[], bool]


class LoopLag:
    """How much later than asked the event loop wakes a task."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = Histogram(
            "rempart_router_event_loop_lag_seconds",
            "How much later than asked the event loop woke a task.",
            registry=registry,
            buckets=_LAG_BUCKETS_S,
        )

    async def watch(self, period_s: float = _LAG_PERIOD_S) -> None:
        """Measures until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            asked_at = clock()
            await asyncio.sleep(period_s)
            self._lag.observe(max(clock() - asked_at - period_s, 0.0))


def register_process_metrics(registry: CollectorRegistry, config: RouterConfig, state: RouterState) -> LoopLag:
    """Registers all of them; the loop's lag is measured while `watch` runs."""
    ProcessCollector(namespace="rempart_router", registry=registry)
    registry.register(_RouterCollector(limits_of(config), state))
    return LoopLag(registry)


def limits_of(config: RouterConfig) -> Mapping[str, int]:
    """The limits that a router is measured against, by the names of their flags."""
    return {
        "http_max_connections": config.http.max_connections,
        "max_concurrent_rpcs": config.max_concurrent_rpcs,
        "max_tenant_labels": config.max_tenant_labels,
        "queue_max_waiting": config.queue.max_waiting,
        "queue_max_waiting_per_tenant": config.queue.max_waiting_per_tenant,
        "redis_max_connections": config.redis_max_connections,
    }


class _RouterCollector(Collector):
    def __init__(self, limits: Mapping[str, int], state: RouterState) -> None:
        self._limits = limits
        self._state = state

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("rempart_router", "What runs.", value={"version": version("rempart")})
        limit = GaugeMetricFamily("rempart_router_limit", "Limits of this router, by flag.", labels=("limit",))
        for name, value in self._limits.items():
            limit.add_metric((name,), value)
        yield limit
        yield GaugeMetricFamily(
            "rempart_router_ready",
            "1 when requests can be served and no drain has begun.",
            value=self._state.is_ready(),
        )
        yield GaugeMetricFamily(
            "rempart_router_redis_up", "0 while Redis does not answer.", value=self._state.is_redis_up()
        )
