"""gRPC surface of an engine: thin, over `EngineFront`."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from importlib.metadata import version
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rempart_engine.config import EngineConfig
from rempart_engine.front import GENERATE_NAMESPACE, EngineFront, Phase
from rempart_engine.health import READINESS, EngineHealth
from rempart_engine.proto_codec import model_info_to_proto
from rempart_engine.session import CallerSession
from rempart_protos.v1 import engine_pb2, engine_pb2_grpc

ENGINE_VERSION = version("rempart")

_CALL_STATUS = {
    engine_pb2.EngineError.CODE_INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    engine_pb2.EngineError.CODE_RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    engine_pb2.EngineError.CODE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}
"""Errors of a whole request: on a Generate call they are its status, not an event."""

_Context = grpc.aio.ServicerContext[Any, Any]


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """`rempart.v1.Engine`. Stream methods write to their context, so that a stream can end while a write is stuck."""

    def __init__(self, config: EngineConfig, front: EngineFront, health: EngineHealth) -> None:
        self._config = config
        self._front = front
        self._health = health

    async def Session(  # type: ignore[override]  # a coroutine that writes to the context  # noqa: N802
        self, request_iterator: AsyncIterator[engine_pb2.SessionCommand], context: _Context
    ) -> None:
        if self._front.phase is not Phase.SERVING:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._front.phase.value)
        with self._front.session() as session:
            await _until_ended(
                session, self._send_updates(session, context), self._take_commands(session, request_iterator)
            )
        await _end_call(session, context)

    async def Generate(  # type: ignore[override]  # as above  # noqa: N802
        self, request: engine_pb2.GenerateRequest, context: _Context
    ) -> None:
        with self._front.session(GENERATE_NAMESPACE) as session:
            self._front.start(session, request)
            self._front.close_when_idle(session)
            await _until_ended(session, self._send_events(session, context))
        await _end_call(session, context)

    async def Abort(self, request: engine_pb2.AbortRequest, context: _Context) -> engine_pb2.AbortResponse:  # noqa: N802
        aborted = [caller_id for caller_id in request.request_ids if self._front.abort(GENERATE_NAMESPACE, caller_id)]
        return engine_pb2.AbortResponse(aborted_request_ids=aborted)

    async def GetModelInfo(  # noqa: N802
        self, request: engine_pb2.GetModelInfoRequest, context: _Context
    ) -> engine_pb2.ModelInfo:
        if self._front.model is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._front.phase.value)
        return model_info_to_proto(self._front.model, ENGINE_VERSION)

    async def GetLoad(self, request: engine_pb2.GetLoadRequest, context: _Context) -> engine_pb2.EngineLoad:  # noqa: N802
        load = self._front.load()
        if load is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._front.phase.value)
        return load

    async def Drain(self, request: engine_pb2.DrainRequest, context: _Context) -> engine_pb2.DrainResponse:  # noqa: N802
        timeout_s = request.timeout_s if request.HasField("timeout_s") else self._config.drain_timeout_s
        if not 0 <= timeout_s < float("inf"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"timeout_s must be finite, got {timeout_s:g}")
        await self._health.draining()
        return engine_pb2.DrainResponse(num_aborted=await self._front.drain(timeout_s))

    async def _take_commands(self, session: CallerSession, commands: AsyncIterator[engine_pb2.SessionCommand]) -> None:
        async for command in commands:
            if command.HasField("start"):
                self._front.start(session, command.start)
            elif command.HasField("abort_request_id"):
                self._front.abort(session.namespace, command.abort_request_id)
        self._front.close_when_idle(session)

    async def _send_updates(self, session: CallerSession, context: _Context) -> None:
        async for update in session.updates():
            if not await _write(session, context, update):
                return

    async def _send_events(self, session: CallerSession, context: _Context) -> None:
        async for update in session.updates():
            for event in update.events:
                if event.HasField("error") and (status := _CALL_STATUS.get(event.error.code)) is not None:
                    session.end(status, event.error.message, instead=True)
                    return
                if not await _write(session, context, event):
                    return


async def _until_ended(
    session: CallerSession, sending: Coroutine[Any, Any, None], *others: Coroutine[Any, Any, None]
) -> None:
    """Run until everything is sent, or the session must end with something unsent."""
    async with asyncio.TaskGroup() as tasks:
        sender = tasks.create_task(sending)
        dropped = tasks.create_task(session.dropped.wait())
        running = [tasks.create_task(other) for other in others]
        await asyncio.wait({sender, dropped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (sender, dropped, *running):
            task.cancel()


async def _write(session: CallerSession, context: _Context, message: Message) -> bool:
    """Send a message; False, and the session ended as cancelled, when its caller is no longer there."""
    try:
        await context.write(message)
    except grpc.aio.InternalError:  # so says gRPC until it has noticed the cancellation, and cancels us after
        session.end(grpc.StatusCode.CANCELLED, "the caller is gone", instead=True)
        return False
    return True


async def _end_call(session: CallerSession, context: _Context) -> None:
    """Send the session's status, if it is an error and there is somebody to hear it."""
    if session.ending is not None and session.ending.code is grpc.StatusCode.CANCELLED:
        raise asyncio.CancelledError
    if session.ending is not None and session.ending.code is not grpc.StatusCode.OK:
        await context.abort(session.ending.code, session.ending.message)


def build_server(config: EngineConfig, front: EngineFront, health: EngineHealth) -> grpc.aio.Server:
    """A server with the engine's services; no port is bound yet."""
    server = grpc.aio.server(
        maximum_concurrent_rpcs=config.max_concurrent_rpcs,
        options=[
            ("grpc.so_reuseport", 0),  # two engines on one port are a mistake, not a team
            ("grpc.max_concurrent_streams", config.max_concurrent_streams),
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.keepalive_time_ms", round(config.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(config.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ],
    )
    engine_pb2_grpc.add_EngineServicer_to_server(EngineServicer(config, front, health), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    reflection.enable_server_reflection((READINESS, grpc_health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server
