"""The dispatcher with a fair queue before its engines."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

import pytest
from prometheus_client import CollectorRegistry

from rempart_platform.dispatcher import DispatchConfig, Dispatcher
from rempart_platform.endpoints.capacity import Capacity, CapacityRules, capacity_of
from rempart_platform.endpoints.pool import EnginePool
from rempart_platform.endpoints.session import SessionConfig
from rempart_platform.endpoints.static import StaticSource
from rempart_platform.endpoints.testing import FakeEngine, Faults
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller, GenerationEvent, GenerationRequest, Usage
from rempart_platform.metrics import RouterMetrics
from rempart_platform.models import ModelCatalog
from rempart_platform.tenancy.fair_queue import FairQueue, open_fair_queue
from rempart_platform.tenancy.queue_testing import RecordingQueueObserver
from rempart_platform.tenancy.queue_values import QueueConfig
from rempart_platform.tenancy.testing import own_redis
from rempart_platform.testing import RecordingLedger, fake_served_model
from rempart_protos.v1 import sampling_pb2

ENDLESS = 4000


@dataclass(frozen=True)
class Rig:
    engine: FakeEngine
    ledger: RecordingLedger
    queue: FairQueue
    observer: RecordingQueueObserver
    dispatcher: Dispatcher
    registry: CollectorRegistry

    async def run(self, request: GenerationRequest) -> list[GenerationEvent]:
        async with self.dispatcher.admit(request) as generation:
            return [event async for event in generation.events()]

    async def assert_nothing_is_left(self) -> None:
        await self.engine.wait_for(lambda: self.engine.num_running == 0)
        await self.queue.drain()
        snapshot = await self.queue.snapshot("fake")
        assert (snapshot.num_waiting, snapshot.rows, snapshot.tokens) == (0, 0, 0)
        assert (self.queue.num_waiting, self.queue.num_places) == (0, 0)
        assert self.ledger.open == {}


@asynccontextmanager
async def rig(engine: FakeEngine, rows: int = 1, **config: int) -> AsyncIterator[Rig]:
    ready = asyncio.Event()
    rules, observer, ledger, registry = (
        CapacityRules(rows_per_endpoint=rows),
        RecordingQueueObserver(),
        RecordingLedger(),
        CollectorRegistry(),
    )

    def capacity(model: str) -> Capacity:
        return capacity_of(pool.states(), model, rules)

    async with engine, own_redis() as redis:
        session = SessionConfig(backoff_initial_s=0.01)
        pool = EnginePool(StaticSource([engine.address]), session, random.Random(1), lambda state: ready.set())
        task = asyncio.create_task(pool.run())
        await asyncio.wait_for(ready.wait(), 30)
        queue_config = replace(QueueConfig(), **config)  # type: ignore[arg-type]  # the tests name its fields
        async with open_fair_queue(redis, queue_config, observer, capacity) as queue:
            dispatcher = Dispatcher(
                ledger=ledger,
                queue=queue,
                pool=pool,
                catalog=ModelCatalog([fake_served_model()]),
                config=DispatchConfig(cache_secret=b"secret"),
                metrics=RouterMetrics(registry),
            )
            yield Rig(engine, ledger, queue, observer, dispatcher, registry)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def request(request_id: str, max_tokens: int = 20, timeout_s: float | None = None) -> GenerationRequest:
    sampling = sampling_pb2.SamplingParams(max_tokens=max_tokens, seed=3)
    return GenerationRequest(request_id, Caller("acme", "key"), "fake", (5, 6, 7), sampling, timeout_s=timeout_s)


async def test_no_engine_is_given_more_than_it_has_room_for() -> None:
    most = 0

    def token(*_: object) -> int:
        nonlocal most
        most = max(most, r.engine.num_running)
        return 97

    async with rig(FakeEngine(token=token, faults=Faults(hang_at=0)), rows=3) as r:
        asked = [asyncio.create_task(r.run(request(f"r{number}"))) for number in range(20)]
        await r.engine.wait_for(lambda: r.engine.num_running == 3)
        r.engine.faults = Faults()
        assert [events[-1] for events in await asyncio.gather(*asked)] == [Usage(3, 20)] * 20
        await r.assert_nothing_is_left()
    assert most == 3
    assert r.observer.counts["entered"] >= 1
    assert r.observer.counts["granted"] == 20


async def test_the_place_is_given_back_before_the_usage() -> None:
    async with rig(FakeEngine()) as r, r.dispatcher.admit(request("r")) as generation:
        async for event in generation.events():
            assert (r.queue.num_places == 0) is isinstance(event, Usage)


async def test_a_client_that_leaves_while_it_waits_leaves_nothing_and_is_not_charged() -> None:
    async with rig(FakeEngine(faults=Faults(hang_at=1))) as r:
        running = asyncio.create_task(r.run(request("running", ENDLESS)))
        await r.engine.wait_for(lambda: r.engine.num_running == 1)
        waiting = asyncio.create_task(r.run(request("waiting")))
        await r.observer.wait_for("entered", 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert r.ledger.refunded_ids == ["waiting"]
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert [started.request_id for started in r.engine.started] == ["running"]
        await r.assert_nothing_is_left()


async def test_a_request_whose_time_runs_out_while_it_waits_is_answered_so() -> None:
    async with rig(FakeEngine(faults=Faults(hang_at=1))) as r:
        running = asyncio.create_task(r.run(request("running", ENDLESS)))
        await r.engine.wait_for(lambda: r.engine.num_running == 1)
        with pytest.raises(RempartError) as raised:
            await r.run(request("late", timeout_s=0.5))
        assert raised.value.kind is ErrorKind.DEADLINE_EXCEEDED
        assert r.ledger.refunded_ids == ["late"]
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await r.assert_nothing_is_left()


async def test_too_many_that_wait_are_refused_and_counted_by_reason() -> None:
    async with rig(FakeEngine(faults=Faults(hang_at=1)), max_waiting_per_tenant=1) as r:
        held = [asyncio.create_task(r.run(request("running", ENDLESS)))]
        await r.engine.wait_for(lambda: r.engine.num_running == 1)
        held.append(asyncio.create_task(r.run(request("waiting"))))
        await r.observer.wait_for("entered", 1)
        with pytest.raises(RempartError) as raised:
            await r.run(request("too-many"))
        assert raised.value.kind is ErrorKind.RATE_LIMIT_EXCEEDED
        assert r.ledger.refunded_ids == ["too-many"]
        labels = {"model": "fake", "reason": "waiting"}
        assert r.registry.get_sample_value("rempart_router_rejections_total", labels) == 1
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await r.assert_nothing_is_left()
