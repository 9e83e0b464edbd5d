"""Life and death of a real engine process: loading, draining, a core that dies or hangs, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.ports import free_ports

from rempart_engine import serving
from rempart_engine.testing import EngineUnderTest, FakeModel, Gate, fake_output
from rempart_protos.v1 import engine_pb2, engine_pb2_grpc, sampling_pb2

SLOW = FakeModel(step_s=0.01)
LONG = 1500
READINESS = "rempart.v1.Engine"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
END_S = 20.0
"""An engine that ends does so in a second or two. Whatever else it might wait for lasts longer than this."""


def generate_request(request_id: str, max_tokens: int = LONG) -> engine_pb2.GenerateRequest:
    sampling = sampling_pb2.SamplingParams(max_tokens=max_tokens)
    return engine_pb2.GenerateRequest(request_id=request_id, prompt_token_ids=[1], sampling=sampling)


def start_command(request_id: str) -> engine_pb2.SessionCommand:
    return engine_pb2.SessionCommand(start=generate_request(request_id))


def core_of(engine: EngineUnderTest) -> psutil.Process:
    (core,) = psutil.Process(engine.process.pid).children()
    return core


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # nobody may be there to reap it
    except psutil.NoSuchProcess:
        return False


async def exit_code(engine: EngineUnderTest) -> int:
    return await asyncio.to_thread(engine.process.wait, END_S)


async def status_of(call: Any) -> grpc.StatusCode:
    """Status of a stream, whose messages must be read before it comes."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def read_event(call: Any) -> engine_pb2.TokenEvent:
    """The next event of a Generate call that has one."""
    event = await call.read()
    assert isinstance(event, engine_pb2.TokenEvent)
    return event


async def read_until_last(call: Any, request_id: str) -> engine_pb2.TokenEvent:
    """Read a session up to the last event of a request."""
    while True:
        update = await call.read()
        for event in update.events:
            if event.request_id == request_id and event.finish_reason:
                assert isinstance(event, engine_pb2.TokenEvent)
                return event


async def first_event(call: Any) -> None:
    while not (await call.read()).events:
        pass


def health_of(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)  # its type stubs lack the methods


async def statuses(channel: grpc.aio.Channel, service: str) -> Any:
    """An open health watch that has told the first status."""
    watch = health_of(channel).Watch(health_pb2.HealthCheckRequest(service=service))
    assert (await watch.read()).status == SERVING
    return watch


async def assert_streams_fail_cleanly(engine: EngineUnderTest, harm: signal.Signals) -> None:
    """With two requests running, do `harm` to the core: every stream is told, health says so, the process exits 1."""
    async with grpc.aio.insecure_channel(engine.address) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        watches = [await statuses(channel, service) for service in ("", READINESS)]
        session, call = stub.Session(), stub.Generate(generate_request("g"))
        await session.write(start_command("s"))
        await first_event(session)
        await call.read()
        core = core_of(engine)
        core.send_signal(harm)
        end = await read_until_last(session, "s")
        assert end.finish_reason == sampling_pb2.FINISH_REASON_ERROR
        assert end.error.code == engine_pb2.EngineError.CODE_UNAVAILABLE
        for watch in watches:
            assert (await watch.read()).status == NOT_SERVING
        assert await status_of(session) is grpc.StatusCode.UNAVAILABLE
        assert await status_of(call) is grpc.StatusCode.UNAVAILABLE
        assert await exit_code(engine) == 1
        assert not core.is_running()


def test_progress_is_told_while_loading_and_the_addresses_when_ready(tmp_path: Path) -> None:
    with EngineUnderTest(FakeModel(), tmp_path) as engine:
        assert engine.loading == [0.0, 0.5, 1.0]
        with urllib.request.urlopen(engine.metrics_url, timeout=END_S) as answer:
            assert b"vllm:num_requests_waiting" in answer.read()


