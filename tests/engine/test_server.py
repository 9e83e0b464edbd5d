"""The gRPC surface over a real engine process with a fake model."""

from __future__ import annotations

import asyncio
import random
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rempart_engine.testing import EngineUnderTest, FakeModel, fake_output
from rempart_protos.v1 import engine_pb2, engine_pb2_grpc, sampling_pb2

if TYPE_CHECKING:  # exists in the stubs alone
    from rempart_protos.v1.engine_pb2_grpc import EngineAsyncStub as Stub

Error = engine_pb2.EngineError
LONG = 1500
"""Output tokens of a request that shall not end by itself within a test."""


class SessionClient:
    """A router's end of a session, with all that it heard."""

    def __init__(self, stub: Stub) -> None:
        self.call = stub.Session()
        self.updates: list[engine_pb2.SessionUpdate] = []
        self.token_ids: dict[tuple[str, int], list[int]] = {}
        self.last: dict[tuple[str, int], engine_pb2.TokenEvent] = {}

    async def start(self, request_id: str, prompt: Sequence[int], **sampling: Any) -> None:
        await self.call.write(engine_pb2.SessionCommand(start=generate_request(request_id, prompt, **sampling)))

    async def abort(self, request_id: str) -> None:
        await self.call.write(engine_pb2.SessionCommand(abort_request_id=request_id))

    async def read(self) -> engine_pb2.SessionUpdate:
        update = await self.call.read()
        assert isinstance(update, engine_pb2.SessionUpdate), "the session has ended"
        self.updates.append(update)
        for event in update.events:
            token_ids = self.token_ids.setdefault((event.request_id, event.choice), [])
            assert event.index == len(token_ids), "token indices are contiguous"
            token_ids += event.token_ids
            if event.finish_reason:
                assert (event.request_id, event.choice) not in self.last, "a choice ends once"
                self.last[event.request_id, event.choice] = event
        return update

    async def until_ended(self, *request_ids: str, choice: int = 0) -> None:
        while not all((request_id, choice) in self.last for request_id in request_ids):
            await self.read()

    async def until_first_token(self, request_id: str) -> None:
        while not self.token_ids.get((request_id, 0)):
            await self.read()


def generate_request(request_id: str, prompt: Sequence[int], **sampling: Any) -> engine_pb2.GenerateRequest:
    return engine_pb2.GenerateRequest(
        request_id=request_id, prompt_token_ids=prompt, sampling=sampling_pb2.SamplingParams(**sampling)
    )


async def read_event(call: Any) -> engine_pb2.TokenEvent:
    """The next event of a Generate call that has one."""
    event = await call.read()
    assert isinstance(event, engine_pb2.TokenEvent)
    return event


async def until_free(stub: Stub) -> engine_pb2.EngineLoad:
    """Wait until the engine runs nothing and holds no KV block."""
    async with asyncio.timeout(60):
        while True:
            load = await stub.GetLoad(engine_pb2.GetLoadRequest())
            if load.num_running == load.num_waiting == 0 and load.num_free_blocks == load.num_blocks:
                return load
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    model = FakeModel(step_s=0.002, failing_token_id=999)
    flags = ("--max-session-buffer-bytes", "20000", "--max-n", "4", "--load-interval-s", "0.1")
    with EngineUnderTest(model, tmp_path_factory.mktemp("engine"), *flags) as running:
        yield running
        assert "traceback" not in running.log_path.read_text()


@pytest.fixture
async def channel(engine: EngineUnderTest) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(engine.address) as opened:
        yield opened


@pytest.fixture
async def stub(channel: grpc.aio.Channel) -> AsyncIterator[Stub]:
    opened = engine_pb2_grpc.EngineStub(channel)
    yield opened
    await until_free(opened)


async def test_generate_streams_every_token_of_the_model(stub: Stub) -> None:
    events = [event async for event in stub.Generate(generate_request("g", [1, 2, 3], max_tokens=40, seed=5))]
    assert [token for event in events for token in event.token_ids] == fake_output([1, 2, 3], 40, seed=5)
    assert [event.finish_reason for event in events] == [0] * 39 + [sampling_pb2.FINISH_REASON_LENGTH]


