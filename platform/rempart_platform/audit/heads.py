"""Where every chain stands, in Redis: a segment that is removed from the end of a chain is missed here.

What storage tells and what Redis tells is kept by different hands; whoever wants to hide the past needs both.
"""

from rempart_platform.audit.check import BadChainError, Head
from rempart_platform.tenancy.keyspace import AUDIT_BEGINNINGS, AUDIT_HEADS
from rempart_platform.tenancy.redis_client import RedisClient


class HeadStore:
    """Heads by chain.

    Raises:
        RedisAwayError: Redis does not answer.
    """

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    async def write(self, chain: str, head: Head) -> None:
        await self._redis.write_hash(AUDIT_HEADS, {chain: f"{head.last} {head.link.hex()}"})

    async def read(self, chain: str) -> Head | None:
        """None when Redis does not know the chain. Raises BadChainError when it says what no router wrote."""
        stored = await self._redis.call(lambda redis: redis.hget(AUDIT_HEADS, chain))
        try:
            return None if stored is None else _parse(str(stored))
        except ValueError:
            raise BadChainError(f"chain {chain}: what Redis says of it cannot be read") from None

    async def write_beginning(self, chain: str, first: int) -> None:
        """Remembers that records before this one may be gone; never that it were fewer."""
        await self._redis.call(lambda redis: redis.zadd(AUDIT_BEGINNINGS, {chain: first}, gt=True))

    async def beginning(self, chain: str) -> int:
        """Of the records before this one, all may have been removed for their age."""
        first = await self._redis.call(lambda redis: redis.zscore(AUDIT_BEGINNINGS, chain))
        return int(first or 0)

    async def chains(self) -> set[str]:
        """Names of all that there have ever been."""
        return {str(name) for name in await self._redis.call(lambda redis: redis.hkeys(AUDIT_HEADS))}


def _parse(stored: str) -> Head:
    last, _, link = stored.partition(" ")
    return Head(int(last), bytes.fromhex(link))
