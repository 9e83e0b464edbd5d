"""The only way to Redis: short time-outs, no retries, a breaker in front, our errors behind.

A Redis that is away is an UNAVAILABLE that may be tried again, never a quota that is used up.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import hiredis
from redis import exceptions
from redis.asyncio import ConnectionPool, Redis

from rempart_platform.breaker import Breaker
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.lua import Script
from rempart_platform.tenancy.redis_connections import is_lost_connection, open_redis

T = TypeVar("T")
ScriptReply: TypeAlias = "list[str | int | None]"
_Outcome: TypeAlias = "ScriptReply | Exception"

# What says "not now" about the server. Any other error of redis-py is a mistake of ours and must be seen as such.
_AWAY = (
    OSError,
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.ClusterDownError,
    exceptions.ClusterError,
    exceptions.SlotNotCoveredError,
)
# redis-py has no names for these: too few replicas are there, or the disk takes nothing more.
_TAKES_NO_WRITES = ("NOREPLICAS ", "MISCONF ")


@dataclass(frozen=True, slots=True)
class RedisConfig:
    """Where Redis is and how long it may take.

    `url` is as in `redis_url.py`; it stays out of `repr` because it may hold a password.
    """

    url: str = field(repr=False)
    timeout_s: float = 0.25
    """For a connection and for an answer, each."""
    max_connections: int = 32
    max_batch: int = 32
    """Most scripts that share a round trip."""
    failures_to_open: int = 3
    open_s: float = 1.0

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError("redis_max_batch must be at least 1")


class RedisAwayError(RempartError):
    """Redis did not answer: UNAVAILABLE, with a `retry_after_s`."""

    def __init__(self, retry_after_s: float, *, may_have_run: bool) -> None:
        super().__init__(
            ErrorKind.UNAVAILABLE,
            "The service cannot check keys and quotas at the moment.",
            retry_after_s=retry_after_s,
        )
        self.may_have_run = may_have_run
        """False: the operation was not sent, because the breaker was open."""

    def again(self) -> "RedisAwayError":
        """The same for another caller."""
        return RedisAwayError(self.retry_after_s or 0.0, may_have_run=self.may_have_run)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A script that is to be run, and who waits for its reply."""

    script: Script
    keys: Sequence[str]
    args: Sequence[str | int]
    reply: "asyncio.Future[ScriptReply]"


class RedisClient:
    """Runs operations and scripts; made by `connect_redis`.

    Scripts that are asked for while a round trip waits for the next pass of the event loop, or for a connection, share
    it. Each is still run as a whole and by itself.

    Raises:
        RedisAwayError: Redis does not answer.
    """

    def __init__(self, redis: Redis, breaker: Breaker, config: RedisConfig) -> None:
        self._redis = redis
        self._breaker = breaker
        self._retry_after_s = config.open_s
        self.timeout_s = config.timeout_s
        """For an answer; an operation that blocks must end before."""
        # A burst waits here and not in the pool: when Redis hangs, those who wait then meet the open breaker.
        self._places = asyncio.Semaphore(config.max_connections)
        self._max_batch = config.max_batch
        self._batch: list[_Asked] | None = None  # what the next round trip takes along
        self._sending: set[asyncio.Task[None]] = set()

    @property
    def is_available(self) -> bool:
        """False from the failure that opens the breaker to the next success."""
        return not self._breaker.is_open

    async def call(self, operation: Callable[[Redis], Awaitable[T]]) -> T:
        """Runs one operation, such as `lambda redis: redis.ping()`."""
        async with self._places:
            wait_s = self._breaker.wait_s()
            if wait_s > 0:
                raise RedisAwayError(wait_s, may_have_run=False)
            try:
                result = await operation(self._redis)
            except _AWAY as error:
                raise self._away() from error
            except exceptions.ResponseError as error:
                if not _says_away(error):
                    raise
                raise self._away() from error
            except exceptions.RedisClusterException as error:
                if error.__cause__ is None:  # keys of several slots: a mistake of ours
                    raise
                raise self._away() from error  # no node of the cluster answers
            except (AttributeError, TypeError) as error:
                if not is_lost_connection(error):
                    raise
                raise self._away() from error
            self._breaker.record_success()
            return result

    def _away(self) -> RedisAwayError:
        self._breaker.record_failure()
        return RedisAwayError(self._retry_after_s, may_have_run=True)

    async def read_hash(self, key: str) -> dict[str, str]:
        """All fields of a hash; none when there is no such key."""
        stored = await self.call(lambda redis: redis.hgetall(key))
        return {str(name): str(value) for name, value in stored.items()}

    async def write_hash(self, key: str, values: Mapping[str, str | int]) -> None:
        """Sets these fields of a hash and keeps the others."""
        pairs = [part for pair in values.items() for part in pair]
        await self.call(lambda redis: redis.hset(key, items=pairs))

    async def run_script(self, script: Script, keys: Sequence[str], args: Sequence[str | int]) -> ScriptReply:
        """Runs a script that answers with a list."""
        if not isinstance(self._redis, Redis):  # a cluster: each script may be another server's
            return await self.call(lambda redis: _run_script(redis, script, keys, args))
        asked = _Asked(script, keys, args, asyncio.get_running_loop().create_future())
        if self._batch is None or len(self._batch) >= self._max_batch:
            self._batch = []
            sending = asyncio.create_task(self._send(self._batch))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
        self._batch.append(asked)
        return await asked.reply

    async def _send(self, batch: list[_Asked]) -> None:
        """Answers all of a batch, whatever happens."""
        try:
            replies = await self.call(lambda redis: self._run_batch(redis, batch))
        except RedisAwayError as error:
            replies = [error.again() for _ in batch]
        except Exception as error:
            replies = [error for _ in batch]
        except BaseException:
            for asked in batch:
                asked.reply.cancel()
            raise
        finally:
            self._close(batch)
        for asked, reply in zip(batch, replies, strict=True):
            if asked.reply.done():  # whoever asked has gone
                continue
            if _says_away(reply):
                asked.reply.set_exception(RedisAwayError(self._retry_after_s, may_have_run=True))
            elif isinstance(reply, Exception):
                asked.reply.set_exception(reply)
            else:
                asked.reply.set_result(reply)

    async def _run_batch(self, redis: Redis, batch: list[_Asked]) -> list[_Outcome]:
        self._close(batch)
        return await _run_scripts(redis, batch)

    def _close(self, batch: list[_Asked]) -> None:
        """Nothing more joins it."""
        if self._batch is batch:
            self._batch = None