async def test_log_probabilities_of_prompt_and_output_arrive(stub: Stub) -> None:
    request = generate_request("g", [1, 2, 3], max_tokens=2, logprobs=2, prompt_logprobs=1)
    first, second = [event async for event in stub.Generate(request)]
    assert [list(entry.top_token_ids) for entry in first.prompt_logprobs] == [[2], [3]]
    assert [len(event.logprobs[0].top_token_ids) for event in (first, second)] == [2, 2]


async def test_a_session_carries_many_requests_and_all_events_of_a_step_in_one_update(stub: Stub) -> None:
    session = SessionClient(stub)
    ids = [f"r{number}" for number in range(8)]
    for number, request_id in enumerate(ids):
        await session.start(request_id, [number + 1], max_tokens=LONG)
    while len({event.request_id for event in (await session.read()).events}) < len(ids):
        assert not session.last, "all run at the same time"
    for request_id in ids:
        await session.abort(request_id)
    await session.until_ended(*ids)
    for number, request_id in enumerate(ids):
        token_ids = session.token_ids[request_id, 0]
        assert token_ids == fake_output([number + 1], len(token_ids))
    assert all(update.HasField("load") for update in session.updates if update.events)
    session.call.cancel()


async def test_choices_differ_and_each_ends_once(stub: Stub) -> None:
    session = SessionClient(stub)
    await session.start("n", [4] * 100, n=3, max_tokens=5, seed=9)
    for choice in range(3):
        await session.until_ended("n", choice=choice)
        assert session.token_ids["n", choice] == fake_output([4] * 100, 5, seed=9, choice=choice)
    session.call.cancel()


async def test_a_session_is_told_the_load_while_idle(stub: Stub) -> None:
    session = SessionClient(stub)
    for _ in range(3):
        update = await session.read()
        assert (len(update.events), update.load.num_blocks) == (0, 256)
    session.call.cancel()


async def test_abort_ends_one_request_of_the_session(stub: Stub) -> None:
    session = SessionClient(stub)
    await session.start("gone", [1], max_tokens=LONG)
    await session.start("stays", [2], max_tokens=60)
    await session.until_first_token("gone")
    await session.abort("gone")
    await session.until_ended("gone", "stays")
    assert session.last["gone", 0].finish_reason == sampling_pb2.FINISH_REASON_ABORT
    assert session.last["gone", 0].error.code == Error.CODE_CANCELLED
    assert session.token_ids["stays", 0] == fake_output([2], 60)
    session.call.cancel()


async def test_cancelling_a_session_aborts_its_requests(stub: Stub) -> None:
    session = SessionClient(stub)
    num_steps_before = (await until_free(stub)).num_steps
    await session.start("a", [1], max_tokens=LONG)
    await session.until_first_token("a")
    session.call.cancel()
    assert (await until_free(stub)).num_steps - num_steps_before < LONG


async def test_a_half_closed_session_ends_after_its_last_event(stub: Stub) -> None:
    session = SessionClient(stub)
    await session.start("a", [1], max_tokens=5)
    await session.call.done_writing()
    await session.until_ended("a")
    assert await session.call.code() is grpc.StatusCode.OK


async def test_cancelling_generate_aborts_the_request(stub: Stub) -> None:
    num_steps_before = (await until_free(stub)).num_steps
    call = stub.Generate(generate_request("g", [1], max_tokens=LONG))
    await call.read()
    call.cancel()
    assert (await until_free(stub)).num_steps - num_steps_before < LONG


async def test_two_sessions_may_use_the_same_ids_and_do_not_reach_each_other(stub: Stub) -> None:
    mine, theirs = SessionClient(stub), SessionClient(stub)
    await mine.start("same", [1], max_tokens=LONG)
    await theirs.start("same", [2], max_tokens=100)
    await mine.until_first_token("same")
    await theirs.until_first_token("same")
    await mine.abort("same")
    await mine.until_ended("same")
    assert mine.last["same", 0].finish_reason == sampling_pb2.FINISH_REASON_ABORT
    await theirs.until_ended("same")
    assert theirs.token_ids["same", 0] == fake_output([2], 100)
    mine.call.cancel()
    theirs.call.cancel()


