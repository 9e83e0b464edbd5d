"""Limits on HTTP connections: nobody holds one open for free.

    accepted ──► head (deadline, size) ──► body (deadline, rate, size: http_body.py) ──► response (write deadline)
       ▲ total number                                                                       │
       └────────────────────── idle (deadline) ◄────────────────────────────────────────────┘

uvicorn has none of these but the idle one; its protocol class is extended here.
"""

import asyncio
import socket
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from rempart_platform.apis.openai_errors import error_body
from rempart_platform.apis.pace import Pace
from rempart_platform.bounds import require_positive
from rempart_platform.errors import ErrorKind, RempartError


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits of one HTTP server."""

    max_connections: int = 4096
    """At a time; further ones are refused."""
    max_head_bytes: int = 64 * 1024
    """Of the request line and the headers."""
    head_timeout_s: float = 10.0
    """From the first byte of a request, or from the accept, to the end of its headers."""
    idle_timeout_s: int = 30
    """Between two requests of a connection."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Of a request that uploads no file."""
    body_timeout_s: float = 30.0
    """For how long a body is waited for in all."""
    min_body_bytes_per_s: int = 1024
    """The least rate of a body; 0 is none."""
    body_grace_s: float = 5.0
    """How far a body may lag behind the least rate."""
    upload_timeout_s: float = 3600.0
    """For a file's body, in place of `body_timeout_s`; the least rate is the same. Uploads over gRPC too."""
    max_form_parts: int = 16
    """Of an upload's form: its file and its fields."""
    max_part_head_bytes: int = 4096
    """Headers of one part, and the form's own content-type."""
    max_field_bytes: int = 1024
    """Of one field that is no file."""
    discard_timeout_s: float = 2.0
    """How long an early answer waits for the rest of the body, which a client may be too busy sending to read it."""
    max_json_nodes: int = 200_000
    """Values in the body."""
    max_json_depth: int = 64
    """How deep the body may nest."""
    write_timeout_s: float = 30.0
    """How long a client may leave a full send buffer untouched."""
    send_buffer_bytes: int = 64 * 1024
    """Of the socket. What a slow reader does not take piles up here and in as much again of ours, no further."""
    keepalive_s: float = 15.0
    """A stream with nothing to say sends a comment this often."""

    def __post_init__(self) -> None:
        require_positive(self, or_zero=("idle_timeout_s", "min_body_bytes_per_s", "body_grace_s", "discard_timeout_s"))

    @property
    def body_pace(self) -> Pace:
        return Pace(self.body_timeout_s, self.min_body_bytes_per_s, self.body_grace_s)

    @property
    def upload_pace(self) -> Pace:
        return Pace(self.upload_timeout_s, self.min_body_bytes_per_s, self.body_grace_s)


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection with deadlines on every state."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: HttpLimits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._limits.send_buffer_bytes)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(RempartError(ErrorKind.UNAVAILABLE, "Too many connections.", retry_after_s=1.0))
        else:
            self._start_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer("_head_timer")
        self._stop_timer("_write_timer")
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if not self._is_idle or self.transport.is_closing():
            return  # a head mostly comes whole, and needs no timer then
        if self._head_timer is None:
            self._start_head()
        # A read that brings the end of a head and much of a body is at most one read buffer long.
        self._head_bytes += len(data)
        if self._head_bytes > self._limits.max_head_bytes:
            message = f"The request's head has more than {self._limits.max_head_bytes} bytes (limit max_head_bytes)."
            self._refuse(RempartError(ErrorKind.REQUEST_TOO_LARGE, message))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._is_idle:
            # No client of ours pipelines, and requests that wait unread would hold memory for free.
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._stop_timer("_head_timer")
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_unless_written()

    def send_400_response(self, msg: str) -> None:
        self._refuse(RempartError(ErrorKind.INVALID_REQUEST, msg))

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_unless_written()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_unless_written()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_timer("_write_timer")

    @property
    def _is_idle(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _start_head(self) -> None:
        self._head_bytes = 0
        timed_out = RempartError(ErrorKind.REQUEST_TIMEOUT, "The request's headers took too long.")
        self._head_timer = self.loop.call_later(self._limits.head_timeout_s, self._refuse, timed_out)

    def _abort_unless_written(self) -> None:
        """Gives the client a last while to take what is in the send buffer."""
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)

    def _stop_timer(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

    def _refuse(self, error: RempartError) -> None:
        """Answers on the connection itself, outside of any request, and closes it."""
        self._stop_timer("_head_timer")
        if self.transport.is_closing():
            return
        if not self._is_idle:
            self.transport.abort()  # an answer here would end up inside of another one
            return
        body = error_body(error)
        status = HTTPStatus(error.answer.http_status)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
        self._abort_unless_written()
