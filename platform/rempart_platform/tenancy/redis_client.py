"""The only way to Redis: short time-outs, no retries, a breaker in front, our errors behind.

A Redis that is away is an UNAVAILABLE that may be tried again, never a quota that is used up.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import hiredis
from redis import exceptions
from redis.asyncio import Redis

from rempart_platform.bounds import require_positive
from rempart_platform.breaker import Breaker
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.lua import Script
from rempart_platform.tenancy.pipeline import ConnectionEndedError, Pipeline
from rempart_platform.tenancy.redis_connections import cancellation_kept, is_lost_connection, open_redis

_logger = logging.getLogger(__name__)

T = TypeVar("T")
ScriptReply: TypeAlias = "list[str | int | None]"

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
_MAX_REASON_CHARS = 500
_NOT_NOW = ("BUSY ", "MISCONF ", "NOREPLICAS ", "UNBLOCKED ")
"""redis-py has no names for these: a script runs for seconds, the disk takes nothing more, too few replicas are there,
and the master became a replica while a command waited in it."""


@dataclass(frozen=True, slots=True)
class RedisConfig:
    """Where Redis is and how long it may take.

    `url` is as in `redis_url.py`; it stays out of `repr` because it may hold a password.
    """

    url: str = field(repr=False)
    timeout_s: float = 0.25
    """For a connection, and for an answer once Redis has given all those before it."""
    max_connections: int = 32
    """One of them is for scripts. Of the others, each model whose requests wait for room holds one most of the time."""
    failures_to_open: int = 3
    open_s: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self)
        if self.max_connections < 2:
            raise ValueError("redis_max_connections must be at least 2: one is for scripts")


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


class RedisClient:
    """Runs operations and scripts; made by `connect_redis`.

    Operations have a connection each while they run, scripts have one together. Each script is still run as a whole and
    by itself.

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
        self._places = asyncio.Semaphore(config.max_connections - 1)
        self._being_taught: set[str] = set()
        self._pipeline: Pipeline | None = None
        if isinstance(redis, Redis):  # and no cluster, where each script may be another server's
            self._pipeline = Pipeline(redis.connection_pool, config.timeout_s)

    @property
    def is_available(self) -> bool:
        """False from the failure that opens the breaker to the next success."""
        return not self._breaker.is_open

    async def call(self, operation: Callable[[Redis], Awaitable[T]]) -> T:
        """Runs one operation, such as `lambda redis: redis.ping()`."""
        async with self._places:
            self._require_closed_breaker()
            try:
                with cancellation_kept():
                    result = await operation(self._redis)
            except Exception as error:
                if not _says_away(error):
                    raise
                raise self._away(error) from error
            self._note_answer()
            return result

    async def read_hash(self, key: str) -> dict[str, str]:
        """All fields of a hash; none when there is no such key."""
        stored = await self.call(lambda redis: redis.hgetall(key))
        return {str(name): str(value) for name, value in stored.items()}

    async def write_hash(self, key: str, values: Mapping[str, str | int]) -> None:
        """Sets these fields of a hash and keeps the others."""
        pairs = [part for pair in values.items() for part in pair]
        await self.call(lambda redis: redis.hset(key, items=pairs))

    async def run_script(self, script: Script, keys: Sequence[str], args: Sequence[str | int | float]) -> ScriptReply:
        """Runs a script that answers with a list."""
        if self._pipeline is None:
            return await self.call(lambda redis: _run_script(redis, script, keys, args))
        self._require_closed_breaker()
        try:
            reply = await self._ask(self._pipeline, script, keys, args)
        except Exception as error:
            if not _says_away(error):
                raise
            raise self._away(error) from error
        self._note_answer()
        return reply

    async def _ask(
        self, pipeline: Pipeline, script: Script, keys: Sequence[str], args: Sequence[str | int | float]
    ) -> ScriptReply:
        while True:
            try:
                return await pipeline.ask(_packed("EVALSHA", script.sha1, keys, args))
            except exceptions.NoScriptError:
                # A new server, or one that was restarted. It is sent the text once, and runs what comes behind it.
                if script.sha1 not in self._being_taught:
                    break
        self._being_taught.add(script.sha1)
        try:
            return await pipeline.ask(_packed("EVAL", script.text, keys, args))
        finally:
            self._being_taught.discard(script.sha1)

    async def close(self) -> None:
        """Ends the scripts that are under way."""
        if self._pipeline is not None:
            await self._pipeline.close()

    def _require_closed_breaker(self) -> None:
        wait_s = self._breaker.wait_s()
        if wait_s > 0:
            raise RedisAwayError(wait_s, may_have_run=False)

    def _away(self, error: Exception) -> RedisAwayError:
        was_available = self.is_available
        # All who used a connection when it ended would open the breaker, though the next one may be had at once.
        if not isinstance(error, ConnectionEndedError):
            self._breaker.record_failure()
        if was_available and not self.is_available:
            reason = f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS]
            _logger.warning("Redis does not answer; no request is admitted until it does", extra={"reason": reason})
        return RedisAwayError(self._retry_after_s, may_have_run=True)

    def _note_answer(self) -> None:
        if not self.is_available:
            _logger.info("Redis answers again")
        self._breaker.record_success()


def _says_away(error: Exception) -> bool:
    """Whether it says "not now" of the server; any other error is a mistake of ours and must be seen as such."""
    if isinstance(error, exceptions.ResponseError) and str(error).startswith(_NOT_NOW):
        return True
    if isinstance(error, exceptions.RedisClusterException):
        return error.__cause__ is not None  # no node of the cluster answers; else keys of several slots
    return isinstance(error, _AWAY) or (isinstance(error, AttributeError | TypeError) and is_lost_connection(error))


def _packed(command: str, script: str, keys: Sequence[str], args: Sequence[str | int | float]) -> bytes:
    packed: bytes = hiredis.pack_command((command, script, len(keys), *keys, *args))  # type: ignore[arg-type]
    return packed


async def _run_script(
    redis: Redis, script: Script, keys: Sequence[str], args: Sequence[str | int | float]
) -> ScriptReply:
    try:
        reply = await redis.evalsha(script.sha1, len(keys), *keys, *args)
    except exceptions.NoScriptError:
        reply = await redis.eval(script.text, len(keys), *keys, *args)
    assert isinstance(reply, list), f"script {script.name} must answer with a list"
    return reply


@asynccontextmanager
async def connect_redis(config: RedisConfig, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[RedisClient]:
    """A client with its own connections, which are opened when first needed.

    Raises:
        ValueError: the URL is malformed.
    """
    async with open_redis(config.url, config.timeout_s, config.max_connections) as redis:
        client = RedisClient(redis, Breaker(config.failures_to_open, config.open_s, clock), config)
        try:
            yield client
        finally:
            await client.close()
