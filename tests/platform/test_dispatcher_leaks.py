"""Clients that go at any moment, deadlines, and engines that come and go: what none of it leaves behind."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry

from rempart_platform.dispatcher import DispatchConfig, Dispatcher
from rempart_platform.endpoints.capacity import Capacity, CapacityRules, capacity_of
from rempart_platform.endpoints.load import EndpointState
from rempart_platform.endpoints.pick import PickConfig
from rempart_platform.endpoints.pool import EnginePool
from rempart_platform.endpoints.session import SessionConfig
from rempart_platform.endpoints.static import StaticSource
from rempart_platform.endpoints.testing import FakeEngine
from rempart_platform.errors import RempartError
from rempart_platform.generation import Caller, GenerationRequest
from rempart_platform.holding import HoldConfig, HoldingRoom
from rempart_platform.metrics import QueueMetrics, QuotaMetrics, RouterMetrics
from rempart_platform.models import ModelCatalog
from rempart_platform.tenancy.fair_queue import FairQueue, open_fair_queue
from rempart_platform.tenancy.queue_keys import ModelKeys
from rempart_platform.tenancy.queue_values import QueueConfig
from rempart_platform.tenancy.quota import Ledger, QuotaConfig, open_ledger
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.testing import own_redis
from rempart_platform.testing import fake_served_model
from rempart_protos.v1 import sampling_pb2

TENANTS = [f"t{number}" for number in range(5)]
GAUGES = ("router_requests_in_flight", "model_running_tokens", "model_waiting_tokens", "requests_held")


@dataclass(frozen=True)
class Rig:
    engine: FakeEngine
    redis: RedisClient
    ledger: Ledger
    queue: FairQueue
    dispatcher: Dispatcher
    registry: CollectorRegistry

    async def assert_nothing_is_left(self) -> None:
        await self.queue.drain()
        await asyncio.wait_for(self.ledger.endings.wait_until_empty(), 60)
        await self.queue.dispatch("fake")  # finds what Redis granted to somebody who had gone
        await self.queue.drain()
        snapshot = await self.queue.snapshot("fake")
        assert (snapshot.num_waiting, snapshot.rows, snapshot.tokens) == (0, 0, 0)
        assert (self.queue.num_waiting, self.queue.num_places, self.ledger.num_open) == (0, 0, 0)
        running = ModelKeys("fake").queue[8]
        assert await self.redis.read_hash(running) == {}
        for tenant in TENANTS:
            balance = await self.ledger.balance(tenant)
            assert (balance.concurrency, balance.held_tokens, balance.held_money) == (0, 0, 0)
        for gauge in GAUGES:
            assert self.registry.get_sample_value(f"rempart_{gauge}", {"model": "fake"}) == 0


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    """A router of six rows, from its dispatcher on."""
    registry, rules, ready = CollectorRegistry(), CapacityRules(rows_per_endpoint=6), asyncio.Event()
    metrics = RouterMetrics(registry)
    metrics.scaling.expose(["fake"])

    def changed(state: EndpointState) -> None:
        ready.set()
        holding.check()

    def capacity(model: str) -> Capacity:
        return capacity_of(pool.states(), model, rules)

    async with FakeEngine(step_s=0.002) as engine, own_redis() as redis:
        session = SessionConfig(backoff_initial_s=0.01, backoff_max_s=0.05)
        # A restart may leave the engine out: for so short a while that most requests come after it.
        picking = PickConfig(left_out_s=0.02)
        pool = EnginePool(StaticSource([engine.address]), session, random.Random(1), changed, picking=picking)
        holding = HoldingRoom(HoldConfig(without_engine_s=30), pool.is_served, metrics.scaling.held)
        running = asyncio.create_task(pool.run())
        try:
            await asyncio.wait_for(ready.wait(), 30)
            async with (
                open_ledger(redis, QuotaConfig(), QuotaMetrics(metrics)) as ledger,
                open_fair_queue(redis, QueueConfig(), QueueMetrics(metrics), capacity) as queue,
            ):
                dispatcher = Dispatcher(
                    ledger=ledger,
                    queue=queue,
                    pool=pool,
                    catalog=ModelCatalog([fake_served_model()]),
                    config=DispatchConfig(cache_secret=b"secret"),
                    metrics=metrics,
                    holding=holding,
                )
                yield Rig(engine, redis, ledger, queue, dispatcher, registry)
        finally:
            running.cancel()
            await asyncio.wait([running])


async def ask(dispatcher: Dispatcher, request_id: str, rng: random.Random) -> str:
    """How it ended. One in fifty events is more than the client takes."""
    sampling = sampling_pb2.SamplingParams(max_tokens=rng.randint(1, 30), seed=3)
    caller, timeout_s = Caller(rng.choice(TENANTS), "key"), rng.choice((None, None, 0.02, 0.2))
    request = GenerationRequest(request_id, caller, "fake", (5, 6, 7), sampling, timeout_s=timeout_s)
    try:
        async with dispatcher.admit(request) as generation:
            async for _ in generation.events():
                if rng.random() < 0.02:
                    return "left"
    except RempartError as error:
        return error.kind.name
    return "ok"


async def cancel_soon(task: asyncio.Task[str], rng: random.Random) -> None:
    """After so many passes of the event loop that any of its awaits may be met."""
    for _ in range(rng.choice((0, 1, 2, 3, 5, 8, 13, 21, 40, 80, 200))):
        await asyncio.sleep(0)
    if rng.random() < 0.5:
        await asyncio.sleep(0.1 * rng.random())
    task.cancel()


async def restart(engine: FakeEngine) -> None:
    address = engine.address
    await engine.stop()
    await engine.start(address)


@pytest.mark.parametrize("seed", range(2))
async def test_nothing_is_left_whenever_clients_go_and_engines_restart(seed: int) -> None:
    rng = random.Random(seed)
    async with rig() as r:
        asked: list[asyncio.Task[str]] = []
        cancelling: list[asyncio.Task[None]] = []
        for number in range(400):
            asked.append(asyncio.create_task(ask(r.dispatcher, f"r{number}", rng)))
            if rng.random() < 0.4:
                cancelling.append(asyncio.create_task(cancel_soon(asked[-1], rng)))
            if number % 20 == 0:
                await asyncio.sleep(0.02)
            if number % 150 == 149:
                await restart(r.engine)
        ends = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 200)
        await asyncio.gather(*cancelling)
        cancelled = [end for end in ends if isinstance(end, asyncio.CancelledError)]
        assert {end for end in ends if isinstance(end, str)} <= {"ok", "left", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
        assert len(cancelled) > 20
        assert ends.count("ok") > 20
        assert len(cancelled) + sum(isinstance(end, str) for end in ends) == len(ends), ends
        await r.assert_nothing_is_left()
