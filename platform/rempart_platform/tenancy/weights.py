"""The weights of tenants in the fair queue, remembered for a while.

They lie in the tenants' records, which are in other slots of a cluster than a model's queue: no script reads both.
"""

import math
from collections import OrderedDict
from collections.abc import Callable

from rempart_platform.tenancy.keyspace import TenantKeys
from rempart_platform.tenancy.redis_client import RedisClient

DEFAULT_WEIGHT = 1.0
_CAPACITY = 10_000


class TenantWeights:
    """Reads the field `weight` of tenants' records.

    Args:
        memory_s: for how long a weight is not read again.
        clock: monotonic seconds.
    """

    def __init__(self, redis: RedisClient, memory_s: float, clock: Callable[[], float]) -> None:
        self._redis = redis
        self._memory_s = memory_s
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def of(self, tenant: str) -> float:
        """Raises RedisAwayError."""
        known = self._known.get(tenant)
        if known is not None and self._clock() < known[1]:
            return known[0]
        stored = await self._redis.call(lambda redis: redis.hget(TenantKeys(tenant).tenant, "weight"))
        weight = _parse(stored)
        self._known[tenant] = weight, self._clock() + self._memory_s
        self._known.move_to_end(tenant)
        if len(self._known) > _CAPACITY:
            self._known.popitem(last=False)
        return weight


def _parse(stored: object) -> float:
    """A record that somebody spoiled must not stop its tenant, nor the queue."""
    try:
        weight = float(str(stored))
    except ValueError:
        return DEFAULT_WEIGHT
    return weight if 0 < weight < math.inf else DEFAULT_WEIGHT
