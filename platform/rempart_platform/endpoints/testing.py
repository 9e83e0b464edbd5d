"""A fake engine for tests and benches: a real server of rempart.v1.Engine over a model that only hashes.

Token i of a choice is a pure function of (seed, prompt, choice, i), so a test knows the true output without a
reference run, and a continuation on another fake engine goes on where the first one stopped. Faults on demand.

As a process: `python -m rempart_platform.endpoints.testing --port 0 --step-ms 5`, with the ready line of a real engine.
"""

import argparse
import asyncio
import json
import math
import socket
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from zlib import crc32

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from rempart_protos.v1 import engine_pb2, engine_pb2_grpc, sampling_pb2

_IDLE_UPDATE_S = 0.05
_MASK = 0xFFFF_FFFF_FFFF_FFFF

TokenFunction = Callable[[engine_pb2.GenerateRequest, int, int], int]
"""(request, choice, index) -> token id."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What a fake engine does wrong. Counts are of output tokens of one choice."""

    refuse: engine_pb2.EngineError.Code | None = None
    """Answers every request with this error."""
    die_at: int | None = None
    """The whole engine goes away before it sends this token."""
    hang_at: int | None = None
    """Sends nothing of a request from this token on."""
    fail_at: int | None = None
    """Ends the choice with CODE_INTERNAL instead of sending this token."""
    skip_at: int | None = None
    """Leaves this token out: a gap."""
    repeat_at: int | None = None
    """Sends the token before this one once more."""


def hash_token(request: engine_pb2.GenerateRequest, choice: int, index: int, vocab_size: int) -> int:
    """Token `index` of a choice; never 0, which is the fake model's end of sequence."""
    return _mix(request.sampling.seed, _prompt_hash(request), choice, index, vocab_size)


def _prompt_hash(request: engine_pb2.GenerateRequest) -> int:
    num_prompt_tokens = len(request.prompt_token_ids) - request.num_emitted_tokens
    return crc32(repr(list(request.prompt_token_ids[:num_prompt_tokens])).encode())


def _mix(seed: int, prompt: int, choice: int, index: int, vocab_size: int) -> int:
    state = (seed * 0x9E3779B97F4A7C15 + prompt * 0xBF58476D1CE4E5B9 + choice * 0x94D049BB133111EB + index) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return 1 + (state ^ (state >> 31)) % (vocab_size - 1)


@dataclass(slots=True)
class _Choice:
    """One sequence of the fake engine."""

    request: engine_pb2.GenerateRequest
    choice: int
    index: int
    prompt_hash: int
    deadline_s: float
    arrival: int
    num_prompt_steps: int
    """Steps that bring no token yet."""
    is_first: bool = True


