"""The only way to Redis: short time-outs, no retries, a breaker in front, our errors behind.

A Redis that is away is an UNAVAILABLE that may be tried again, never a quota that is used up.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rempart_platform.breaker import Breaker
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.lua import Script

T = TypeVar("T")
ScriptReply: TypeAlias = "list[str | int | None]"

# What says "not now" about the server. Any other error of redis-py is a mistake of ours and must be seen as such.
_AWAY = (
    OSError,
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.ClusterDownError,
)


@dataclass(frozen=True, slots=True)
class RedisConfig:
    """Where Redis is and how long it may take.

    `url` is redis://, rediss:// or unix://; it stays out of `repr` because it may hold a password.
    """

    url: str = field(repr=False)
    timeout_s: float = 0.25
    """For a connection and for an answer, each."""
    max_connections: int = 32
    failures_to_open: int = 3
    open_s: float = 1.0


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
                self._breaker.record_failure()
                raise RedisAwayError(self._retry_after_s, may_have_run=True) from error
            self._breaker.record_success()
            return result

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

        async def run(redis: Redis) -> ScriptReply:
            try:
                reply = await redis.evalsha(script.sha1, len(keys), *keys, *args)
            except exceptions.NoScriptError:
                # A new server, or one that was restarted. EVAL also teaches it the script.
                reply = await redis.eval(script.text, len(keys), *keys, *args)
            assert isinstance(reply, list), f"script {script.name} must answer with a list"
            return reply

        return await self.call(run)


@asynccontextmanager
async def connect_redis(config: RedisConfig, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[RedisClient]:
    """A client with its own connections, which are opened when first needed."""
    pool = ConnectionPool.from_url(
        config.url,
        max_connections=config.max_connections,
        socket_timeout=config.timeout_s,
        socket_connect_timeout=config.timeout_s,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
        # RESP2 and no CLIENT SETINFO: nothing that Redis 7.0 would refuse, and fewer round trips to connect.
        protocol=2,
        driver_info=None,
    )
    redis = Redis.from_pool(pool)
    try:
        yield RedisClient(redis, Breaker(config.failures_to_open, config.open_s, clock), config)
    finally:
        await redis.aclose()
