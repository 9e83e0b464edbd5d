"""What happens beside a request's work: watching for the client's end, and keeping a silent stream alive."""

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Mapping

from starlette.datastructures import Headers
from starlette.types import Receive, Send

_SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx and its kin would collect the stream otherwise
}
_logger = logging.getLogger(__name__)
_KEEPALIVE = b": keepalive\n\n"


class _ClientGoneError(Exception):
    """The client closed its connection."""


async def run_while_connected(
    receive: Receive, work: Awaitable[None], beside: Coroutine[None, None, None] | None = None
) -> None:
    """Awaits `work`, with `beside` running as long. A client that goes away cancels both at once.

    The request's body must have been read: what comes next from `receive` is its end.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            helpers = [tasks.create_task(_watch(receive))]
            if beside is not None:
                helpers.append(tasks.create_task(beside))
            await work
            for helper in helpers:
                helper.cancel()
    except* _ClientGoneError:
        _logger.debug("a client closed its connection before the end of its answer")


async def _watch(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise _ClientGoneError


class EventStream:
    """A response of server-sent events. Until its first bytes, an error can still have a status of its own."""

    def __init__(self, send: Send, keepalive_s: float) -> None:
        self._send = send
        self._keepalive_s = keepalive_s
        self._headers: Mapping[str, str] = {}
        self._is_open = asyncio.Event()
        self._lock = asyncio.Lock()
        self._clock = asyncio.get_running_loop().time
        self._last_write = 0.0
        self.is_started = False

    def open(self, headers: Mapping[str, str]) -> None:
        """From here on the response may start, with these headers."""
        self._headers = headers
        self._last_write = self._clock()
        self._is_open.set()

    async def write(self, data: bytes, *, is_last: bool = False) -> None:
        """Sends whole events; waits while the client is slow."""
        async with self._lock:
            if not self.is_started:
                self.is_started = True
                headers = Headers({**self._headers, **_SSE_HEADERS})
                await self._send({"type": "http.response.start", "status": 200, "headers": headers.raw})
            await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})
            self._last_write = self._clock()

    async def keep_alive(self) -> None:
        """Sends a comment whenever the stream has been silent too long, until cancelled."""
        await self._is_open.wait()
        while True:
            silent_s = self._clock() - self._last_write
            if silent_s >= self._keepalive_s:
                await self.write(_KEEPALIVE)
            else:
                await asyncio.sleep(self._keepalive_s - silent_s)
