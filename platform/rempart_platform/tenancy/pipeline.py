"""One connection to Redis on which many commands are under way at a time.

    ask, ask, ask ──► one write in each pass of the event loop ──► Redis, which answers in order ──► each its own reply

redis-py connects it, with TLS, passwords and Sentinels, and then hands over its transport: its own way of a command and
its reply takes five times the CPU of this one, and has one command under way at a time.
"""

import asyncio
import time
from collections import deque
from contextlib import suppress
from typing import TypeAlias, cast

import hiredis
from redis import exceptions
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection

Reply: TypeAlias = list[str | int | None]

_ERRORS: dict[str, type[exceptions.RedisError]] = {
    "LOADING": exceptions.BusyLoadingError,
    "MASTERDOWN": exceptions.MasterDownError,
    "NOSCRIPT": exceptions.NoScriptError,
    "OOM": exceptions.OutOfMemoryError,
    "READONLY": exceptions.ReadOnlyError,
}
_TOO_MANY_CLIENTS = "ERR max number of clients reached"
_NO_MASTER = (exceptions.BusyLoadingError, exceptions.MasterDownError, exceptions.ReadOnlyError)
"""A replica says so, or one that is becoming it: the next connection asks anew who the master is."""
_READ_S = 0.01
"""More than one pass of the event loop, in which it reads what came while it was busy elsewhere."""


class ConnectionEndedError(exceptions.ConnectionError):
    """The connection is no more. That says nothing of the next one."""


class Pipeline:
    """The commands of one client. Its connection is opened when first needed, and again when it has ended.

    Args:
        pool: where the connection comes from; it takes one place there.
        timeout_s: how long Redis may say nothing while it has something to answer.
    """

    def __init__(self, pool: ConnectionPool, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._open: _OpenPipeline | None = None
        self._taken: AbstractConnection | None = None
        self._opening: asyncio.Task[_OpenPipeline] | None = None
        self._is_closed = False

    async def ask(self, command: bytes) -> Reply:
        """The reply to a command that is packed as Redis reads it.

        Raises:
            redis.exceptions.RedisError: an error reply, or none came; then the command may have run.
            OSError: no connection.
        """
        pipeline = self._open if self._open is not None and self._open.is_open else await self._reopen()
        return await pipeline.ask(command)

    async def close(self) -> None:
        """Ends what is under way and gives the connection back."""
        self._is_closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        await self._give_back()

    async def _reopen(self) -> "_OpenPipeline":
        """One attempt for all who wait for it."""
        if self._is_closed:
            raise _ended("it was closed")
        if self._opening is None:
            self._opening = asyncio.create_task(self._connect())
            self._opening.add_done_callback(self._opened)
        opening = self._opening
        await asyncio.wait([opening])
        if opening.cancelled():
            raise _ended("it was closed")
        return opening.result()

    def _opened(self, opening: "asyncio.Task[_OpenPipeline]") -> None:
        self._opening = None
        if not opening.cancelled():
            opening.exception()  # whoever waited for it may have gone

    async def _connect(self) -> "_OpenPipeline":
        await self._give_back()
        self._taken = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        writer = self._taken._writer  # no public name leads to it
        assert writer is not None, "connected"
        transport = cast(asyncio.Transport, writer.transport)
        self._open = _OpenPipeline(transport, self._timeout_s)
        return self._open

    async def _give_back(self) -> None:
        pipeline, self._open = self._open, None
        if pipeline is not None:
            pipeline.end(_ended("it was closed"))
        taken, self._taken = self._taken, None
        if taken is not None:
            with suppress(OSError, exceptions.RedisError):  # it has ended already
                await taken.disconnect(nowait=True)
            await self._pool.release(taken)


class _OpenPipeline(asyncio.Protocol):
    """One reply that does not come in time ends it, and with it all that was asked: what came later is no reply.

    The time of a command begins when it is the next to be answered, so that many at once are no sign of an outage.
    """

    def __init__(self, transport: asyncio.Transport, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._clock = time.monotonic  # the loop's own may be that of the beginning of a long pass
        self._reader = hiredis.Reader(replyError=_error, encoding="utf-8")
        self._unsent: list[bytes] = []
        self._asked: deque[asyncio.Future[Reply]] = deque()
        self._silent_since_s = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._transport = transport
        self.is_open = True
        transport.set_protocol(self)

    def ask(self, command: bytes) -> "asyncio.Future[Reply]":
        """Raises ConnectionEndedError."""
        if not self.is_open:
            raise _ended("as soon as it was open")
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent.append(command)
        reply: asyncio.Future[Reply] = self._loop.create_future()
        self._asked.append(reply)
        return reply

    def end(self, error: Exception) -> None:
        """Whatever has no reply yet fails with this. Safe to repeat."""
        self.is_open = False
        self._transport.abort()
        if self._watch is not None:
            self._watch.cancel()
        self._unsent.clear()
        while self._asked:
            reply = self._asked.popleft()
            if not reply.done():
                reply.set_exception(error)

    def data_received(self, data: bytes) -> None:
        self._silent_since_s = self._clock()
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                self._answer(reply)
        except (hiredis.HiredisError, UnicodeDecodeError, IndexError) as error:
            self.end(exceptions.ConnectionError(f"Redis sent what is no reply: {error!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(_ended(f"Redis closed it: {exc!r}"))

    def _answer(self, reply: Reply | Exception) -> None:
        waiting = self._asked.popleft()
        if isinstance(reply, _NO_MASTER):
            self._loop.call_soon(self.end, _ended(str(reply)))  # after what came together with it
        if waiting.done():  # whoever asked has gone
            return
        if isinstance(reply, Exception):
            waiting.set_exception(reply)
        else:
            waiting.set_result(reply)

    def _send(self) -> None:
        if not self._unsent:  # it has ended meanwhile
            return
        if len(self._unsent) == len(self._asked):
            self._silent_since_s = self._clock()
        self._transport.write(b"".join(self._unsent))
        self._unsent.clear()
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._look)

    def _look(self) -> None:
        """One timer for all."""
        self._watch = None
        if not self._asked:
            return
        left_s = self._silent_since_s + self._timeout_s - self._clock()
        if left_s > 0:
            self._watch = self._loop.call_later(left_s, self._look)
        else:
            self._watch = self._loop.call_later(_READ_S, self._end_unless_heard, self._silent_since_s)

    def _end_unless_heard(self, silent_since_s: float) -> None:
        if self._silent_since_s == silent_since_s:
            self.end(exceptions.TimeoutError(f"Redis did not answer within {self._timeout_s} s."))
        else:
            self._look()


def _ended(why: str) -> ConnectionEndedError:
    return ConnectionEndedError(f"The connection to Redis has ended: {why}.")


def _error(text: str) -> exceptions.RedisError:
    """redis-py's name for an error reply, as its own reader would have it."""
    if text == _TOO_MANY_CLIENTS:
        return exceptions.ConnectionError(text)
    kind = _ERRORS.get(text.partition(" ")[0], exceptions.ResponseError)
    return kind(text)