@dataclass(slots=True)
class _Session:
    """What runs on one stream: the requests of one router."""

    running: dict[str, list[_Choice]] = field(default_factory=dict)
    refused: list[engine_pb2.TokenEvent] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class FakeEngine(engine_pb2_grpc.EngineServicer):
    """Serves a hash model at a steady pace. Use as an async context manager, or `start` and `stop`.

    Args:
        info: what GetModelInfo tells.
        step_s: pause between steps; each step brings every running choice one token.
        prompt_tokens_per_step: how fast prompts are computed; None: all of one in its first step.
        rows: the most choices that run at once, in order of arrival; the others wait. None: all run.
        token: the model, instead of the hash.
        faults: what goes wrong; may be replaced while it runs.
    """

    def __init__(
        self,
        info: engine_pb2.ModelInfo | None = None,
        *,
        step_s: float = 0.001,
        prompt_tokens_per_step: int | None = None,
        rows: int | None = None,
        token: TokenFunction | None = None,
        faults: Faults = Faults(),
    ) -> None:
        self.info = info if info is not None else fake_model_info()
        if rows is not None:
            self.info.max_num_rows = rows
        self.faults = faults
        self.step_s = step_s
        self.started: list[engine_pb2.GenerateRequest] = []
        self.aborted_ids: list[str] = []
        self.is_draining = False
        self.address = ""
        self._prompt_tokens_per_step = prompt_tokens_per_step
        self._rows = rows
        self._token = token
        self._sessions: list[_Session] = []
        self._num_steps = 0
        self._died = asyncio.Event()
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._held: socket.socket | None = None  # keeps the port for this engine while it is away
        self._reaper: asyncio.Task[None] | None = None

    @property
    def num_running(self) -> int:
        """Requests running now."""
        return sum(len(session.running) for session in self._sessions)

    @property
    def num_sessions(self) -> int:
        """Routers that are connected."""
        return len(self._sessions)

    async def wait_for(self, predicate: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Waits until something holds for this engine. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not predicate():
                self._changed.clear()
                await self._changed.wait()

    async def start(self, address: str = "127.0.0.1:0") -> str:
        """Serves, and returns the address with its true port, which is kept until the context is left."""
        self._died.clear()
        if address.endswith(":0"):
            address = self._hold(address)
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", int(self._held is not None)),
                ("grpc.http2.min_ping_interval_without_data_ms", 100),
            ]
        )
        engine_pb2_grpc.add_EngineServicer_to_server(self, server)
        servicer = health.aio.HealthServicer()
        await servicer.set("rempart.v1.Engine", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port(address)
        await server.start()
        self._server = server
        self._reaper = asyncio.create_task(self._stop_when_dead(server))
        self.address = f"{address.rpartition(':')[0]}:{port}"
        return self.address

    def _hold(self, address: str) -> str:
        """A port that nobody else is given, though nothing listens on it yet."""
        self._let_go()
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        host = address.rpartition(":")[0]
        held.bind((host, 0))
        self._held = held
        weakref.finalize(self, held.close)
        return f"{host}:{held.getsockname()[1]}"

    def _let_go(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    async def stop(self) -> None:
        """Goes away at once, as a killed process does."""
        self._died.set()
        if self._reaper is not None:
            await self._reaper

    async def __aenter__(self) -> "FakeEngine":
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()
        self._let_go()

    async def GetModelInfo(  # noqa: N802 - the service's name
        self,
        request: engine_pb2.GetModelInfoRequest,
        context: grpc.aio.ServicerContext[engine_pb2.GetModelInfoRequest, engine_pb2.ModelInfo],
    ) -> engine_pb2.ModelInfo:
        return self.info

    async def GetLoad(  # noqa: N802 - the service's name
        self,
        request: engine_pb2.GetLoadRequest,
        context: grpc.aio.ServicerContext[engine_pb2.GetLoadRequest, engine_pb2.EngineLoad],
    ) -> engine_pb2.EngineLoad:
        return self._load()

    async def Session(  # noqa: N802 - the service's name
        self,
        request_iterator: AsyncIterator[engine_pb2.SessionCommand],
        context: grpc.aio.ServicerContext[engine_pb2.SessionCommand, engine_pb2.SessionUpdate],
    ) -> AsyncIterator[engine_pb2.SessionUpdate]:
        session = _Session()
        self._sessions.append(session)
        reader = asyncio.create_task(self._take_commands(request_iterator, session))
        try:
            while not reader.done():
                yield engine_pb2.SessionUpdate(events=self._step(session), load=self._load())
                if self._died.is_set():
                    return
                await self._pause(session)
        finally:
            reader.cancel()
            self.aborted_ids.extend(session.running)
            self._sessions.remove(session)
            self._changed.set()

    async def Generate(  # noqa: N802 - the service's name
        self,
        request: engine_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[engine_pb2.GenerateRequest, engine_pb2.TokenEvent],
    ) -> AsyncIterator[engine_pb2.TokenEvent]:
        session = _Session()
        self._start_request(request, session)
        while session.running or session.refused:
            for event in self._step(session):
                yield event
            await asyncio.sleep(self.step_s)

    async def Abort(  # noqa: N802 - the service's name
        self,
        request: engine_pb2.AbortRequest,
        context: grpc.aio.ServicerContext[engine_pb2.AbortRequest, engine_pb2.AbortResponse],
    ) -> engine_pb2.AbortResponse:
        return engine_pb2.AbortResponse()

    async def Drain(  # noqa: N802 - the service's name
        self,
        request: engine_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[engine_pb2.DrainRequest, engine_pb2.DrainResponse],
    ) -> engine_pb2.DrainResponse:
        self.is_draining = True
        return engine_pb2.DrainResponse()

    async def _take_commands(self, commands: AsyncIterator[engine_pb2.SessionCommand], session: _Session) -> None:
        async for command in commands:
            if command.WhichOneof("command") == "start":
                self._start_request(command.start, session)
            elif session.running.pop(command.abort_request_id, None) is not None:
                self.aborted_ids.append(command.abort_request_id)
            session.wake.set()
            self._changed.set()

    def _start_request(self, request: engine_pb2.GenerateRequest, session: _Session) -> None:
        self.started.append(request)
        if self.faults.refuse is not None:
            session.refused.append(_error_event(request.request_id, 0, 0, self.faults.refuse))
            return
        num_choices = request.sampling.n if request.sampling.HasField("n") else 1
        now = asyncio.get_running_loop().time()
        deadline_s = now + request.timeout_s if request.HasField("timeout_s") else math.inf
        prompt = _prompt_hash(request)
        per_step = self._prompt_tokens_per_step or math.inf
        num_waits = max(math.ceil(len(request.prompt_token_ids) / per_step) - 1, 0)
        session.running[request.request_id] = [
            _Choice(request, choice, request.num_emitted_tokens, prompt, deadline_s, len(self.started), num_waits)
            for choice in range(num_choices)
        ]

    async def _pause(self, session: _Session) -> None:
        if session.running or session.refused:
            await asyncio.sleep(self.step_s)
            return
        session.wake.clear()
        try:
            async with asyncio.timeout(_IDLE_UPDATE_S):
                await session.wake.wait()
        except TimeoutError:
            return  # time for an idle update

    def _step(self, session: _Session) -> Sequence[engine_pb2.TokenEvent]:
        self._num_steps += 1
        events, session.refused = session.refused, []
        running = self._running()
        now = asyncio.get_running_loop().time()
        for request_id, choices in list(session.running.items()):
            for choice in list(choices):
                event = self._advance(choice, now) if running is None or id(choice) in running else None
                if event is None:
                    continue
                events.append(event)
                if event.finish_reason:
                    choices.remove(choice)
            if not choices:
                del session.running[request_id]
        self._changed.set()
        return [] if self._died.is_set() else events

    def _advance(self, choice: _Choice, now: float) -> engine_pb2.TokenEvent | None:
        faults, index, request = self.faults, choice.index, choice.request
        if now > choice.deadline_s:
            code = engine_pb2.EngineError.CODE_DEADLINE_EXCEEDED
            return _error_event(request.request_id, choice.choice, index, code, sampling_pb2.FINISH_REASON_ABORT)
        if faults.hang_at is not None and index >= faults.hang_at:
            return None
        if choice.num_prompt_steps > 0:
            choice.num_prompt_steps -= 1
            return None
        if index == faults.die_at:
            self._died.set()
            return None
        if index == faults.fail_at:
            code = engine_pb2.EngineError.CODE_INTERNAL
            return _error_event(request.request_id, choice.choice, index, code)
        if index == faults.repeat_at:
            choice.index = index = index - 1
            self.faults = replace(faults, repeat_at=None)
        choice.index += 1
        if index == faults.skip_at:
            return None
        return self._token_event(choice, index)

    def _token_event(self, choice: _Choice, index: int) -> engine_pb2.TokenEvent:
        request = choice.request
        sampling = request.sampling
        if self._token is not None:
            token_id = self._token(request, choice.choice, index)
        else:
            token_id = _mix(sampling.seed, choice.prompt_hash, choice.choice, index, self.info.vocab_size)
        event = engine_pb2.TokenEvent(
            request_id=request.request_id, choice=choice.choice, index=index, token_ids=(token_id,)
        )
        if sampling.HasField("logprobs"):
            top = range(token_id, token_id + sampling.logprobs)
            event.logprobs.add(
                logprob=-0.5,
                top_token_ids=[other % self.info.vocab_size for other in top],
                top_logprobs=[-0.5 - rank for rank in range(sampling.logprobs)],
            )
        is_eos = token_id in self.info.eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            event.finish_reason = sampling_pb2.FINISH_REASON_STOP
        elif index + 1 >= sampling.max_tokens:
            event.finish_reason = sampling_pb2.FINISH_REASON_LENGTH
        return event

    def _running(self) -> set[int] | None:
        """Which choices have a row, by identity; None when all have."""
        if self._rows is None:
            return None
        choices = [choice for session in self._sessions for of in session.running.values() for choice in of]
        return {id(choice) for choice in sorted(choices, key=lambda choice: choice.arrival)[: self._rows]}

    def _load(self) -> engine_pb2.EngineLoad:
        num_here = sum(len(choices) for session in self._sessions for choices in session.running.values())
        num_running = num_here if self._rows is None else min(num_here, self._rows)
        return engine_pb2.EngineLoad(
            num_running=num_running,
            num_waiting=num_here - num_running,
            num_blocks=self.info.num_blocks,
            num_free_blocks=max(self.info.num_blocks - num_running, 0),
            num_steps=self._num_steps,
            draining=self.is_draining,
        )

    async def _stop_when_dead(self, server: grpc.aio.Server) -> None:
        await self._died.wait()
        await server.stop(grace=None)


def fake_model_info(
    name: str = "fake",
    *,
    vocab_size: int = 512,
    max_model_len: int = 4096,
    eos_token_ids: Sequence[int] = (0,),
    num_blocks: int = 512,
) -> engine_pb2.ModelInfo:
    """What a fake engine says of its model."""
    return engine_pb2.ModelInfo(
        model_name=name,
        architecture="fake",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        block_size=64,
        num_blocks=num_blocks,
        engine_version="0",
        dtype="none",
    )


def _error_event(
    request_id: str,
    choice: int,
    index: int,
    code: engine_pb2.EngineError.Code,
    finish_reason: sampling_pb2.FinishReason = sampling_pb2.FINISH_REASON_ERROR,
) -> engine_pb2.TokenEvent:
    return engine_pb2.TokenEvent(
        request_id=request_id,
        choice=choice,
        index=index,
        finish_reason=finish_reason,
        error=engine_pb2.EngineError(code=code, message=f"fault {code}"),
    )


async def _serve(args: argparse.Namespace) -> None:
    info = fake_model_info(
        args.model_name, vocab_size=args.vocab_size, max_model_len=args.max_model_len, eos_token_ids=args.eos_token_id
    )
    engine = FakeEngine(info, step_s=args.step_ms / 1000)
    await engine.start(f"127.0.0.1:{args.port}")
    sys.stdout.write(json.dumps({"ready": True, "address": engine.address}) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def main() -> None:
    """Serves until killed."""
    parser = argparse.ArgumentParser(prog="python -m rempart_platform.endpoints.testing", description="A fake engine.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=5.0, help="pause between steps")
    parser.add_argument("--model-name", default="fake")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--eos-token-id", type=int, action="append", default=[])
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
