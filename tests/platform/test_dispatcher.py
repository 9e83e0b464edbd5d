import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace

import pytest
from prometheus_client import CollectorRegistry

from rempart_platform.dispatcher import DispatchConfig, Dispatcher, cache_salt
from rempart_platform.endpoints.pick import PickConfig, PickRequest
from rempart_platform.endpoints.pool import EnginePool
from rempart_platform.endpoints.session import SessionConfig
from rempart_platform.endpoints.static import StaticSource
from rempart_platform.endpoints.testing import FakeEngine, Faults, fake_model_info, hash_token
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import (
    Caller,
    Delta,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Standing,
    Usage,
)
from rempart_platform.metrics import RouterMetrics
from rempart_platform.models import ModelCatalog
from rempart_platform.testing import RecordingLedger, byte_token_ids, fake_served_model
from rempart_protos.v1 import engine_pb2, sampling_pb2

EVERYTHING = 10**6
FAST = SessionConfig(backoff_initial_s=0.01)
PATIENT = PickConfig(failures_to_leave_out=3, left_out_s=3600.0)


@dataclass(frozen=True)
class Rig:
    engines: Sequence[FakeEngine]
    pool: EnginePool
    ledger: RecordingLedger
    dispatcher: Dispatcher
    registry: CollectorRegistry

    async def run(self, request: GenerationRequest) -> list[GenerationEvent]:
        async with self.dispatcher.admit(request) as generation:
            return [event async for event in generation.events()]

    async def failure(
        self,
        request: GenerationRequest,
        received: list[GenerationEvent],
        on_event: Callable[[], Awaitable[None]] | None = None,
    ) -> RempartError:
        """The error that ends a request; `received` gets what came before."""
        try:
            async with self.dispatcher.admit(request) as generation:
                async for event in generation.events():
                    received.append(event)
                    if on_event is not None:
                        await on_event()
        except RempartError as error:
            return error
        raise AssertionError("the request did not fail")

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"rempart_router_{name}", labels) or 0.0

    async def assert_nothing_is_left(self) -> None:
        for engine in self.engines:
            await engine.wait_for(lambda engine=engine: engine.num_running == 0)  # type: ignore[misc]
        assert self.ledger.open == {}
        assert [state.num_in_flight for state in self.pool.states()] == [0] * len(self.engines)
        assert [state.num_in_flight_tokens for state in self.pool.states()] == [0] * len(self.engines)
        assert self.metric("requests_in_flight", model="fake") == 0


@asynccontextmanager
async def rig(*engines: FakeEngine, max_open: int | None = None, session: SessionConfig = FAST) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine)
        ready: set[str] = set()
        all_ready = asyncio.Event()

        def on_change(state: object) -> None:
            ready.update(other.address for other in pool.states() if other.is_ready)
            if len(ready) == len(engines):
                all_ready.set()

        source = StaticSource(engine.address for engine in engines)
        pool = EnginePool(source, session, random.Random(1), on_change, picking=PATIENT)
        task = asyncio.create_task(pool.run())
        await asyncio.wait_for(all_ready.wait(), 30)
        ledger, registry = RecordingLedger(max_open), CollectorRegistry()
        dispatcher = Dispatcher(
            ledger=ledger,
            pool=pool,
            catalog=ModelCatalog([fake_served_model()]),
            config=DispatchConfig(cache_secret=b"secret"),
            metrics=RouterMetrics(registry),
        )
        try:
            yield Rig(engines, pool, ledger, dispatcher, registry)
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def request(request_id: str = "r", max_tokens: int = 20, **changes: object) -> GenerationRequest:
    sampling = sampling_pb2.SamplingParams(max_tokens=max_tokens, seed=3)
    base = GenerationRequest(request_id, Caller("acme", "key"), "fake", (5, 6, 7), sampling)
    return replace(base, **changes)  # type: ignore[arg-type]  # the tests name fields of the dataclass


