"""Plans: named sets of limits, and a standing, that tenants inherit."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.keyspace import PLANS, plan_record
from rempart_platform.tenancy.limits import LimitSet
from rempart_platform.tenancy.names import is_name, require_name
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.standing import OwnStanding, RecordChange


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan as it is stored."""

    name: str
    limits: LimitSet
    created_s: int
    standing: OwnStanding = OwnStanding()


class PlanRegistry:
    """Makes, changes and removes plans. Routers notice within `terms.TERMS_S`.

    Raises:
        RempartError: INVALID_REQUEST or NOT_FOUND; UNAVAILABLE when Redis does not answer.
    """

    def __init__(self, redis: RedisClient, clock: Callable[[], float] = time.time) -> None:
        self._redis = redis
        self._clock = clock

    async def set(self, name: str, *changes: RecordChange) -> Plan:
        """Changes a plan, or makes it first."""
        require_name(name, "A plan's name", "name")
        fields = [field for change in changes for field in change.removed()]
        values = {field: value for change in changes for field, value in change.written().items()}
        # Listed first: a crash in between leaves a name that `list` skips.
        await self._redis.call(lambda redis: redis.sadd(PLANS, name))
        await self._redis.call(lambda redis: redis.hsetnx(plan_record(name), "created_s", str(int(self._clock()))))
        if fields:
            await self._redis.call(lambda redis: redis.hdel(plan_record(name), *fields))
        if values:
            await self._redis.write_hash(plan_record(name), values)
        return await self.get(name)

    async def get(self, name: str) -> Plan:
        plan = await self.find(name)
        if plan is None:
            raise RempartError(ErrorKind.NOT_FOUND, f"There is no plan '{name[:63]}'.", param="plan")
        return plan

    async def find(self, name: str) -> Plan | None:
        stored = await self._redis.read_hash(plan_record(name)) if is_name(name) else {}
        if "created_s" not in stored:
            return None
        return Plan(name, LimitSet.parse(stored), int(stored["created_s"]), OwnStanding.parse(stored))

    async def list(self) -> tuple[Plan, ...]:
        """All plans, in order of name."""
        names = await self._redis.call(lambda redis: redis.smembers(PLANS))
        plans = [await self.find(str(name)) for name in sorted(names)]
        return tuple(plan for plan in plans if plan is not None)

    async def remove(self, name: str) -> None:
        """Tenants that still have it inherit the router's defaults alone, so the caller checks that there are none."""
        await self.get(name)
        await self._redis.call(lambda redis: redis.delete(plan_record(name)))
        await self._redis.call(lambda redis: redis.srem(PLANS, name))
