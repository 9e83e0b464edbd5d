"""Tenants: who may use the platform, and how much of it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.keyspace import TENANTS, TenantKeys
from rempart_platform.tenancy.limits import MAX_LIMIT, LimitChange, LimitSet, TenantLimits
from rempart_platform.tenancy.lua import load_script
from rempart_platform.tenancy.names import require_name
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.standing import OwnStanding, RecordChange, StandingChange

__all__ = ["MAX_LIMIT", "Tenant", "TenantLimits", "TenantRegistry"]

_CREATE = load_script("create_tenant")
_OF = "A tenant's name"


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant as it is stored."""

    name: str
    limits: TenantLimits
    created_s: int
    plan: str = ""
    """Whose limits it inherits; "" for none."""
    of_models: Mapping[str, TenantLimits] = field(default_factory=dict)
    """Limits of its use of single models."""
    of_keys: Mapping[str, TenantLimits] = field(default_factory=dict)
    """Limits of single keys, by key id."""
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

    async def create(
        self, name: str, limits: TenantLimits, plan: str = "", standing: OwnStanding | None = None
    ) -> Tenant:
        """Makes a tenant. The caller has checked that the plan exists."""
        require_name(name, _OF, "name")
        standing = standing or OwnStanding()
        stored: dict[str, str | int] = {**LimitChange(limits).written(), **StandingChange(standing).written()}
        if plan:
            stored["plan"] = plan
        tenant = Tenant(name, limits, int(self._clock()), plan, standing=standing)
        # Listed first and made second: a crash in between leaves a name that `list` skips and `create` may use.
        await self._redis.call(lambda redis: redis.sadd(TENANTS, name))
        arguments = [tenant.created_s, *(part for pair in stored.items() for part in pair)]
        (is_new,) = await self._redis.run_script(_CREATE, TenantKeys(name).ledger, arguments)
        if not is_new:
            raise RempartError(ErrorKind.ALREADY_EXISTS, f"The tenant '{name}' exists already.", param="name")
        return tenant

    async def get(self, name: str) -> Tenant:
        require_name(name, _OF, "tenant")
        tenant = await self._load(name)
        if tenant is None:
            raise RempartError(ErrorKind.NOT_FOUND, f"There is no tenant '{name}'.", param="tenant")
        return tenant

    async def list(self) -> tuple[Tenant, ...]:
        """All tenants, in order of name."""
        names = await self._redis.call(lambda redis: redis.smembers(TENANTS))
        # One after the other: an operator's list must not take the connections of tenants' requests.
        tenants = [await self._load(str(name)) for name in sorted(names)]
        return tuple(tenant for tenant in tenants if tenant is not None)

    async def set_limits(self, name: str, limits: TenantLimits) -> Tenant:
        """Changes the limits that are not None and keeps the others."""
        return await self.change(name, LimitChange(limits))

    async def change(self, name: str, *changes: RecordChange) -> Tenant:
        """Changes what the changes name and keeps the rest."""
        await self.get(name)
        removed = [each for change in changes for each in change.removed()]
        written = {each: value for change in changes for each, value in change.written().items()}
        if removed:
            await self._redis.call(lambda redis: redis.hdel(TenantKeys(name).tenant, *removed))
        if written:
            await self._redis.write_hash(TenantKeys(name).tenant, written)
        return await self.get(name)

    async def set_plan(self, name: str, plan: str) -> Tenant:
        """Gives a tenant another plan, or none with "". The caller has checked that the plan exists."""
        await self.get(name)
        if plan:
            await self._redis.write_hash(TenantKeys(name).tenant, {"plan": plan})
        else:
            await self._redis.call(lambda redis: redis.hdel(TenantKeys(name).tenant, "plan"))
        return await self.get(name)

    async def _load(self, name: str) -> Tenant | None:
        stored = await self._redis.read_hash(TenantKeys(name).tenant)
        if "created_s" not in stored:
            return None
        limits = LimitSet.parse(stored)
        created_s, plan = int(stored["created_s"]), stored.get("plan", "")
        standing = OwnStanding.parse(stored)
        return Tenant(name, limits.own, created_s, plan, limits.of_models, limits.of_keys, standing)