async def test_the_abort_rpc_reaches_generate_calls_alone_and_only_by_exact_id(stub: Stub) -> None:
    session = SessionClient(stub)
    await session.start("in-session", [1], max_tokens=LONG)
    await session.until_first_token("in-session")
    call = stub.Generate(generate_request("generated", [1], max_tokens=LONG))
    await call.read()
    ids = ["in-session", "session-1/in-session", "generate", "gen", "", "generated"]
    answer = await stub.Abort(engine_pb2.AbortRequest(request_ids=ids))
    assert list(answer.aborted_request_ids) == ["generated"]
    while not (event := await read_event(call)).finish_reason:
        pass
    assert event.finish_reason == sampling_pb2.FINISH_REASON_ABORT
    await session.read()
    assert not session.last
    session.call.cancel()


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (generate_request("bad", [1], n=5), "n"),
        (generate_request("bad", [5000]), "vocab_size"),
        (generate_request("bad", []), "prompt_token_ids"),
        (generate_request("bad", [1] * 3000), "max_model_len"),
        (generate_request("bad", [1], temperature=-1.0), "temperature"),
        (generate_request("bad", [1], stop_token_ids=range(65)), "stop_token_ids"),
        (engine_pb2.GenerateRequest(request_id="bad", prompt_token_ids=[1], cache_salt=b"x" * 65), "cache_salt"),
        (engine_pb2.GenerateRequest(request_id="bad", prompt_token_ids=[1], lora_name="x"), "lora_name"),
        (engine_pb2.GenerateRequest(request_id="bad", prompt_token_ids=[1], timeout_s=-1), "timeout_s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_request_is_answered_and_leaves_others_alone(
    stub: Stub, broken: engine_pb2.GenerateRequest, named: str
) -> None:
    session = SessionClient(stub)
    await session.start("good", [1], max_tokens=50)
    await session.call.write(engine_pb2.SessionCommand(start=broken))
    await session.until_ended("good", "bad")
    assert session.token_ids["good", 0] == fake_output([1], 50)
    end = session.last["bad", 0]
    assert (end.finish_reason, end.error.code) == (sampling_pb2.FINISH_REASON_ERROR, Error.CODE_INVALID_ARGUMENT)
    assert named in end.error.message
    session.call.cancel()
    with pytest.raises(grpc.aio.AioRpcError, match=named) as refused:
        await anext(aiter(stub.Generate(broken)))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_refused_request_with_choices_ends_every_choice(stub: Stub) -> None:
    session = SessionClient(stub)
    await session.start("bad", [5000], n=3)
    for choice in range(3):
        await session.until_ended("bad", choice=choice)
    session.call.cancel()


async def test_a_running_id_is_not_given_twice(stub: Stub) -> None:
    call = stub.Generate(generate_request("twice", [1], max_tokens=LONG))
    await call.read()
    with pytest.raises(grpc.aio.AioRpcError, match="request_id") as refused:
        await anext(aiter(stub.Generate(generate_request("twice", [1]))))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await read_event(call)).token_ids
    call.cancel()


async def test_a_row_that_fails_fails_alone(stub: Stub) -> None:
    session = SessionClient(stub)
    await session.start("good", [1], max_tokens=50)
    await session.start("poison", [999], max_tokens=50)
    await session.until_ended("good", "poison")
    assert session.token_ids["good", 0] == fake_output([1], 50)
    assert session.last["poison", 0].error.code == Error.CODE_INTERNAL
    session.call.cancel()


async def test_a_timeout_aborts_with_deadline_exceeded(stub: Stub) -> None:
    session = SessionClient(stub)
    request = generate_request("slow", [1], max_tokens=LONG)
    request.timeout_s = 0.1
    await session.call.write(engine_pb2.SessionCommand(start=request))
    await session.until_ended("slow")
    end = session.last["slow", 0]
    assert (end.finish_reason, end.error.code) == (sampling_pb2.FINISH_REASON_ABORT, Error.CODE_DEADLINE_EXCEEDED)
    session.call.cancel()


async def test_a_replayed_request_goes_on_at_its_next_index(stub: Stub) -> None:
    whole = fake_output([1, 2], 10)
    request = generate_request("replay", [1, 2, *whole[:4]], max_tokens=10)
    request.num_emitted_tokens = 4
    events = [event async for event in stub.Generate(request)]
    assert events[0].index == 4
    assert [token for event in events for token in event.token_ids] == whole[4:]


