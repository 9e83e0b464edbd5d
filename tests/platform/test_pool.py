"""The choice among real sessions to fake engines: prefixes, breakers, and what both forget."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import grpc
import grpc.aio
import pytest

from rempart_platform.endpoints.load import EndpointState
from rempart_platform.endpoints.pick import PickConfig, PickRequest
from rempart_platform.endpoints.pool import EnginePool
from rempart_platform.endpoints.session import SessionConfig
from rempart_platform.endpoints.source import EndpointSet, EndpointSource
from rempart_platform.endpoints.static import StaticSource
from rempart_platform.endpoints.testing import FakeEngine, Faults
from rempart_platform.errors import ErrorKind, RempartError
from rempart_protos.v1 import engine_pb2, sampling_pb2

DEFAULT = PickConfig()
UNAVAILABLE = RempartError(ErrorKind.UNAVAILABLE, "No.")


class Rig:
    """A pool whose clock stands still until it is told."""

    def __init__(self, engines: tuple[FakeEngine, ...], picking: PickConfig, source: EndpointSource | None) -> None:
        self.engines = engines
        self.now_s = 100.0
        self._changed = asyncio.Event()
        source = source or StaticSource(engine.address for engine in engines)
        session = SessionConfig(backoff_initial_s=0.01, backoff_max_s=0.05)
        self.pool = EnginePool(
            source, session, random.Random(1), self._change, picking=picking, clock=lambda: self.now_s
        )
        self._num_requests = 0

    async def wait_for(self, predicate: Callable[[tuple[EndpointState, ...]], bool]) -> None:
        async with asyncio.timeout(30):
            while not predicate(self.pool.states()):
                self._changed.clear()
                await self._changed.wait()

    async def run(self, prompt: tuple[int, ...], salt: bytes = b"acme") -> tuple[str, int]:
        """Runs a request: where, and how much of its prompt was expected to be cached there."""
        self._num_requests += 1
        with self.pool.pick(PickRequest("fake", prompt, salt, max_output_tokens=3)) as attempt:
            request = engine_pb2.GenerateRequest(
                request_id=f"r{self._num_requests}",
                prompt_token_ids=prompt,
                sampling=sampling_pb2.SamplingParams(max_tokens=3, seed=1),
                cache_salt=salt,
            )
            with attempt.generate(request) as stream:
                async for _ in stream:
                    attempt.began()
        return attempt.address, attempt.expected_cached_tokens

    def fail(self, address: str, error: Exception = UNAVAILABLE, *, begins: bool = False) -> None:
        """Has an attempt at this endpoint end by an error."""
        others = [state.address for state in self.pool.states() if state.address != address]
        with suppress(type(error)), self.pool.pick(PickRequest("fake"), avoid=others) as attempt:
            if begins:
                attempt.began()
            raise error

    def left_out(self) -> list[bool]:
        """Of each engine, in their order."""
        states = {state.address: state.is_left_out for state in self.pool.states()}
        return [states[engine.address] for engine in self.engines]

    def _change(self, state: EndpointState) -> None:
        self._changed.set()


@asynccontextmanager
async def rig(
    num_engines: int, picking: PickConfig = DEFAULT, source: EndpointSource | None = None
) -> AsyncIterator[Rig]:
    """Waits for all engines, unless a source is yet to tell them."""
    async with AsyncExitStack() as stack:
        engines = tuple([await stack.enter_async_context(FakeEngine()) for _ in range(num_engines)])
        built = Rig(engines, picking, source)
        running = asyncio.create_task(built.pool.run())
        try:
            if source is None:
                await built.wait_for(lambda states: [state.is_ready for state in states] == [True] * num_engines)
            yield built
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


def stream_request(max_tokens: int) -> engine_pb2.GenerateRequest:
    sampling = sampling_pb2.SamplingParams(max_tokens=max_tokens, seed=1)
    return engine_pb2.GenerateRequest(request_id="stream", prompt_token_ids=(1, 2, 3), sampling=sampling)


def words(seed: int, count: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1, 500) for _ in range(count))


async def test_a_conversation_returns_to_its_engine_while_new_ones_spread() -> None:
    async with rig(2) as r:
        conversations = {number: words(number, 150) for number in range(60)}
        homes = {number: (await r.run(prompt))[0] for number, prompt in conversations.items()}
        assert all(20 <= count <= 40 for count in Counter(homes.values()).values())
        assert len(set(homes.values())) == 2
        for turn in range(1, 4):
            for number in conversations:
                expected = len(conversations[number]) // 64 * 64
                conversations[number] += words(1000 * turn + number, 100)
                assert await r.run(conversations[number]) == (homes[number], expected)
        for engine in r.engines:
            prompts = [tuple(started.prompt_token_ids[:150]) for started in engine.started]
            assert set(Counter(prompts).values()) == {4}


async def test_the_same_prompt_of_another_tenant_is_expected_nowhere() -> None:
    async with rig(2) as r:
        prompt = words(0, 1000)
        home, _ = await r.run(prompt)
        assert {await r.run(prompt) for _ in range(10)} == {(home, 960)}
        others = [await r.run(prompt, b"tenant %d" % number) for number in range(20)]
        assert {expected for _, expected in others} == {0}
        assert len({address for address, _ in others}) == 2


async def test_the_last_token_is_never_expected_to_be_cached() -> None:
    async with rig(1) as r:
        prompt = words(0, 128)
        assert [(await r.run(prompt))[1] for _ in range(2)] == [0, 64]
        assert (await r.run((*prompt, 7)))[1] == 128


async def test_a_hot_engine_sheds_what_it_has_and_gets_it_back_when_it_is_cool() -> None:
    async with rig(2) as r:
        prompt = words(0, 1000)
        home, _ = await r.run(prompt)
        other = next(engine.address for engine in r.engines if engine.address != home)
        with r.pool.pick(PickRequest("fake", words(1, 500)), avoid=[other]):
            assert await r.run(prompt) == (home, 960)
            with r.pool.pick(PickRequest("fake", words(2, 500)), avoid=[other]):
                assert await r.run(prompt) == (other, 0)
        assert r.pool.states()[0].num_in_flight_tokens == 0


async def test_in_flight_counts_what_is_to_compute_and_a_bounded_output() -> None:
    async with rig(1, PickConfig(max_counted_output_tokens=10)) as r:
        asked = PickRequest("fake", words(0, 129), max_output_tokens=100_000, num_choices=2)
        for expected in (149, 21):
            with r.pool.pick(asked):
                (state,) = r.pool.states()
                assert (state.num_in_flight, state.num_in_flight_tokens) == (1, expected)


async def test_no_prefix_is_remembered_where_none_may_be() -> None:
    async with rig(1, PickConfig(max_prefixes=0)) as r:
        assert [(await r.run(words(0, 200)))[1] for _ in range(2)] == [0, 0]


async def test_an_engine_that_comes_back_has_nothing_cached() -> None:
    async with rig(1) as r:
        (engine,) = r.engines
        assert [(await r.run(words(0, 200)))[1] for _ in range(2)] == [0, 192]
        await engine.stop()
        await r.wait_for(lambda states: not states[0].is_ready)
        await engine.start(engine.address)
        await r.wait_for(lambda states: states[0].is_ready)
        assert [(await r.run(words(0, 200)))[1] for _ in range(2)] == [0, 192]


async def test_an_engine_that_fails_again_and_again_is_left_out_until_a_probe_succeeds() -> None:
    async with rig(2, PickConfig(failures_to_leave_out=3, left_out_s=2.0)) as r:
        bad, good = (engine.address for engine in r.engines)
        for _ in range(2):
            r.fail(bad)
        assert r.left_out() == [False, False]
        r.fail(bad)
        assert r.left_out() == [True, False]
        assert not r.pool.can_serve("fake", avoid=[good])
        assert r.pool.is_served("fake")
        assert {(await r.run(words(seed, 10)))[0] for seed in range(20)} == {good}

        r.now_s += 2.0
        assert r.pool.can_serve("fake", avoid=[good])
        r.fail(bad)  # the probe
        assert r.left_out() == [True, False]

        r.now_s += 2.0
        with r.pool.pick(PickRequest("fake"), avoid=[good]) as probe:
            assert r.left_out() == [True, False]  # for all others
            probe.began()
            assert r.left_out() == [False, False]
        assert {(await r.run(words(seed, 10)))[0] for seed in range(20)} == {bad, good}


async def test_one_success_among_failures_keeps_an_engine() -> None:
    async with rig(1, PickConfig(failures_to_leave_out=2)) as r:
        (engine,) = r.engines
        for _ in range(5):
            r.fail(engine.address)
            await r.run((1, 2, 3))
        assert r.left_out() == [False]


@pytest.mark.parametrize(
    ("error", "begins"),
    [
        (UNAVAILABLE, True),  # the engine was lost in mid stream: its session tells
        (RempartError(ErrorKind.INVALID_REQUEST, ""), False),
        (RempartError(ErrorKind.DEADLINE_EXCEEDED, ""), False),
        (ConnectionResetError(), False),
    ],
)
async def test_an_end_that_is_not_the_engines_refusal_counts_nothing(error: Exception, begins: bool) -> None:
    async with rig(1, PickConfig(failures_to_leave_out=1)) as r:
        r.fail(r.engines[0].address, error, begins=begins)
        assert r.left_out() == [False]


async def test_refusals_of_a_real_session_open_the_breaker_and_say_when_to_come_again() -> None:
    async with rig(1, PickConfig(failures_to_leave_out=2)) as r:
        (engine,) = r.engines
        engine.faults = Faults(refuse=engine_pb2.EngineError.CODE_UNAVAILABLE)
        for _ in range(3):
            with pytest.raises(RempartError) as caught:
                await r.run((1, 2, 3))
            assert caught.value.kind is ErrorKind.UNAVAILABLE
            assert caught.value.retry_after_s is not None
        assert len(engine.started) == 2


class ToldSource:
    """Tells the sets that a test gives it."""

    has_synced = True

    def __init__(self) -> None:
        self._sets: asyncio.Queue[EndpointSet] = asyncio.Queue()

    def tell(self, serving: Iterable[FakeEngine], terminating: Iterable[FakeEngine] = ()) -> None:
        self._sets.put_nowait(EndpointSet(addresses_of(serving), addresses_of(terminating)))

    async def run(self, tell: Callable[[EndpointSet], None]) -> None:
        while True:
            tell(await self._sets.get())


def addresses_of(engines: Iterable[FakeEngine]) -> frozenset[str]:
    return frozenset(engine.address for engine in engines)


def ready(states: tuple[EndpointState, ...]) -> frozenset[str]:
    return frozenset(state.address for state in states if state.is_ready and not state.is_draining)


async def test_a_new_endpoint_is_used_and_one_that_is_gone_is_closed() -> None:
    source = ToldSource()
    async with rig(2, source=source) as r:
        one, two = r.engines
        assert r.pool.states() == ()
        source.tell([one])
        await r.wait_for(lambda states: ready(states) == {one.address})
        assert {(await r.run(words(seed, 10)))[0] for seed in range(5)} == {one.address}
        source.tell([one, two])
        await r.wait_for(lambda states: ready(states) == {one.address, two.address})
        source.tell([two])
        await r.wait_for(lambda states: [state.address for state in states] == [two.address])
        assert {(await r.run(words(seed, 10)))[0] for seed in range(5)} == {two.address}
        await one.wait_for(lambda: one.num_sessions == 0)
        source.tell([])
        await r.wait_for(lambda states: states == ())
        assert not r.pool.can_serve("fake")


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "terminating"])
async def test_streams_of_an_endpoint_that_leaves_go_on_to_their_end(is_gone: bool) -> None:
    source = ToldSource()
    async with rig(2, source=source) as r:
        one, two = r.engines
        source.tell(r.engines)
        await r.wait_for(lambda states: len(ready(states)) == 2)
        with r.pool.pick(PickRequest("fake", words(0, 100)), avoid=[two.address]) as attempt:
            one.faults = Faults(hang_at=10)
            stream = attempt.generate(stream_request(max_tokens=300))
            with stream:
                received = list(await anext(events := aiter(stream)))
                source.tell([two], [] if is_gone else [one])
                await r.wait_for(lambda states: ready(states) == {two.address})
                assert {(await r.run(words(seed, 10)))[0] for seed in range(5)} == {two.address}
                assert one.num_running == 1
                one.faults = Faults()
                received += [event async for batch in events for event in batch]
            assert len(received) == 300
            assert len(r.pool.states()) == 2
        assert len(r.pool.states()) == (1 if is_gone else 2)
        source.tell([two])
        await r.wait_for(lambda states: len(states) == 1)
        await one.wait_for(lambda: one.num_sessions == 0)
        assert one.aborted_ids == []


async def test_an_endpoint_that_comes_back_while_it_drains_is_used_again() -> None:
    source = ToldSource()
    async with rig(1, source=source) as r:
        (one,) = r.engines
        source.tell([one])
        await r.wait_for(lambda states: len(ready(states)) == 1)
        with r.pool.pick(PickRequest("fake")):
            source.tell([])
            await r.wait_for(lambda states: ready(states) == frozenset())
            source.tell([one])
            await r.wait_for(lambda states: len(ready(states)) == 1)
            assert (await r.run((1, 2, 3)))[0] == one.address
        assert len(ready(r.pool.states())) == 1
        assert len(one.started) == 1


async def test_one_that_was_terminating_from_the_start_is_not_connected_to() -> None:
    source = ToldSource()
    async with rig(2, source=source) as r:
        one, two = r.engines
        source.tell([two], [one])
        await r.wait_for(lambda states: ready(states) == {two.address})
        assert len(r.pool.states()) == 1
        assert one.num_sessions == 0


class ShyEngine(FakeEngine):
    """Says what it serves once as many are asked as may be at a time."""

    def __init__(self, asked: asyncio.Barrier, numbers: list[int]) -> None:
        super().__init__()
        self._asked = asked
        self._numbers = numbers

    async def GetModelInfo(  # noqa: N802 - the service's name
        self,
        request: engine_pb2.GetModelInfoRequest,
        context: grpc.aio.ServicerContext[engine_pb2.GetModelInfoRequest, engine_pb2.ModelInfo],
    ) -> engine_pb2.ModelInfo:
        self._numbers.append(self._numbers[-1] + 1)
        await self._asked.wait()
        self._numbers.append(self._numbers[-1] - 1)
        return await super().GetModelInfo(request, context)


async def test_no_more_engines_are_connected_to_at_a_time_than_allowed() -> None:
    asked, numbers = asyncio.Barrier(3), [0]
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(ShyEngine(asked, numbers)) for _ in range(12)]
        changed = asyncio.Event()
        source = StaticSource(engine.address for engine in engines)
        pool = EnginePool(source, SessionConfig(max_connecting=3), random.Random(1), lambda _: changed.set())
        running = asyncio.create_task(pool.run())
        async with asyncio.timeout(30):
            while len(ready(pool.states())) < len(engines):
                changed.clear()
                await changed.wait()
        running.cancel()
        await asyncio.wait([running])
    assert (max(numbers), numbers[-1]) == (3, 0)
