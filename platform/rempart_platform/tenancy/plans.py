"""Plans: named sets of limits, and a standing, that tenants inherit.

No tenant is left with a plan that is gone. Their records are in different slots of a cluster, so no script sees both;
each side says what it is about to do before it looks at the other, so that one of two notices:

    a tenant moves      announced in the tenant's record ─► is the plan being removed? ─► the announced plan is its own
    a plan is removed   marked in the plan's record ─► has a tenant it, or announced it? ─► the marked plan is deleted
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rempart_platform.errors import ErrorKind, RempartError, invalid_request
from rempart_platform.tenancy.keyspace import PLANS, TENANTS, TenantKeys, plan_record
from rempart_platform.tenancy.limits import LimitSet
from rempart_platform.tenancy.lua import load_script
from rempart_platform.tenancy.names import is_name, require_name
from rempart_platform.tenancy.records import FieldChange, RecordChange, change_record
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.standing import OwnStanding

_REMOVE = load_script("remove_plan", shared="")
_REMOVING = "removing"


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
        """Changes a plan, or makes it first. One that is being removed stays."""
        require_name(name, "A plan's name", "name")
        # Listed first: a crash in between leaves a name that `list` skips.
        await self._redis.call(lambda redis: redis.sadd(PLANS, name))
        kept = FieldChange(unset=(_REMOVING,))
        await change_record(self._redis, plan_record(name), [*changes, kept], created_s=int(self._clock()))
        return await self.get(name)

    async def get(self, name: str) -> Plan:
        plan = await self.find(name)
        if plan is None:
            raise _no_such_plan(name)
        return plan

    async def require_kept(self, name: str) -> None:
        """Raises RempartError NOT_FOUND when there is no such plan, or will soon be none."""
        record = await self._read(name)
        if "created_s" not in record:
            raise _no_such_plan(name)
        if _REMOVING in record:
            message = f"The plan '{name}' is being removed; set it to keep it."
            raise RempartError(ErrorKind.NOT_FOUND, message, param="plan")

    async def find(self, name: str) -> Plan | None:
        stored = await self._read(name)
        if "created_s" not in stored:
            return None
        return Plan(name, LimitSet.parse(stored), int(stored["created_s"]), OwnStanding.parse(stored))

    async def list(self) -> tuple[Plan, ...]:
        """All plans, in order of name."""
        names = await self._redis.call(lambda redis: redis.smembers(PLANS))
        plans = [await self.find(str(name)) for name in sorted(names)]
        return tuple(plan for plan in plans if plan is not None)

    async def remove(self, name: str) -> None:
        """Refused while a tenant has the plan, and when somebody sets or removes it at the same time."""
        await self.get(name)
        mark = secrets.token_hex(8)
        await self._redis.write_hash(plan_record(name), {_REMOVING: mark})
        holder = await self._holder(name)
        if holder is not None:
            await self._redis.call(lambda redis: redis.hdel(plan_record(name), _REMOVING))
            raise invalid_request(f"The tenant '{holder}' has this plan, or is being moved to it.", "name")
        (is_removed,) = await self._redis.run_script(_REMOVE, (plan_record(name),), (mark,))
        if not is_removed:
            raise invalid_request(f"The plan '{name}' was set or removed by somebody else at the same time.", "name")
        # Its name stays in the list, which skips it: somebody may make it again at this moment.

    async def _read(self, name: str) -> dict[str, str]:
        return await self._redis.read_hash(plan_record(name)) if is_name(name) else {}

    async def _holder(self, name: str) -> str | None:
        """A tenant that has this plan, or is about to."""
        for tenant in sorted(map(str, await self._redis.call(lambda redis: redis.smembers(TENANTS)))):
            if name in await self._plans_of(tenant):
                return tenant
        return None

    async def _plans_of(self, tenant: str) -> Sequence[object]:
        """Its own, and the one that it is about to have."""
        key = TenantKeys(tenant).tenant
        return await self._redis.call(lambda redis: redis.hmget(key, ["plan", "next_plan"]))


def _no_such_plan(name: str) -> RempartError:
    return RempartError(ErrorKind.NOT_FOUND, f"There is no plan '{name[:63]}'.", param="plan")