def sampling(**fields: object) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(**{"max_tokens": 20, "seed": 3, **fields})  # type: ignore[arg-type]


def writer(*texts: str) -> Callable[[engine_pb2.GenerateRequest, int, int], int]:
    """A model that writes one text per choice, a byte a token, then the end token for ever."""
    ids = [byte_token_ids(text) for text in texts]

    def token(request: engine_pb2.GenerateRequest, choice: int, index: int) -> int:
        return ids[choice][index] if index < len(ids[choice]) else 0

    return token


def text_of(events: Sequence[GenerationEvent], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.choice == choice)


def token_ids_of(events: Sequence[GenerationEvent], choice: int = 0) -> list[int]:
    deltas = [event for event in events if isinstance(event, Delta) and event.choice == choice]
    return [token_id for delta in deltas for token_id in delta.token_ids]


async def test_a_request_runs_to_its_end_and_is_charged_what_was_delivered() -> None:
    async with rig(FakeEngine()) as r:
        events = await r.run(request())
        expected = [hash_token(r.engines[0].started[0], 0, index, 512) for index in range(20)]
        assert token_ids_of(events) == expected
        assert events[-2:] == [Finished(0, FinishReason.LENGTH), Usage(3, 20)]
        assert r.ledger.usages == {"r": Usage(3, 20)}
        await r.assert_nothing_is_left()
        assert r.metric("requests_total", model="fake", tenant="acme", outcome="ok") == 1
        assert r.metric("completion_tokens_total", model="fake", tenant="acme") == 20
        assert r.metric("time_to_first_token_seconds_count", model="fake") == 1
        assert r.metric("time_per_output_token_seconds_count", model="fake") == 1


async def test_the_end_token_is_charged_and_not_shown() -> None:
    async with rig(FakeEngine(token=writer("hello"))) as r:
        events = await r.run(request())
        assert text_of(events) == "hello"
        assert token_ids_of(events) == [*byte_token_ids("hello"), 0]
        assert events[-2:] == [Finished(0, FinishReason.STOP), Usage(3, 6)]


async def test_the_settlement_comes_before_the_usage() -> None:
    async with rig(FakeEngine()) as r, r.dispatcher.admit(request()) as generation:
        async for event in generation.events():
            assert (r.ledger.open == {}) is isinstance(event, Usage)


async def test_a_stop_string_across_tokens_ends_the_choice_and_aborts_the_rest() -> None:
    async with rig(FakeEngine(token=writer("one two three" * 1000))) as r:
        events = await r.run(request(stop=("o t",), max_tokens=EVERYTHING))
        assert text_of(events) == "one tw"
        assert events[-2:] == [Finished(0, FinishReason.STOP), Usage(3, 9)]
        await r.engines[0].wait_for(lambda: r.engines[0].aborted_ids == ["r"])
        await r.assert_nothing_is_left()


async def test_choices_end_each_in_its_own_way() -> None:
    async with rig(FakeEngine(token=writer("ab stop" + "x" * EVERYTHING, "cde"))) as r:
        events = await r.run(request(sampling=sampling(n=2, max_tokens=12), stop=("stop",)))
        assert [text_of(events, choice) for choice in (0, 1)] == ["ab ", "cde"]
        assert {event for event in events if isinstance(event, Finished)} == {
            Finished(0, FinishReason.STOP),
            Finished(1, FinishReason.STOP),
        }
        assert events[-1] == Usage(3, 7 + 4)
        await r.assert_nothing_is_left()


async def test_two_choices_draw_differently_and_both_reach_their_length() -> None:
    async with rig(FakeEngine()) as r:
        events = await r.run(request(sampling=sampling(n=2)))
        assert token_ids_of(events, 0) != token_ids_of(events, 1)
        assert len(token_ids_of(events, 0)) == len(token_ids_of(events, 1)) == 20
        assert events[-1] == Usage(3, 40)


