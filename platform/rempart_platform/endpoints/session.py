"""A router's lasting relation to one engine: connect, learn what it serves, keep a Session stream, come back when lost.

run():  connect ──► health SERVING? ──► GetModelInfo ──► Session ──► first update: ready ──► ... ──► lost
           ▲                                                                                        │
           └────────────────────────────── jittered exponential backoff ◄───────────────────────────┘
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Never

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rempart_platform.bounds import require_positive
from rempart_platform.endpoints.backoff import jittered_backoff_s
from rempart_platform.endpoints.connection import EngineConnection, engine_lost
from rempart_platform.endpoints.load import EndpointLoad, EndpointModel, EndpointState
from rempart_platform.endpoints.token_stream import TokenStream
from rempart_platform.endpoints.turns import Turns
from rempart_protos.v1 import engine_pb2, engine_pb2_grpc

_logger = logging.getLogger(__name__)

_ENGINE_SERVICE = "rempart.v1.Engine"


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """How a session behaves towards its engine and its consumers."""

    max_buffered_tokens: int = 2048
    """Most tokens of one request that may wait for its client."""
    streams_per_pass: int = 8
    """Most streams of an engine that take their tokens in one pass of the event loop. Where more have some, more of the
    engine's steps are read between, and streams take more tokens at a time."""
    connect_timeout_s: float = 5.0
    """For each question that is asked before a session begins."""
    backoff_initial_s: float = 0.1
    """The first wait after a failure; doubled each time, up to `backoff_max_s`."""
    backoff_max_s: float = 5.0
    """The longest wait between two attempts."""
    keepalive_interval_s: float = 5.5
    """A connection that brings nothing is pinged this often."""
    keepalive_timeout_s: float = 4.0
    """A connection that brings nothing and answers no ping is given up after interval + timeout. Engines take offence
    at pings more often than every 5 s."""
    max_message_bytes: int = 64 * 1024 * 1024
    """One update carries a whole step: prompt log-probabilities make it large."""
    max_connecting: int = 64
    """Engines that a router connects to at a time; more wait for their turn."""

    def __post_init__(self) -> None:
        require_positive(self)


def backoff_s(attempt: int, config: SessionConfig, rng: random.Random) -> float:
    """Seconds to wait before connection attempt `attempt` (from 0)."""
    return jittered_backoff_s(attempt, config.backoff_initial_s, config.backoff_max_s, rng)


class EngineSession:
    """One endpoint: its state, its connection, and this router's requests in flight there.

    Args:
        address: `host:port`.
        config: limits and times.
        rng: jitters the backoff.
        on_change: told when the endpoint becomes ready, starts to drain, or is lost.
        connecting: shared by all sessions, so that a thousand of them do not connect at the same time.
    """

    def __init__(
        self,
        address: str,
        config: SessionConfig,
        rng: random.Random,
        on_change: Callable[[EndpointState], None],
        connecting: asyncio.Semaphore | None = None,
    ) -> None:
        self.address = address
        self._config = config
        self._rng = rng
        self._on_change = on_change
        self._connecting = connecting or asyncio.Semaphore(config.max_connecting)
        self._turns = Turns(config.streams_per_pass)
        self._connection: EngineConnection | None = None
        self._num_attempts = 0
        self._told_reason = ""
        self.state = EndpointState(address)
        """Made anew with each change, and not when it is asked for: each request asks all endpoints for theirs."""

    @contextmanager
    def in_flight(self, num_tokens: int) -> Iterator[None]:
        """Counts a request of at most that many tokens as in flight here until the block is left."""
        self._add_in_flight(1, num_tokens)
        try:
            yield
        finally:
            self._add_in_flight(-1, -num_tokens)

    def generate(self, request: engine_pb2.GenerateRequest) -> TokenStream:
        """Starts a request on the engine. Leaving the returned stream before its end aborts the request.

        Raises:
            RempartError: UNAVAILABLE, the engine is not connected.
        """
        if self._connection is None:
            raise engine_lost()
        return self._connection.generate(request)

    async def run(self) -> Never:
        """Keeps the session up until cancelled."""
        while True:
            reason = await self._serve_once()
            # An engine may load for an hour: what was said is said again to those alone who look for it.
            level = logging.DEBUG if reason == self._told_reason else logging.WARNING
            _logger.log(level, "engine is not ready", extra={"endpoint": self.address, "reason": reason})
            self._told_reason = reason
            await asyncio.sleep(backoff_s(self._num_attempts, self._config, self._rng))
            self._num_attempts += 1

    async def _serve_once(self) -> str:
        async with grpc.aio.insecure_channel(self.address, options=_channel_options(self._config)) as channel:
            try:
                async with self._connecting:
                    model = await self._ask_model(channel)
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            if model is None:
                return "the engine answers, and says that it does not serve: it loads, or it ends"
            self.state = replace(self.state, model=model)
            call = engine_pb2_grpc.EngineStub(channel).Session()
            self._connection = EngineConnection(call, self._config.max_buffered_tokens, self._take_load, self._turns)
            try:
                return await self._connection.run()
            finally:
                self._connection = None
                was_ready = self.state.is_ready
                # Another engine may come to this address.
                self.state = replace(self.state, is_ready=False, load=EndpointLoad(), full_rows=0)
                if was_ready:
                    self._on_change(self.state)

    async def _ask_model(self, channel: grpc.aio.Channel) -> EndpointModel | None:
        timeout_s = self._config.connect_timeout_s
        health_stub = health_pb2_grpc.HealthStub(channel)
        health = await health_stub.Check(  # type: ignore[attr-defined]  # its stubs name no method
            health_pb2.HealthCheckRequest(service=_ENGINE_SERVICE), timeout=timeout_s
        )
        if health.status != health_pb2.HealthCheckResponse.SERVING:
            return None
        info = await engine_pb2_grpc.EngineStub(channel).GetModelInfo(
            engine_pb2.GetModelInfoRequest(), timeout=timeout_s
        )
        return EndpointModel.from_proto(info)

    def _take_load(self, load: EndpointLoad) -> None:
        before = self.state
        full_rows = max(before.full_rows, load.num_running) if load.num_waiting > 0 else before.full_rows
        self.state = replace(before, is_ready=True, load=load, full_rows=full_rows)
        if not before.is_ready:
            self._num_attempts = 0
            self._told_reason = ""
            model = before.model.name if before.model is not None else ""
            _logger.info("engine is ready", extra={"endpoint": self.address, "model": model})
        if not before.is_ready or before.load.is_draining != load.is_draining:
            self._on_change(self.state)

    def _add_in_flight(self, number: int, num_tokens: int) -> None:
        now = self.state
        self.state = replace(
            now,
            num_in_flight=now.num_in_flight + number,
            num_in_flight_tokens=now.num_in_flight_tokens + num_tokens,
        )


def _channel_options(config: SessionConfig) -> list[tuple[str, int]]:
    return [
        # Pings go out though no data does, so that a half-open connection is found while a request waits.
        ("grpc.keepalive_time_ms", round(config.keepalive_interval_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Every attempt is a fresh connection; the backoff between them is ours.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    ]