def _says_away(reply: object) -> bool:
    return isinstance(reply, _AWAY) or (
        isinstance(reply, exceptions.ResponseError) and str(reply).startswith(_TAKES_NO_WRITES)
    )


async def _run_script(redis: Redis, script: Script, keys: Sequence[str], args: Sequence[str | int]) -> ScriptReply:
    try:
        reply = await redis.evalsha(script.sha1, len(keys), *keys, *args)
    except exceptions.NoScriptError:
        # A new server, or one that was restarted. EVAL also teaches it the script.
        reply = await redis.eval(script.text, len(keys), *keys, *args)
    assert isinstance(reply, list), f"script {script.name} must answer with a list"
    return reply


async def _run_scripts(redis: Redis, batch: Sequence[_Asked]) -> list[_Outcome]:
    """In one round trip. Raises what says that the server is away, when it says so to all."""
    replies = await _exchange(redis.connection_pool, [_evalsha(asked) for asked in batch])
    for position, (asked, reply) in enumerate(zip(batch, replies, strict=True)):
        if isinstance(reply, exceptions.NoScriptError):
            try:
                replies[position] = await _run_script(redis, asked.script, asked.keys, asked.args)
            except exceptions.ResponseError as error:
                replies[position] = error
    if all(map(_says_away, replies)) and isinstance(replies[0], Exception):
        raise replies[0]
    return replies


def _evalsha(asked: _Asked) -> bytes:
    """By hiredis, and not by redis-py's own pipeline, which takes five times as long for so many arguments."""
    command = ("EVALSHA", asked.script.sha1, len(asked.keys), *asked.keys, *asked.args)
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub says: a tuple of one
    return packed


async def _exchange(pool: ConnectionPool, commands: Sequence[bytes]) -> list[_Outcome]:
    """All of them up, then all replies down. Whatever else than a reply comes ends the connection."""
    connection = await pool.get_connection()  # type: ignore[no-untyped-call]
    replies: list[_Outcome] = []
    try:
        await connection.send_packed_command([b"".join(commands)])
        for _ in commands:
            try:
                replies.append(await connection.read_response())
            except exceptions.ResponseError as error:
                replies.append(error)
    except BaseException:
        await connection.disconnect(nowait=True)  # replies may be left on it
        raise
    finally:
        await pool.release(connection)
    return replies


@asynccontextmanager
async def connect_redis(config: RedisConfig, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[RedisClient]:
    """A client with its own connections, which are opened when first needed.

    Raises:
        ValueError: the URL is malformed.
    """
    async with open_redis(config.url, config.timeout_s, config.max_connections) as redis:
        yield RedisClient(redis, Breaker(config.failures_to_open, config.open_s, clock), config)