async def test_log_probabilities_come_with_their_tokens() -> None:
    async with rig(FakeEngine(token=writer("héllo"))) as r:
        events = await r.run(request(sampling=sampling(logprobs=2)))
        deltas = [event for event in events if isinstance(event, Delta)]
        assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
        entries = [entry for delta in deltas for entry in delta.logprobs]
        assert b"".join(entry.token_bytes for entry in entries[:-1]) == "héllo".encode()
        assert all(entry.logprob == -0.5 and len(entry.top) == 2 for entry in entries)


async def test_deltas_that_wait_for_a_slow_client_are_handed_on_as_one() -> None:
    async with rig(FakeEngine()) as r, r.dispatcher.admit(request(max_tokens=200)) as generation:
        events = generation.events()
        first = await anext(events)
        while r.pool.states()[0].load.num_running:  # noqa: ASYNC110 - it is told with the last token
            await asyncio.sleep(0.01)
        second = await anext(events)
        assert isinstance(first, Delta)
        assert isinstance(second, Delta)
        assert len(first.token_ids) + len(second.token_ids) == 200


async def test_a_mistake_in_our_metrics_keeps_no_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError("a mistake")

    monkeypatch.setattr(RouterMetrics, "request_left", fail)
    async with rig(FakeEngine()) as r:
        with pytest.raises(ArithmeticError):
            async with r.dispatcher.admit(request()) as generation:
                await anext(generation.events())
        assert r.ledger.open == {}


async def test_a_slow_client_is_ended_alone() -> None:
    async with rig(FakeEngine(), session=SessionConfig(max_buffered_tokens=50)) as r:
        async with AsyncExitStack() as stack:
            slow = await stack.enter_async_context(r.dispatcher.admit(request("slow", max_tokens=EVERYTHING)))
            slow_events = slow.events()
            first = await anext(slow_events)
            assert isinstance(first, Delta)
            assert len(token_ids_of(await r.run(request("other", max_tokens=200)))) == 200
            with pytest.raises(RempartError, match="too slowly"):
                await anext(slow_events)
        assert r.ledger.usages["slow"].completion_tokens == len(first.token_ids)
        assert r.ledger.usages["other"] == Usage(3, 200)
        await r.assert_nothing_is_left()


