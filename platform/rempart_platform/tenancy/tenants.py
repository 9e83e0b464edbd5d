"""Tenants: who may use the platform, and how much of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.keyspace import TENANTS, TenantKeys
from rempart_platform.tenancy.limits import LimitChange, LimitSet, TenantLimits
from rempart_platform.tenancy.lua import Script, load_script
from rempart_platform.tenancy.names import require_name
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.records import RecordChange, change_record
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.standing import OwnStanding, StandingChange

_CREATE = load_script("create_tenant", shared="")
_MOVE = load_script("move_tenant", shared="")
_OF = "A tenant's name"


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant as it is stored."""

    name: str
    limits: LimitSet
    created_s: int
    plan: str = ""
    """Whose limits it inherits; "" for none."""
    standing: OwnStanding = OwnStanding()


class TenantRegistry:
    """Makes and changes tenants.

    A new limit is in force with the next reservation, in every router: the ledger's script reads it from here.

    Raises:
        RempartError: INVALID_REQUEST, ALREADY_EXISTS or NOT_FOUND; UNAVAILABLE when Redis does not answer.
    """

    def __init__(self, redis: RedisClient, clock: Callable[[], float] = time.time) -> None:
        self._redis = redis
        self._clock = clock
        self._plans = PlanRegistry(redis)

    async def create(
        self, name: str, limits: TenantLimits, plan: str = "", standing: OwnStanding | None = None
    ) -> Tenant:
        """Makes a tenant. NOT_FOUND when there is no such plan."""
        require_name(name, _OF, "name")
        standing = standing or OwnStanding()
        stored: dict[str, str | int] = {**LimitChange(limits).written(), **StandingChange(standing).written()}
        created_s = int(self._clock())
        # Listed first and made second: a crash in between leaves a name that `list` skips and `create` may use.
        await self._redis.call(lambda redis: redis.sadd(TENANTS, name))
        record = [part for pair in stored.items() for part in pair]
        if await self._give_plan(_CREATE, name, plan, created_s, *record) == "exists":
            raise RempartError(ErrorKind.ALREADY_EXISTS, f"The tenant '{name}' exists already.", param="name")
        return Tenant(name, LimitSet(limits), created_s, plan, standing)

    async def get(self, name: str) -> Tenant:
        require_name(name, _OF, "tenant")
        tenant = await self._load(name)
        if tenant is None:
            raise _no_such_tenant(name)
        return tenant

    async def list(self) -> tuple[Tenant, ...]:
        """All tenants, in order of name."""
        names = await self._redis.call(lambda redis: redis.smembers(TENANTS))
        # One after the other: an operator's list must not take the connections of tenants' requests.
        tenants = [await self._load(str(name)) for name in sorted(names)]
        return tuple(tenant for tenant in tenants if tenant is not None)

    async def change(self, name: str, *changes: RecordChange) -> Tenant:
        """Changes what the changes name and keeps the rest."""
        require_name(name, _OF, "tenant")
        if not await change_record(self._redis, TenantKeys(name).tenant, changes):
            raise _no_such_tenant(name)
        return await self.get(name)

    async def set_plan(self, name: str, plan: str) -> Tenant:
        """Gives a tenant another plan, or none with ""."""
        await self.get(name)
        await self._give_plan(_MOVE, name, plan)
        return await self.get(name)

    async def _give_plan(self, script: Script, name: str, plan: str, *args: str | int) -> str:
        """Runs a script that gives a tenant a plan; see `plans.py` for why it is announced. Returns what it says."""
        key = TenantKeys(name).tenant
        while True:
            if plan:
                await self._redis.write_hash(key, {"next_plan": plan})
                try:
                    await self._plans.require_kept(plan)
                except RempartError:
                    await self._redis.call(lambda redis: redis.hdel(key, "next_plan"))
                    raise
            (outcome,) = await self._redis.run_script(script, (key,), (plan, *args))
            if outcome != "changed":
                return str(outcome)

    async def _load(self, name: str) -> Tenant | None:
        stored = await self._redis.read_hash(TenantKeys(name).tenant)
        if "created_s" not in stored:
            return None
        created_s, plan = int(stored["created_s"]), stored.get("plan", "")
        return Tenant(name, LimitSet.parse(stored), created_s, plan, OwnStanding.parse(stored))


def _no_such_tenant(name: str) -> RempartError:
    return RempartError(ErrorKind.NOT_FOUND, f"There is no tenant '{name}'.", param="tenant")
