"""Clients that cost little, so that they are not what is measured: replies are kept as bytes and read afterwards."""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import grpc.aio
from bench.conversation import (
    Conversation,
    WrongOutputError,
    check_engine_events,
    check_grpc_events,
    check_http_body,
    check_http_stream,
)

from rempart_protos.v1 import engine_pb2

_MAX_HEAD_BYTES = 16 * 1024
_FIRST_TEXT = re.compile(rb'"content": ?"[^"]')
_CHAT = "/rempart.v1.Inference/Chat"
_GENERATE = "/rempart.v1.Engine/Generate"


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. Times are seconds from the request."""

    asked: Conversation
    first_token_s: float
    total_s: float
    check: Callable[[], int]
    """Raises WrongOutputError; returns the number of pieces in which the answer came."""


class Client(Protocol):
    """One request at a time."""

    async def ask(self, asked: Conversation) -> Reply: ...

    async def close(self) -> None: ...


class _HttpProtocol(asyncio.Protocol):
    """Collects one response; knows only what routers send: chunked bodies and bodies with a length."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.first_data_at = 0.0
        self.transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)  # uvloop's own class, under no class of asyncio

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self.first_data_at and _FIRST_TEXT.search(self._data):
            self.first_data_at = time.perf_counter()
        if self._is_complete() and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(WrongOutputError(f"the connection was lost: {exc}"))
            self._done.exception()  # between two requests nobody asks for it

    async def exchange(self, request: bytes) -> bytes:
        """Head and body of the response as they came."""
        assert self.transport is not None, "connected"
        self._data, self.first_data_at = bytearray(), 0.0
        if self._done.done():
            self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self._done
        return bytes(self._data)

    def _is_complete(self) -> bool:
        if self._data.endswith(b"\r\n0\r\n\r\n"):
            return True
        head, separator, _ = bytes(self._data[:_MAX_HEAD_BYTES]).partition(b"\r\n\r\n")
        _, _, length = head.lower().partition(b"content-length: ")
        if not separator or not length:
            return False
        return len(self._data) - len(head) - len(separator) >= int(length.partition(b"\r\n")[0])


class HttpClient:
    """One keep-alive connection to the OpenAI API."""

    def __init__(self, protocol: _HttpProtocol, model: str, key: str, *, stream: bool) -> None:
        self._protocol = protocol
        self._model = model
        self._key = key
        self._stream = stream

    @classmethod
    async def connect(cls, port: int, model: str, key: str, *, stream: bool) -> "HttpClient":
        _, protocol = await asyncio.get_running_loop().create_connection(_HttpProtocol, "127.0.0.1", port)
        return cls(protocol, model, key, stream=stream)

    async def ask(self, asked: Conversation) -> Reply:
        request = asked.http_request(self._model, self._key, stream=self._stream)
        started = time.perf_counter()
        response = await self._protocol.exchange(request)
        ended = time.perf_counter()
        first = self._protocol.first_data_at or ended

        def check() -> int:
            body = body_of(response)
            return check_http_stream(body, asked) if self._stream else check_http_body(body, asked)

        return Reply(asked, first - started, ended - started, check)

    async def close(self) -> None:
        if self._protocol.transport is not None:
            self._protocol.transport.close()


def body_of(response: bytes) -> bytes:
    """The body of a response, or as much of it as has come."""
    head, _, rest = response.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise WrongOutputError(f"the router answered {response[:500]!r}")
    if b"transfer-encoding: chunked" not in head.lower():
        return rest
    body = bytearray()
    while rest:
        size, separator, rest = rest.partition(b"\r\n")
        length = int(size, 16) if separator else 0
        body += rest[:length]
        rest = rest[length + 2 :]
    return bytes(body)


class GrpcClient:
    """Calls on a channel of its own; messages stay bytes."""

    def __init__(self, address: str, model: str, key: str) -> None:
        self._channel = _channel(address)
        # Any: without (de)serializers a call speaks bytes, which its types cannot say.
        self._chat: Any = self._channel.unary_stream(_CHAT)
        self._model = model
        self._metadata = (("authorization", f"Bearer {key}"),)

    async def ask(self, asked: Conversation) -> Reply:
        request = asked.chat_request(self._model)
        events: list[bytes] = []
        first = 0.0
        started = time.perf_counter()
        async for event in self._chat(request, metadata=self._metadata):
            events.append(event)
            if len(events) == 2:  # the first says only that it was admitted
                first = time.perf_counter()
        ended = time.perf_counter()
        return Reply(asked, first - started, ended - started, lambda: check_grpc_events(events, asked))

    async def close(self) -> None:
        await self._channel.close()


class EngineClient:
    """The same on an engine itself, with no router between."""

    def __init__(self, address: str) -> None:
        self._channel = _channel(address)
        self._generate: Any = self._channel.unary_stream(
            _GENERATE, request_serializer=engine_pb2.GenerateRequest.SerializeToString
        )
        self._num_asked = 0

    async def ask(self, asked: Conversation) -> Reply:
        self._num_asked += 1
        request = asked.engine_request(str(self._num_asked))
        events: list[bytes] = []
        first = 0.0
        started = time.perf_counter()
        async for event in self._generate(request):
            events.append(event)
            if len(events) == 1:
                first = time.perf_counter()
        ended = time.perf_counter()
        return Reply(asked, first - started, ended - started, lambda: check_engine_events(events, asked))

    async def close(self) -> None:
        await self._channel.close()


def _channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
