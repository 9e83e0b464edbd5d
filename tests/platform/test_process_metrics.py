import asyncio
import time

from prometheus_client import CollectorRegistry

from rempart_platform.config import RouterConfig
from rempart_platform.process_metrics import LoopLag, RouterState, limits_of, register_process_metrics

CONFIG = RouterConfig(models=(), engines=("a:1",), max_concurrent_rpcs=7)
LAG = "rempart_router_event_loop_lag_seconds"


def test_a_router_tells_what_it_is_and_how_it_stands() -> None:
    registry, is_redis_up = CollectorRegistry(), asyncio.Event()
    register_process_metrics(registry, CONFIG, RouterState(lambda: False, is_redis_up.is_set))
    assert registry.get_sample_value("rempart_router_redis_up") == 0
    is_redis_up.set()
    assert registry.get_sample_value("rempart_router_redis_up") == 1
    assert registry.get_sample_value("rempart_router_ready") == 0
    families = {family.name: family.samples for family in registry.collect()}
    (info,) = families["rempart_router"]
    assert info.labels["version"]
    limits = {sample.labels["limit"]: sample.value for sample in families["rempart_router_limit"]}
    assert limits == limits_of(CONFIG)
    assert limits["max_concurrent_rpcs"] == 7


def test_a_router_tells_of_its_own_process() -> None:
    registry = CollectorRegistry()
    register_process_metrics(registry, CONFIG, RouterState(lambda: True, lambda: True))
    start_s = registry.get_sample_value("rempart_router_process_start_time_seconds")
    assert start_s is not None
    assert 0 < start_s <= time.time() + 1


async def test_a_blocked_event_loop_shows_as_lag() -> None:
    registry = CollectorRegistry()
    watching = asyncio.create_task(LoopLag(registry).watch(period_s=0.01))
    await asyncio.sleep(0)  # it has asked to be woken
    time.sleep(0.3)  # noqa: ASYNC251 - what must not happen in a router
    while not registry.get_sample_value(f"{LAG}_count"):  # noqa: ASYNC110 - a metric sets no event
        await asyncio.sleep(0)
    watching.cancel()
    assert registry.get_sample_value(f"{LAG}_bucket", {"le": "0.25"}) == 0
