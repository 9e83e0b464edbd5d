"""One Session stream to one engine: commands go up, updates come down, until either side ends it.

The reader hands each event to its request's buffer and never waits for a consumer, so no request holds up another.
When the stream ends, for whatever reason, every request that was started on it fails as retryable: the engine
aborts them on its side.
"""

import asyncio
import functools
from collections.abc import Callable

import grpc
import grpc.aio

from rempart_platform.endpoints.load import EndpointLoad
from rempart_platform.endpoints.token_stream import TokenStream
from rempart_platform.endpoints.turns import Turns
from rempart_platform.errors import EngineLostError, ErrorKind, RempartError
from rempart_protos.v1 import engine_pb2

_DEADLINE_GRACE_S = 1.0  # an engine keeps a request's deadline itself; this is for one that cannot

SessionCall = grpc.aio.StreamStreamCall[engine_pb2.SessionCommand, engine_pb2.SessionUpdate]


def engine_lost() -> RempartError:
    """The answer to every request of an endpoint that went away."""
    return EngineLostError(ErrorKind.UNAVAILABLE, "The model's engine was lost. Try again.", retry_after_s=1.0)


class EngineConnection:
    """The requests of one open Session stream.

    Args:
        call: the open stream; this object is its only reader and writer.
        max_buffered_tokens: the most tokens of one request that may wait for their consumer.
        on_load: told every load that the engine pushes.
        turns: when consumers are woken.
    """

    def __init__(
        self,
        call: SessionCall,
        max_buffered_tokens: int,
        on_load: Callable[[EndpointLoad], None],
        turns: Turns,
    ) -> None:
        self._call = call
        self._max_buffered_tokens = max_buffered_tokens
        self._on_load = on_load
        self._turns = turns
        self._streams: dict[str, TokenStream] = {}
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._commands: asyncio.Queue[engine_pb2.SessionCommand] = asyncio.Queue()

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def generate(self, request: engine_pb2.GenerateRequest) -> TokenStream:
        """Starts a request, whose id must be new to this engine."""
        request_id = request.request_id
        assert request_id not in self._streams
        forget = functools.partial(self._forget, request_id)
        stream = TokenStream(request, self._max_buffered_tokens, forget, self._turns)
        self._streams[request_id] = stream
        if request.HasField("timeout_s"):
            self._deadlines[request_id] = asyncio.get_running_loop().call_later(
                request.timeout_s + _DEADLINE_GRACE_S,
                functools.partial(
                    stream.fail,
                    RempartError(ErrorKind.DEADLINE_EXCEEDED, "The request ran out of time."),
                    still_runs=True,
                ),
            )
        self._commands.put_nowait(engine_pb2.SessionCommand(start=request))
        return stream

    async def run(self) -> str:
        """Serves the stream until it ends, then fails its requests. Returns why it ended."""
        try:
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(self._write_commands())
                reason = await self._read_updates()
                writer.cancel()
            return reason
        finally:
            self._call.cancel()
            for stream in tuple(self._streams.values()):
                stream.fail(engine_lost(), still_runs=False)

    async def _read_updates(self) -> str:
        streams = self._streams
        try:
            while True:
                update = await self._call.read()
                if not isinstance(update, engine_pb2.SessionUpdate):
                    return "the engine ended the session"
                for event in update.events:
                    stream = streams.get(event.request_id)
                    if stream is not None:  # else it was aborted and these events crossed the command
                        stream.push(event)
                if update.HasField("load"):
                    self._on_load(EndpointLoad.from_proto(update.load))
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"

    async def _write_commands(self) -> None:
        while True:
            command = await self._commands.get()
            try:
                await self._call.write(command)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the stream is over; the reader finds out why

    def _forget(self, request_id: str, still_runs: bool) -> None:
        del self._streams[request_id]
        deadline = self._deadlines.pop(request_id, None)
        if deadline is not None:
            deadline.cancel()
        if still_runs:
            self._commands.put_nowait(engine_pb2.SessionCommand(abort_request_id=request_id))
