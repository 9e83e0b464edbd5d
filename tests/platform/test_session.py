import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from rempart_platform.endpoints.load import EndpointState
from rempart_platform.endpoints.session import EngineSession, SessionConfig, backoff_s
from rempart_platform.endpoints.testing import FakeEngine, Faults, fake_model_info, hash_token
from rempart_platform.errors import ErrorKind, RempartError
from rempart_protos.v1 import engine_pb2, sampling_pb2

FAST = SessionConfig(backoff_initial_s=0.01, backoff_max_s=0.05)


class Changes:
    """Waits for what a session tells of its endpoint."""

    def __init__(self) -> None:
        self.seen: list[EndpointState] = []
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, state: EndpointState) -> None:
        self.seen.append(state)
        task = asyncio.get_running_loop().create_task(self._notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def wait_for(self, predicate: Callable[[EndpointState], bool]) -> EndpointState:
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(lambda: bool(self.seen) and predicate(self.seen[-1]))
        return self.seen[-1]


@asynccontextmanager
async def connected(address: str, config: SessionConfig = FAST) -> AsyncIterator[tuple[EngineSession, Changes]]:
    changes = Changes()
    session = EngineSession(address, config, random.Random(0), changes)
    task = asyncio.create_task(session.run())
    try:
        await changes.wait_for(lambda state: state.is_ready)
        yield session, changes
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def generate_request(request_id: str = "r", max_tokens: int = 8, **fields: object) -> engine_pb2.GenerateRequest:
    request = engine_pb2.GenerateRequest(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        sampling=sampling_pb2.SamplingParams(max_tokens=max_tokens, seed=5),
    )
    request.MergeFrom(engine_pb2.GenerateRequest(**fields))  # type: ignore[arg-type]  # the tests name its fields
    return request


async def read_all(session: EngineSession, request: engine_pb2.GenerateRequest) -> list[int]:
    received: list[int] = []
    await read_into(received, session, request)
    return received


async def read_into(received: list[int], session: EngineSession, request: engine_pb2.GenerateRequest) -> None:
    with session.generate(request) as stream:
        async for events in stream:
            received += [token_id for event in events for token_id in event.token_ids]


async def test_a_session_learns_what_its_engine_serves() -> None:
    info = fake_model_info("m", vocab_size=300, max_model_len=99, eos_token_ids=(0, 7), num_blocks=12)
    async with FakeEngine(info) as engine, connected(engine.address) as (session, _):
        state = session.state
        assert state.model is not None
        assert (state.model.name, state.model.vocab_size, state.model.max_model_len) == ("m", 300, 99)
        assert state.model.eos_token_ids == (0, 7)
        assert (state.load.num_free_blocks, state.load.num_blocks) == (12, 12)
        assert state.is_ready
        assert not state.is_draining


async def test_many_requests_share_one_session_and_each_gets_its_own_tokens() -> None:
    async with FakeEngine() as engine, connected(engine.address) as (session, _):
        requests = [generate_request(f"r{n}", max_tokens=30, prompt_token_ids=[n]) for n in range(50)]
        outputs = await asyncio.gather(*(read_all(session, request) for request in requests))
        for request, output in zip(requests, outputs, strict=True):
            assert output == [hash_token(request, 0, index, 512) for index in range(30)]
        assert engine.num_running == 0
        assert engine.aborted_ids == []


async def test_leaving_a_stream_early_aborts_the_request_on_the_engine() -> None:
    async with FakeEngine() as engine, connected(engine.address) as (session, _):
        with session.generate(generate_request(max_tokens=10**6)) as stream:
            await anext(stream)
            assert engine.num_running == 1
        await engine.wait_for(lambda: engine.num_running == 0)
        assert engine.aborted_ids == ["r"]


async def test_a_lost_engine_fails_its_requests_as_retryable_and_the_session_comes_back() -> None:
    async with FakeEngine() as engine, connected(engine.address) as (session, changes):
        with session.generate(generate_request(max_tokens=10**6)) as stream:
            await anext(stream)
            await engine.stop()
            with pytest.raises(RempartError) as caught:
                async for _ in stream:
                    pass
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        assert caught.value.answer.is_retryable
        assert not (await changes.wait_for(lambda state: not state.is_ready)).is_ready
        with pytest.raises(RempartError) as caught:
            session.generate(generate_request())
        assert caught.value.kind is ErrorKind.UNAVAILABLE

        await engine.start(engine.address)
        await changes.wait_for(lambda state: state.is_ready)
        assert len(await read_all(session, generate_request("again"))) == 8


async def test_a_session_waits_for_an_engine_that_is_not_there_yet() -> None:
    async with FakeEngine() as engine:
        address = engine.address
    changes = Changes()
    session = EngineSession(address, FAST, random.Random(0), changes)
    task = asyncio.create_task(session.run())
    late_engine = FakeEngine()
    await late_engine.start(address)
    await changes.wait_for(lambda state: state.is_ready)
    task.cancel()
    await asyncio.wait([task])
    await late_engine.stop()


async def test_a_drain_of_the_engine_is_told_at_once() -> None:
    async with FakeEngine() as engine, connected(engine.address) as (_, changes):
        engine.is_draining = True
        state = await changes.wait_for(lambda state: state.is_draining)
        assert state.is_ready


@pytest.mark.parametrize("faults", [Faults(skip_at=3), Faults(repeat_at=3)])
async def test_a_gap_or_repeat_in_the_stream_is_an_error_and_ends_the_request_there(faults: Faults) -> None:
    async with FakeEngine(faults=faults) as engine, connected(engine.address) as (session, _):
        request = generate_request(max_tokens=10**6)
        received: list[int] = []
        with pytest.raises(RempartError) as caught:
            await read_into(received, session, request)
        assert caught.value.kind is ErrorKind.INTERNAL
        assert received == [hash_token(request, 0, index, 512) for index in range(3)]
        await engine.wait_for(lambda: engine.aborted_ids == ["r"])


async def test_a_slow_consumer_is_ended_alone() -> None:
    config = SessionConfig(max_buffered_tokens=50)
    async with FakeEngine() as engine, connected(engine.address, config) as (session, _):
        with session.generate(generate_request("slow", max_tokens=10**6)) as slow:
            other = await read_all(session, generate_request("other", max_tokens=200))
            assert len(other) == 200
            await engine.wait_for(lambda: engine.aborted_ids == ["slow"])
            with pytest.raises(RempartError, match="too slowly"):
                await anext(slow)


async def test_a_deadline_ends_the_request_even_when_the_engine_forgets_it() -> None:
    async with FakeEngine(faults=Faults(hang_at=2)) as engine, connected(engine.address) as (session, _):
        with pytest.raises(RempartError) as caught:
            await read_all(session, generate_request(timeout_s=0.05))
        assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED


async def test_in_flight_counts_return_to_zero_by_any_way_out() -> None:
    session = EngineSession("127.0.0.1:1", FAST, random.Random(0), lambda state: None)
    with session.in_flight(100), suppress(KeyError), session.in_flight(20):
        assert (session.state.num_in_flight, session.state.num_in_flight_tokens) == (2, 120)
        raise KeyError
    assert (session.state.num_in_flight, session.state.num_in_flight_tokens) == (0, 0)


def test_backoff_grows_to_its_bound_and_is_spread() -> None:
    config, rng = SessionConfig(backoff_initial_s=0.1, backoff_max_s=5.0), random.Random(0)
    for attempt, full in [(0, 0.1), (1, 0.2), (5, 3.2), (6, 5.0), (10**6, 5.0)]:
        waits = [backoff_s(attempt, config, rng) for _ in range(100)]
        assert full / 2 <= min(waits) < max(waits) <= full


class Attempts(random.Random):
    """Jitters, and says how often a session was tried again."""

    def __init__(self) -> None:
        super().__init__(0)
        self._num_left = 0
        self._done = asyncio.Event()

    def uniform(self, a: float, b: float) -> float:
        self._num_left -= 1
        if self._num_left == 0:
            self._done.set()
        return super().uniform(a, b)

    async def wait_for(self, number: int) -> None:
        self._num_left = number
        self._done.clear()
        async with asyncio.timeout(30):
            await self._done.wait()


async def test_an_engine_that_stays_away_is_logged_once_and_its_coming_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rempart_platform.endpoints.session")
    attempts, changes = Attempts(), Changes()
    async with FakeEngine() as engine:
        await engine.stop()
        task = asyncio.create_task(EngineSession(engine.address, FAST, attempts, changes).run())
        try:
            await attempts.wait_for(5)
            assert [record.getMessage() for record in caplog.records] == ["engine is not ready"]
            await engine.start(engine.address)
            await changes.wait_for(lambda state: state.is_ready)
            assert caplog.records[-1].getMessage() == "engine is ready"
            await engine.stop()
            await changes.wait_for(lambda state: not state.is_ready)
            await attempts.wait_for(1)
            assert caplog.records[-1].getMessage() == "engine is not ready"
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
