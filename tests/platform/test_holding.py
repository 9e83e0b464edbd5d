"""Requests that wait for a first engine: how long, how many, and what they leave behind when they go."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from rempart_platform.dispatcher import DispatchConfig, Dispatcher
from rempart_platform.endpoints.pick import PickConfig
from rempart_platform.endpoints.pool import EnginePool
from rempart_platform.endpoints.session import SessionConfig
from rempart_platform.endpoints.static import StaticSource
from rempart_platform.endpoints.testing import FakeEngine, Faults
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller, GenerationRequest, Usage
from rempart_platform.holding import HoldConfig, HoldingRoom
from rempart_platform.metrics import RouterMetrics
from rempart_platform.models import ModelCatalog
from rempart_platform.testing import RecordingLedger, fake_served_model
from rempart_protos.v1 import engine_pb2, sampling_pb2

LONG = HoldConfig(without_engine_s=30.0)
NO_FAULTS = Faults()
GAUGES = ("requests_held", "model_waiting_tokens", "model_running_tokens")


@dataclass
class Rig:
    engine: FakeEngine
    ledger: RecordingLedger
    dispatcher: Dispatcher
    registry: CollectorRegistry
    held: asyncio.Event

    async def run(self, request: GenerationRequest) -> Usage:
        async with self.dispatcher.admit(request) as generation:
            events = [event async for event in generation.events()]
        assert isinstance(events[-1], Usage)
        return events[-1]

    def gauge(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"rempart_{name}", {"model": "fake"})

    async def hold(self, *requests: GenerationRequest) -> list[asyncio.Task[Usage]]:
        """Starts these, and returns once they wait."""
        wanted = (self.gauge("requests_held") or 0) + len(requests)
        tasks = [asyncio.create_task(self.run(each)) for each in requests]
        async with asyncio.timeout(30):
            while self.gauge("requests_held") != wanted:
                self.held.clear()
                await self.held.wait()
        return tasks


@asynccontextmanager
async def rig(config: HoldConfig = LONG, faults: Faults = NO_FAULTS) -> AsyncIterator[Rig]:
    """An engine that is known and not there yet."""
    engine, ledger, registry = FakeEngine(faults=faults), RecordingLedger(), CollectorRegistry()
    await engine.start()
    await engine.stop()
    metrics = RouterMetrics(registry)
    metrics.scaling.expose(["fake"])
    picking, session = PickConfig(failures_to_leave_out=1, left_out_s=60), SessionConfig(backoff_max_s=0.05)
    pool = EnginePool(
        StaticSource([engine.address]), session, random.Random(1), lambda _: holding.check(), picking=picking
    )
    held = asyncio.Event()

    @contextmanager
    def count(model: str) -> Iterator[None]:
        with metrics.scaling.held(model):
            held.set()
            yield

    holding = HoldingRoom(config, pool.is_served, count)
    dispatcher = Dispatcher(
        ledger=ledger,
        pool=pool,
        catalog=ModelCatalog([fake_served_model()]),
        config=DispatchConfig(cache_secret=b"secret"),
        metrics=metrics,
        holding=holding,
    )
    running = asyncio.create_task(pool.run())
    try:
        built = Rig(engine, ledger, dispatcher, registry, held)
        yield built
        assert ledger.open == {}
        assert [built.gauge(name) for name in GAUGES] == [0, 0, 0]
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await engine.stop()


def request(request_id: str = "r", tenant: str = "acme", timeout_s: float | None = None) -> GenerationRequest:
    sampling = sampling_pb2.SamplingParams(max_tokens=20, seed=3)
    return GenerationRequest(request_id, Caller(tenant, "key"), "fake", (5, 6, 7), sampling, timeout_s=timeout_s)


async def test_gauges_are_there_before_any_request() -> None:
    async with rig() as r:
        assert [r.gauge(name) for name in GAUGES] == [0, 0, 0]


async def test_requests_wait_for_a_first_engine_and_then_run() -> None:
    async with rig() as r:
        tasks = await r.hold(request("a"), request("b", "globex"))
        assert r.gauge("model_waiting_tokens") == 2 * 23
        assert sorted(r.ledger.open) == ["a", "b"]
        await r.engine.start(r.engine.address)
        assert await asyncio.gather(*tasks) == [Usage(3, 20), Usage(3, 20)]
        assert r.ledger.refunded_ids == []
        assert await r.run(request("c")) == Usage(3, 20)


async def test_one_whose_engine_does_not_come_is_refused_and_refunded() -> None:
    async with rig(HoldConfig(without_engine_s=0.05)) as r:
        with pytest.raises(RempartError) as raised:
            await r.run(request())
        assert raised.value.kind is ErrorKind.UNAVAILABLE
        assert raised.value.retry_after_s is not None
        assert r.ledger.refunded_ids == ["r"]


async def test_its_own_deadline_ends_it_first() -> None:
    async with rig() as r:
        with pytest.raises(RempartError) as raised:
            await r.run(request(timeout_s=0.05))
        assert raised.value.kind is ErrorKind.DEADLINE_EXCEEDED
        assert r.ledger.refunded_ids == ["r"]


async def test_a_client_that_leaves_leaves_nothing() -> None:
    async with rig() as r:
        (task,) = await r.hold(request())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert r.ledger.refunded_ids == ["r"]


async def test_too_many_are_refused_by_the_name_of_the_limit() -> None:
    async with rig(HoldConfig(without_engine_s=30, max_per_model=3, max_per_tenant=2)) as r:
        tasks = await r.hold(request("a"), request("b"))
        with pytest.raises(RempartError, match=r"limit of 2 .* \(hold_max_per_tenant\)") as raised:
            await r.run(request("c"))
        assert raised.value.kind is ErrorKind.RATE_LIMIT_EXCEEDED
        assert raised.value.violation is not None
        tasks += await r.hold(request("d", "globex"))
        with pytest.raises(RempartError, match=r"3 requests .* \(hold_max_per_model\)") as raised:
            await r.run(request("e", "initech"))
        assert raised.value.kind is ErrorKind.UNAVAILABLE
        tasks.pop(0).cancel()
        await asyncio.sleep(0)
        tasks += await r.hold(request("f"))  # there is room again
        assert r.ledger.refunded_ids == ["c", "e", "a"]
        await r.engine.start(r.engine.address)
        await asyncio.gather(*tasks)


async def test_an_engine_that_is_left_out_is_not_waited_for() -> None:
    async with rig(faults=Faults(refuse=engine_pb2.EngineError.CODE_UNAVAILABLE)) as r:
        tasks = await r.hold(request("a"))
        await r.engine.start(r.engine.address)
        for refused in (tasks[0], r.run(request("b"))):
            with pytest.raises(RempartError) as raised:
                await refused
            assert raised.value.kind is ErrorKind.UNAVAILABLE
        assert len(r.engine.started) == 1
        assert "b" not in r.ledger.refunded_ids  # it never reserved


async def test_one_that_comes_again_is_not_held_and_counts_until_then() -> None:
    async with rig() as r:
        with pytest.raises(RempartError) as raised:
            await r.run(replace(request("line"), comes_again=True))
        assert raised.value.kind is ErrorKind.UNAVAILABLE
        assert raised.value.retry_after_s is not None
        assert r.ledger.refunded_ids == []  # it never reserved
        assert r.gauge("requests_held") == 1
        assert b"service_unavailable" not in generate_latest(r.registry)  # one line, however often it is asked
        tasks = await r.hold(request("online"))
        await r.engine.start(r.engine.address)
        await asyncio.gather(*tasks)
        assert r.gauge("requests_held") == 0
        assert await r.run(replace(request("again"), comes_again=True)) == Usage(3, 20)


async def test_one_that_does_not_come_again_is_forgotten() -> None:
    forgotten = asyncio.Event()

    @contextmanager
    def count(model: str) -> Iterator[None]:
        yield
        forgotten.set()

    room = HoldingRoom(LONG, lambda model: False, count, comes_again_s=0.01)
    room.turn_away("fake")
    async with asyncio.timeout(10):
        await forgotten.wait()


async def test_without_holding_a_request_is_refused_at_once() -> None:
    async with rig() as r:
        r.dispatcher._holding = None
        with pytest.raises(RempartError) as raised:
            await r.run(request())
        assert raised.value.kind is ErrorKind.UNAVAILABLE
        assert r.ledger.refunded_ids == []


@pytest.mark.parametrize("limits", [{"max_per_model": 0}, {"max_per_tenant": 0}])
def test_no_room_at_all_is_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        HoldConfig(**limits)