async def test_a_loading_engine_is_alive_but_not_ready_and_takes_nothing(tmp_path: Path) -> None:
    port = next(free_ports())
    with Gate(tmp_path) as gate, ExitStack() as stack:
        engine = EngineUnderTest(FakeModel(load_gate=gate.path), tmp_path, "--port", str(port))
        stack.push(engine)  # to be ended; entering it would wait until it is ready
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            health, stub = health_of(channel), engine_pb2_grpc.EngineStub(channel)
            readiness = health.Watch(health_pb2.HealthCheckRequest(service=READINESS), wait_for_ready=True)
            assert (await readiness.read()).status == NOT_SERVING
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
            for refused in (
                stub.GetModelInfo(engine_pb2.GetModelInfoRequest()),
                stub.GetLoad(engine_pb2.GetLoadRequest()),
                stub.Generate(generate_request("g")),
                stub.Session(),
            ):
                assert await refused.code() is grpc.StatusCode.UNAVAILABLE
            gate.open()
            assert (await readiness.read()).status == SERVING
        engine.wait_until_ready()
        assert engine.address == f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), "weights are torn"),
        (("--model", "/nowhere/model.gguf"), "/nowhere/model.gguf"),
        (("--runner", "rempart_engine.nowhere:load"), "rempart_engine.nowhere"),
        (("--host", "203.0.113.1"), "203.0.113.1"),
    ],
)
def test_an_engine_that_cannot_start_says_why_in_one_line_and_exits_with_2(
    tmp_path: Path, flags: tuple[str, ...], named: str
) -> None:
    with EngineUnderTest(FakeModel(load_error="weights are torn"), tmp_path, *flags) as engine:
        assert engine.process.wait(END_S) == 2
    errors = [line for line in map(json.loads, engine.log_path.read_text().splitlines()) if line["level"] == "error"]
    assert len(errors) == 1
    assert named in errors[0]["message"]
    assert "traceback" not in errors[0]


def test_two_engines_do_not_share_a_port(tmp_path: Path) -> None:
    with EngineUnderTest(FakeModel(), tmp_path) as first:
        port = first.address.partition(":")[2]
        with EngineUnderTest(FakeModel(), tmp_path, "--port", port) as second:
            assert second.process.wait(END_S) == 2


async def test_a_killed_core_ends_streams_health_and_process(tmp_path: Path) -> None:
    with EngineUnderTest(SLOW, tmp_path) as engine:
        await assert_streams_fail_cleanly(engine, signal.SIGKILL)


def test_a_lost_core_is_told_and_waited_for_within_two_seconds() -> None:
    assert serving._NOTICE_S + serving._STREAMS_END_S <= 1.0, "the other second is for what must be computed"


async def test_a_stopped_core_is_noticed_and_killed(tmp_path: Path) -> None:
    with EngineUnderTest(SLOW, tmp_path, "--step-timeout-s", "3") as engine:
        await assert_streams_fail_cleanly(engine, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("fault", "step_timeout_s"),
    [(FakeModel(raise_at_step=3), "60"), (FakeModel(hang_at_step=3), "0.8")],
    ids=["raises", "hangs"],
)
async def test_a_step_that_fails_as_a_whole_ends_the_engine(
    tmp_path: Path, fault: FakeModel, step_timeout_s: str
) -> None:
    with EngineUnderTest(fault, tmp_path, "--step-timeout-s", step_timeout_s) as engine:
        async with grpc.aio.insecure_channel(engine.address) as channel:
            call = engine_pb2_grpc.EngineStub(channel).Generate(generate_request("g"))
            assert await status_of(call) is grpc.StatusCode.UNAVAILABLE
        assert await exit_code(engine) == 1
    assert ("told to raise at step 3" in engine.log_path.read_text()) is (fault.raise_at_step is not None)


async def test_a_long_step_is_no_hang_and_an_idle_core_neither(tmp_path: Path) -> None:
    """A step of more than one tick of the watch, which leaves a busy machine two seconds until the timeout."""
    with EngineUnderTest(FakeModel(step_s=0.8), tmp_path, "--step-timeout-s", "2.8") as engine:
        async with grpc.aio.insecure_channel(engine.address) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            assert len([event async for event in stub.Generate(generate_request("g", max_tokens=2))]) == 2
            await asyncio.sleep(3.2)  # idle for longer than the timeout
            assert len([event async for event in stub.Generate(generate_request("g", max_tokens=1))]) == 1


