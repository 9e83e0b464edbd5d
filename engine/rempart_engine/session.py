"""What one caller's stream has not taken yet: bounded, and never in the way of other streams."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from rempart_protos.v1 import engine_pb2

_MAX_UPDATE_BYTES = 1 << 20
"""Events of several steps are sent together when the caller is behind, but stay below gRPC's default limit of 4 MiB."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a session ends: the status of its stream."""

    code: grpc.StatusCode
    message: str


class CallerSession:
    """Outbound side of one stream. Whoever pushes never waits; whoever is too slow for its own events ends alone."""

    def __init__(self, namespace: str, max_buffer_bytes: int) -> None:
        self.namespace = namespace
        """Its request ids are unique within it; no other stream's commands reach them."""
        self.takes_requests = True
        self.ending: Ending | None = None
        self.dropped = asyncio.Event()
        """Set when the stream must end although its caller has not taken everything."""
        self._max_buffer_bytes = max_buffer_bytes
        self._events: deque[tuple[engine_pb2.TokenEvent, int]] = deque()
        self._buffer_bytes = 0
        self._load: engine_pb2.EngineLoad | None = None
        self._wake = asyncio.Event()

    def push(self, event: engine_pb2.TokenEvent) -> None:
        """Queue an event, or end the session when its buffer is full. Events after the end are forgotten."""
        if self.ending is not None:
            return
        size = event.ByteSize()
        if self._buffer_bytes + size > self._max_buffer_bytes:
            self._overflow()
            return
        self._events.append((event, size))
        self._buffer_bytes += size
        self._wake.set()

    def push_load(self, load: engine_pb2.EngineLoad) -> None:
        """Send the load with the next update; a later one takes the place of one not sent yet."""
        if self.ending is None:
            self._load = load
            self._wake.set()

    def end(self, code: grpc.StatusCode, message: str = "", *, instead: bool = False) -> None:
        """End the stream after what is queued. The first ending counts, unless this one shall stand `instead`."""
        if self.ending is None or instead:
            self.ending = Ending(code, message)
            self._wake.set()

    async def updates(self) -> AsyncIterator[engine_pb2.SessionUpdate]:
        """What to send, as it comes; everything from one step in one update. Stops at the end of the session."""
        while True:
            await self._wake.wait()
            if self._events or self._load is not None:
                yield self._take()
            elif self.ending is not None:
                return
            else:
                self._wake.clear()

    def _take(self) -> engine_pb2.SessionUpdate:
        events: list[engine_pb2.TokenEvent] = []
        num_bytes = 0
        while self._events and (not events or num_bytes + self._events[0][1] <= _MAX_UPDATE_BYTES):
            event, size = self._events.popleft()
            events.append(event)
            num_bytes += size
        self._buffer_bytes -= num_bytes
        load, self._load = self._load, None
        return engine_pb2.SessionUpdate(events=events, load=load)

    def _overflow(self) -> None:
        self.end(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"events worth more than max_session_buffer_bytes = {self._max_buffer_bytes} were not taken",
        )
        self._events.clear()
        self._buffer_bytes = 0
        self._load = None
        self.dropped.set()
