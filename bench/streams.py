"""Many streams at once, counted through a window of time; what came before it and what comes after counts for nothing.

    connect ── all streams run ──┤ mark          window          mark ├── close
                                 tokens that came in between, each checked

Connections ask again as soon as they have their answer, and keep every byte; all is read when the window is over. A
router that is too slow to end a single answer has its tokens counted all the same.
"""

import asyncio
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

from bench.clients import body_of
from bench.conversation import Conversation, WrongOutputError, check_http_stream, texts_of_events

_END_OF_CHUNKS = b"\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Script:
    """A chat, how it is asked, and where in its text each token ends."""

    asked: Conversation
    request: bytes
    ends: tuple[int, ...]

    @classmethod
    def of(cls, asked: Conversation, pieces: Sequence[str], model: str, key: str) -> "Script":
        """`pieces`: the text of each token."""
        request = asked.http_request(model, key, stream=True)
        return cls(asked, request, tuple(accumulate(len(piece) for piece in pieces)))

    def num_tokens(self, response: bytes) -> int:
        """Tokens in a response, or in as much of it as has come. Raises WrongOutputError."""
        if not response:
            return 0
        body = body_of(response)
        if response.endswith(_END_OF_CHUNKS):
            check_http_stream(body, self.asked)
            return len(self.ends)
        text = "".join(texts_of_events(body[: body.rfind(b"\n\n") + 2]))
        if not self.asked.text.startswith(text):
            raise WrongOutputError("a stream came with a wrong text")
        return bisect_right(self.ends, len(text))


@dataclass(frozen=True, slots=True)
class _Mark:
    """A place in what a connection was sent: an answer, and the number of its bytes."""

    answer: int
    num_bytes: int


class _StreamConnection(asyncio.Protocol):
    """Asks for one answer after the other."""

    def __init__(self, scripts: Sequence[Script], first: int) -> None:
        self._scripts = scripts
        self._first = first
        self._answers: list[bytearray] = []
        self._transport: asyncio.WriteTransport | None = None
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's own class, under no class of asyncio

    def data_received(self, data: bytes) -> None:
        answer = self._answers[-1]
        answer += data
        if answer.endswith(_END_OF_CHUNKS):
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def ask(self) -> None:
        assert self._transport is not None, "connected"
        self._answers.append(bytearray())
        self._transport.write(self._script(len(self._answers) - 1).request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def mark(self) -> _Mark:
        return _Mark(len(self._answers) - 1, len(self._answers[-1]))

    def num_tokens(self, mark: _Mark) -> int:
        """Tokens up to the mark."""
        whole = sum(self._script(number).num_tokens(bytes(self._answers[number])) for number in range(mark.answer))
        partial = bytes(self._answers[mark.answer][: mark.num_bytes])
        return whole + self._script(mark.answer).num_tokens(partial)

    def _script(self, number: int) -> Script:
        return self._scripts[(self._first + number) % len(self._scripts)]


@dataclass(frozen=True, slots=True)
class Window:
    """What came through it."""

    seconds: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


class Streams:
    """Connections to one router; made by `connect`."""

    def __init__(self, connections: Sequence[_StreamConnection]) -> None:
        self._connections = connections

    @classmethod
    async def connect(cls, port: int, scripts: Sequence[Script], number: int) -> "Streams":
        """Opens that many, all of which ask at once."""
        connections = [await _open(port, _StreamConnection(scripts, first)) for first in range(number)]
        for connection in connections:
            connection.ask()
        return cls(connections)

    async def measure(self, seconds: float) -> Window:
        """Opens the window now. Raises WrongOutputError."""
        opened, before = time.perf_counter(), [connection.mark() for connection in self._connections]
        await asyncio.sleep(seconds)
        closed, after = time.perf_counter(), [connection.mark() for connection in self._connections]
        if any(connection.is_lost for connection in self._connections):
            raise WrongOutputError("a stream was cut")
        self.close()
        num_tokens = sum(
            connection.num_tokens(end) - connection.num_tokens(start)
            for connection, start, end in zip(self._connections, before, after, strict=True)
        )
        return Window(closed - opened, num_tokens)

    def close(self) -> None:
        """Cuts all of them. Safe to repeat."""
        for connection in self._connections:
            connection.close()


async def _open(port: int, connection: _StreamConnection) -> _StreamConnection:
    await asyncio.get_running_loop().create_connection(lambda: connection, "127.0.0.1", port)
    return connection