async def test_a_session_that_is_not_drained_ends_alone(engine: EngineUnderTest, stub: Stub) -> None:
    # Small windows, so that what is not read stays in the engine and not in the sockets.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(engine.address, options=options) as slow_channel:
        slow = SessionClient(engine_pb2_grpc.EngineStub(slow_channel))
        for number in range(32):
            await slow.start(f"s{number}", [number + 1], max_tokens=LONG)
        await slow.until_first_token("s31")  # all run; from here on nobody reads what they bring
        other = SessionClient(stub)
        await other.start("other", [1], max_tokens=LONG)
        await other.until_first_token("other")
        while (await other.read()).load.num_running != 1:  # only its own is left
            assert not other.last, "the slow session still holds its requests"
        with pytest.raises(grpc.aio.AioRpcError, match="max_session_buffer_bytes = 20000") as ended:
            await slow.until_ended("nothing of this name")
        assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await other.until_ended("other")
    assert other.token_ids["other", 0] == fake_output([1], LONG)
    other.call.cancel()


async def test_clients_that_vanish_at_any_moment_leave_nothing_behind(stub: Stub) -> None:
    draw = random.Random(7)

    async def vanish(number: int) -> None:
        session = SessionClient(stub)
        for index in range(draw.randint(1, 5)):
            await session.start(f"r{index}", [number + 1] * draw.randint(1, 300), max_tokens=LONG, n=draw.randint(1, 3))
        for _ in range(draw.randint(0, 20)):
            await session.read()
        session.call.cancel()

    await asyncio.gather(*(vanish(number) for number in range(40)))
    await until_free(stub)


async def test_a_full_engine_refuses_with_the_limit_by_name(tmp_path: Path) -> None:
    flags = ("--max-num-rows", "1", "--max-num-waiting", "2")
    with EngineUnderTest(FakeModel(step_s=0.01), tmp_path, *flags) as small:
        async with grpc.aio.insecure_channel(small.address) as channel:
            session = SessionClient(engine_pb2_grpc.EngineStub(channel))
            await session.start("r0", [1], max_tokens=20)
            await session.until_first_token("r0")  # from here it runs, and no longer waits
            for number in range(1, 4):
                await session.start(f"r{number}", [1], max_tokens=20)
            await session.until_ended("r3")
            error = session.last["r3", 0].error
            assert error.code == Error.CODE_RESOURCE_EXHAUSTED
            assert "max_num_waiting" in error.message
            await session.until_ended("r0", "r1", "r2")
            assert all(len(session.token_ids[f"r{number}", 0]) == 20 for number in range(3))
            session.call.cancel()


async def test_requests_show_in_the_metrics(engine: EngineUnderTest, stub: Stub) -> None:
    def scrape() -> dict[str, float]:
        with urllib.request.urlopen(engine.metrics_url, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    before = await asyncio.to_thread(scrape)
    async for _ in stub.Generate(generate_request("g", [1, 2, 3], max_tokens=20)):
        pass
    after = await asyncio.to_thread(scrape)
    expected = {
        'rempart_engine_requests_total{finish_reason="length"}': 1,
        "rempart_engine_prompt_tokens_total": 3,
        "rempart_engine_generation_tokens_total": 20,
        "rempart_engine_steps_total": 20,
        "rempart_engine_time_to_first_token_seconds_count": 1,
        "rempart_engine_e2e_seconds_count": 1,
    }
    assert {name: after[name] - before[name] for name in expected} == expected
    assert after["rempart_engine_e2e_seconds_sum"] > before["rempart_engine_e2e_seconds_sum"]


async def test_model_info_states_what_is_served(stub: Stub) -> None:
    info = await stub.GetModelInfo(engine_pb2.GetModelInfoRequest())
    assert (info.model_name, info.architecture, info.vocab_size) == ("fake", "fake", 1000)
    assert (info.max_model_len, info.block_size, info.num_blocks) == (2048, 64, 256)
    assert info.max_num_rows == 64
    assert info.engine_version


async def test_a_serving_engine_is_alive_and_ready(channel: grpc.aio.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)  # its type stubs lack the methods
    for service in ("", "rempart.v1.Engine"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await health.Check(health_pb2.HealthCheckRequest(service="rempart.v1.Nothing"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # stubs know no aio
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert names >= {"rempart.v1.Engine", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    call.cancel()