async def test_two_hundred_clients_that_leave_in_mid_stream_leave_nothing_behind() -> None:
    rng = random.Random(2)
    delivered: dict[str, int] = {}

    async def client(r: Rig, request_id: str) -> None:
        delivered[request_id] = 0
        patience, way = rng.randrange(0, 30), rng.choice(("leave", "cancel", "raise"))
        with suppress(ConnectionResetError):
            async with r.dispatcher.admit(request(request_id, max_tokens=EVERYTHING)) as generation:
                async for event in generation.events():
                    assert isinstance(event, Delta)
                    delivered[request_id] += len(event.token_ids)
                    if delivered[request_id] < patience:
                        continue
                    if way == "leave":
                        break
                    if way == "raise":
                        raise ConnectionResetError
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()

    async with rig(FakeEngine(), FakeEngine()) as r:
        results = await asyncio.gather(*(client(r, f"r{n}") for n in range(200)), return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        await r.assert_nothing_is_left()
        assert {key: usage.completion_tokens for key, usage in r.ledger.usages.items()} == delivered
        assert all(usage.prompt_tokens == 3 for usage in r.ledger.usages.values())
        assert sum(len(engine.aborted_ids) for engine in r.engines) == 200
        gone = r.metric("requests_total", model="fake", tenant="acme", outcome="client_closed_request")
        assert gone == 200


async def test_a_client_that_leaves_while_the_engine_is_silent_is_not_charged() -> None:
    async with rig(FakeEngine(faults=Faults(hang_at=0))) as r:
        task = asyncio.create_task(r.run(request()))
        await r.engines[0].wait_for(lambda: r.engines[0].num_running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert r.ledger.usages == {"r": Usage(0, 0)}
        await r.assert_nothing_is_left()


async def test_a_client_that_never_reads_is_not_charged() -> None:
    async with rig(FakeEngine()) as r:
        async with r.dispatcher.admit(request()) as generation:
            assert generation.headers == {"x-ratelimit-limit-requests": "1"}
        assert r.ledger.usages == {"r": Usage(0, 0)}
        assert r.engines[0].started == []


async def test_an_engine_lost_in_mid_stream_is_a_retryable_error_and_what_came_is_charged() -> None:
    async with rig(FakeEngine(faults=Faults(hang_at=10))) as r:
        received: list[GenerationEvent] = []
        error = await r.failure(request(), received, on_event=r.engines[0].stop)
        assert error.kind is ErrorKind.UNAVAILABLE
        assert error.answer.is_retryable
        num_delivered = len(token_ids_of(received))
        assert 0 < num_delivered <= 10
        assert r.ledger.usages == {"r": Usage(3, num_delivered)}
        assert r.metric("engine_errors_total", model="fake", code="service_unavailable") == 1
        await r.assert_nothing_is_left()


@pytest.mark.parametrize(
    "faults",
    [
        Faults(die_at=0),
        Faults(refuse=engine_pb2.EngineError.CODE_RESOURCE_EXHAUSTED),
        Faults(refuse=engine_pb2.EngineError.CODE_UNAVAILABLE),
    ],
)
async def test_an_engine_that_cannot_begin_is_replaced_without_the_client_noticing(faults: Faults) -> None:
    async with rig(FakeEngine(faults=faults), FakeEngine(fake_model_info(num_blocks=8))) as r:
        # The second engine is small and looks busy, so the first is picked first.
        with r.pool.pick(PickRequest("fake", (5,) * 100), avoid=[r.engines[0].address]):
            events = await r.run(request())
        assert [engine.started[0].request_id for engine in r.engines] == ["r", "r.1"]
        assert len(token_ids_of(events)) == 20
        assert r.ledger.usages == {"r": Usage(3, 20)}
        assert r.metric("dispatch_retries_total", model="fake") == 1
        await r.assert_nothing_is_left()


async def test_attempts_are_bounded() -> None:
    refuse = Faults(refuse=engine_pb2.EngineError.CODE_UNAVAILABLE)
    async with rig(*(FakeEngine(faults=refuse) for _ in range(4))) as r:
        error = await r.failure(request(), [])
        assert error.kind is ErrorKind.UNAVAILABLE
        assert error.retry_after_s is not None
        assert sum(len(engine.started) for engine in r.engines) == 2
        assert r.ledger.refunded_ids == ["r"]
        assert r.ledger.usages == {}


async def test_engines_that_refuse_everything_are_left_alone_and_requests_fail_at_once() -> None:
    refuse = Faults(refuse=engine_pb2.EngineError.CODE_UNAVAILABLE)
    async with rig(FakeEngine(faults=refuse), FakeEngine(faults=refuse)) as r:
        errors = [await r.failure(request(f"r{number}"), []) for number in range(10)]
        assert {error.kind for error in errors} == {ErrorKind.UNAVAILABLE}
        assert all(error.retry_after_s is not None for error in errors)
        assert [len(engine.started) for engine in r.engines] == [3, 3]
        await r.assert_nothing_is_left()


async def test_a_request_that_the_engine_refuses_is_not_tried_again() -> None:
    refuse = Faults(refuse=engine_pb2.EngineError.CODE_INVALID_ARGUMENT)
    async with rig(FakeEngine(faults=refuse), FakeEngine(faults=refuse)) as r:
        assert (await r.failure(request(), [])).kind is ErrorKind.INVALID_REQUEST
        assert sum(len(engine.started) for engine in r.engines) == 1
        assert r.ledger.usages == {"r": Usage(0, 0)}


async def test_a_failure_in_the_engine_is_the_requests_own() -> None:
    async with rig(FakeEngine(faults=Faults(fail_at=5))) as r:
        received: list[GenerationEvent] = []
        assert (await r.failure(request(), received)).kind is ErrorKind.INTERNAL
        assert len(token_ids_of(received)) <= 5
        await r.assert_nothing_is_left()


async def test_a_deadline_ends_the_request_with_what_came_charged() -> None:
    async with rig(FakeEngine(faults=Faults(hang_at=10))) as r:
        received: list[GenerationEvent] = []
        error = await r.failure(request(timeout_s=2.0), received)
        assert error.kind is ErrorKind.DEADLINE_EXCEEDED
        assert r.ledger.usages["r"].completion_tokens == len(token_ids_of(received)) > 0
        await r.assert_nothing_is_left()


async def test_without_a_ready_endpoint_nothing_is_reserved() -> None:
    async with rig(FakeEngine()) as r:
        error = await r.failure(request(model="other"), [])
        assert error.kind is ErrorKind.UNAVAILABLE
        assert error.retry_after_s == 2.0
        assert r.ledger.usages == {}
        assert r.ledger.refunded_ids == []
        assert r.metric("rejections_total", model="other", reason="service_unavailable") == 1


async def test_a_full_quota_refuses_and_is_counted_by_reason() -> None:
    async with rig(FakeEngine(), max_open=1) as r, r.dispatcher.admit(request("first")):
        error = await r.failure(request("second"), [])
        assert error.kind is ErrorKind.RATE_LIMIT_EXCEEDED
        assert error.retry_after_s == 1.0
        assert r.metric("rejections_total", model="fake", reason="concurrency") == 1


async def test_equal_engines_share_the_requests() -> None:
    async with rig(FakeEngine(), FakeEngine()) as r:
        await asyncio.gather(*(r.run(request(f"r{n}")) for n in range(40)))
        assert [len(engine.started) for engine in r.engines] == [20, 20]


async def test_the_engine_gets_a_salt_of_the_tenant_and_its_key() -> None:
    salts = {
        cache_salt(secret, Caller(tenant, "key"), key)
        for secret in (b"1", b"2")
        for tenant, key in (("a", ""), ("a", "k"), ("b", ""), ("ak", ""))
    }
    assert len(salts) == 8
    async with rig(FakeEngine()) as r:
        await r.run(request(prompt_cache_key="k"))
        started = r.engines[0].started[0]
        assert started.cache_salt == cache_salt(b"secret", Caller("acme", "key"), "k")
        assert len(started.cache_salt) == 32
        assert 500 < started.timeout_s <= 600


def test_tenants_of_a_cache_group_have_its_salt_and_no_other_has() -> None:
    def salt(tenant: str, group: str = "", key: str = "") -> bytes:
        return cache_salt(b"secret", Caller(tenant, "key", Standing(cache_group=group)), key)

    assert salt("a", "g") == salt("b", "g")
    assert salt("a", "g", "k") == salt("b", "g", "k")
    apart = [
        salt("a", "g"),
        salt("a", "g", "k"),
        salt("a", "h"),
        salt("a"),
        salt("g"),
        salt("group"),
        salt("group", "", "g"),
    ]
    assert len(set(apart)) == len(apart)


async def test_the_log_line_has_counts_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rempart_platform.request_log")
    async with rig(FakeEngine(token=writer("canary"))) as r:
        await r.run(request(stop=("stopcanary",), user="label", client_request_id="theirs"))
        (record,) = caplog.records
        fields = record.__dict__
        assert fields["request_id"] == "r"
        assert fields["tenant"] == "acme"
        assert (fields["client_request_id"], fields["service_tier"]) == ("theirs", "default")
        assert fields["outcome"] == "ok"
        assert fields["completion_tokens"] == 7
        assert fields["endpoints"] == [r.engines[0].address]
        assert fields["ttft_s"] <= fields["e2e_s"]
        assert "canary" not in str(record.__dict__)