def test_the_core_dies_with_its_front(tmp_path: Path) -> None:
    with EngineUnderTest(SLOW, tmp_path) as engine:
        core = core_of(engine)
        engine.process.kill()
        killed_at = time.monotonic()
        while is_alive(core):
            assert time.monotonic() - killed_at < END_S
            time.sleep(0.01)


async def test_sigterm_finishes_what_runs_takes_nothing_new_and_exits_0(tmp_path: Path) -> None:
    with Gate(tmp_path) as gate, EngineUnderTest(FakeModel(step_gates={5: gate.path}), tmp_path) as engine:
        core = core_of(engine)
        async with grpc.aio.insecure_channel(engine.address) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            readiness = await statuses(channel, READINESS)
            session = stub.Session()
            await session.read()
            call = stub.Generate(generate_request("g", max_tokens=60))
            token_ids = list((await read_event(call)).token_ids)
            engine.process.send_signal(signal.SIGTERM)
            assert (await readiness.read()).status == NOT_SERVING
            await session.write(start_command("late"))
            refused = await read_until_last(session, "late")
            assert refused.error.code == engine_pb2.EngineError.CODE_UNAVAILABLE
            assert await status_of(stub.Generate(generate_request("late"))) is grpc.StatusCode.UNAVAILABLE
            gate.open()
            while len(token_ids) < 60:
                token_ids += (await read_event(call)).token_ids
            assert await status_of(call) is grpc.StatusCode.OK
            assert token_ids == fake_output([1], 60)
            assert await status_of(session) is grpc.StatusCode.UNAVAILABLE
        assert await exit_code(engine) == 0
        assert not core.is_running()


async def test_what_outlasts_the_drain_is_aborted_as_retriable(tmp_path: Path) -> None:
    with EngineUnderTest(SLOW, tmp_path, "--drain-timeout-s", "0.2") as engine:
        async with grpc.aio.insecure_channel(engine.address) as channel:
            session = engine_pb2_grpc.EngineStub(channel).Session()
            await session.write(start_command("s"))
            await first_event(session)
            engine.process.send_signal(signal.SIGINT)
            end = await read_until_last(session, "s")
            assert end.finish_reason == sampling_pb2.FINISH_REASON_ABORT
            assert end.error.code == engine_pb2.EngineError.CODE_UNAVAILABLE
        assert await exit_code(engine) == 0


async def test_the_drain_rpc_waits_aborts_and_leaves_the_process_to_its_owner(tmp_path: Path) -> None:
    with EngineUnderTest(SLOW, tmp_path) as engine:
        async with grpc.aio.insecure_channel(engine.address) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            call = stub.Generate(generate_request("g"))
            await call.read()
            answer = await stub.Drain(engine_pb2.DrainRequest(timeout_s=0.1))
            assert answer.num_aborted == 1
            assert await status_of(call) is grpc.StatusCode.UNAVAILABLE
            load = await stub.GetLoad(engine_pb2.GetLoadRequest())
            assert (load.draining, load.num_running, load.num_free_blocks) == (True, 0, load.num_blocks)
            assert (await stub.Drain(engine_pb2.DrainRequest())).num_aborted == 0
            health = health_of(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest(service=READINESS))).status == NOT_SERVING
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        engine.process.terminate()
        assert await exit_code(engine) == 0


async def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with EngineUnderTest(SLOW, tmp_path) as engine:
        core = core_of(engine)
        async with grpc.aio.insecure_channel(engine.address) as channel:
            readiness = await statuses(channel, READINESS)
            call = engine_pb2_grpc.EngineStub(channel).Generate(generate_request("g"))
            await call.read()
            engine.process.send_signal(signal.SIGINT)
            assert (await readiness.read()).status == NOT_SERVING
            engine.process.send_signal(signal.SIGINT)
            assert await exit_code(engine) == 130
        assert not core.is_running()


def test_the_core_gets_its_threads_before_any_library_is_loaded(tmp_path: Path) -> None:
    with EngineUnderTest(FakeModel(), tmp_path, "--num-threads", "3") as engine:
        environ = core_of(engine).environ()
    assert {environ[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")} == {"3"}


def test_the_front_imports_no_torch() -> None:
    code = "import sys, rempart_engine.__main__; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
