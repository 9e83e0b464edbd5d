"""Many records of Redis at a time."""

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from rempart_platform.tenancy.redis_client import RedisClient

_PER_CALL = 100


async def read_records(redis: RedisClient, keys: Sequence[str]) -> list[dict[str, str]]:
    """Hashes by key, in order; an empty one where there is none."""
    found: list[dict[str, str]] = []
    for start in range(0, len(keys), _PER_CALL):
        found += await _read(redis, keys[start : start + _PER_CALL])
    return found


async def _read(redis: RedisClient, keys: Sequence[str]) -> list[dict[str, str]]:
    async def ask(connected: Redis) -> list[Any]:
        pipeline = connected.pipeline(transaction=False)
        for key in keys:
            pipeline.hgetall(key)
        return list(await pipeline.execute())

    return [{str(name): str(value) for name, value in each.items()} for each in await redis.call(ask)]
