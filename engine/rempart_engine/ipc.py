"""What engine front and engine core say to each other, and how it crosses the socket between them.

A frame is a 4-byte big-endian length and that many bytes of MessagePack. Values of `rempart_engine.core` travel as
they are. The front's end of the socket never blocks (asyncio); the core's end blocks only when the core has no work.
"""

import asyncio
import contextlib
import select
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from rempart_engine.config import EngineConfig
from rempart_engine.core.load import Load
from rempart_engine.core.request import Request, RequestId
from rempart_engine.core.step import TokenEvent

_LENGTH_BYTES = 4
_READ_BYTES = 1 << 18
_SEND_BUFFER_BYTES = 1 << 20
"""Room for many steps' events, so that a busy front does not hold up the core."""


class Configure(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """First message to the core: load this."""

    config: EngineConfig


class Start(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Start a request; its deadline is on `time.monotonic`, which both processes share."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """End a request."""

    request_id: RequestId


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Leave the loop and exit with code 0."""


class Loading(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """How much of the weights is loaded."""

    fraction: float


class LoadFailed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The model cannot be loaded; the core exits."""

    message: str


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The model is loaded; facts about it, as in `LoadedModel`."""

    model_name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    dtype: str
    max_num_rows: int = 0
    """Most sequences that run at once; 0 is not told."""


class StepUpdate(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What one pass of the loop brought. Sent alone as a sign of life while idle (`num_tokens` is 0 then)."""

    events: tuple[TokenEvent, ...]
    load: Load
    num_tokens: int
    """Tokens computed by the step."""
    duration_s: float
    """From decision to commit."""


FrontMessage = Configure | Start | Abort | Stop
CoreMessage = Loading | LoadFailed | Ready | StepUpdate


class FrameSplitter:
    """Cuts a byte stream into the payloads of its frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Take the next bytes; yield every payload that is complete now."""
        self._buffer += chunk
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            payload_start = start + _LENGTH_BYTES
            end = payload_start + int.from_bytes(self._buffer[start:payload_start], "big")
            if len(self._buffer) < end:
                break
            yield bytes(self._buffer[payload_start:end])
            start = end
        del self._buffer[:start]


def _to_plain(value: object) -> object:
    """Of what msgspec does not know itself, the messages hold paths and read-only mappings."""
    match value:
        case Path():
            return str(value)
        case Mapping():
            return dict(value)
        case _:
            raise NotImplementedError(f"cannot send a {type(value).__name__}")


def _from_plain(kind: type[Any], plain: Any) -> Any:
    if kind is Path:
        return Path(plain)
    raise NotImplementedError(f"cannot receive a {kind.__name__}")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_plain)


def encode_frame(message: FrontMessage | CoreMessage) -> bytes:
    payload = _ENCODER.encode(message)
    return len(payload).to_bytes(_LENGTH_BYTES, "big") + payload


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Connected stream sockets: the front's end, the core's end."""
    front, core = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (front, core):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return front, core


class FrontGoneError(Exception):
    """The front closed its end or died."""


class CoreChannel:
    """The core's end: blocking, for one thread."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._end.setblocking(True)
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)
        self._splitter = FrameSplitter()
        self._decoder: msgspec.msgpack.Decoder[FrontMessage] = msgspec.msgpack.Decoder(
            FrontMessage, dec_hook=_from_plain
        )

    def send(self, message: CoreMessage) -> None:
        """Raises FrontGoneError."""
        try:
            self._end.sendall(encode_frame(message))
        except ConnectionError as error:
            raise FrontGoneError from error

    def receive(self, timeout_s: float | None) -> list[FrontMessage]:
        """All messages at hand; waits up to `timeout_s` (None: for ever, 0: not at all) when there is none.

        Raises:
            FrontGoneError: nobody will send again.
        """
        messages: list[FrontMessage] = []
        if not self._poll.poll(None if timeout_s is None else timeout_s * 1000):
            return messages
        while True:
            try:
                chunk = self._end.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            except ConnectionError as error:
                raise FrontGoneError from error
            if not chunk:
                raise FrontGoneError
            messages.extend(self._decoder.decode(payload) for payload in self._splitter.feed(chunk))


class FrontChannel:
    """The front's end: asyncio."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> "FrontChannel":
        reader, writer = await asyncio.open_unix_connection(sock=end, limit=_READ_BYTES)
        return cls(reader, writer)

    def send(self, message: FrontMessage) -> None:
        """Queue a message. The caller bounds what a core that does not read can pile up here."""
        self._writer.write(encode_frame(message))

    async def messages(self) -> AsyncIterator[CoreMessage]:
        """Messages as they come, until the core closes its end or dies."""
        splitter = FrameSplitter()
        decoder: msgspec.msgpack.Decoder[CoreMessage] = msgspec.msgpack.Decoder(CoreMessage)
        with contextlib.suppress(ConnectionError):  # a way to die like any other
            while chunk := await self._reader.read(_READ_BYTES):
                for payload in splitter.feed(chunk):
                    yield decoder.decode(payload)

    def close(self) -> None:
        self._writer.close()
