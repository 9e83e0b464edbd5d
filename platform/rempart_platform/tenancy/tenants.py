"""Tenants: who may use the platform, and how much of it."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.keyspace import TENANTS, TenantKeys
from rempart_platform.tenancy.lua import load_script
from rempart_platform.tenancy.redis_client import RedisClient

_CREATE = load_script("create_tenant")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
# Sums of a window stay exact in Lua, whose numbers are doubles.
MAX_LIMIT = 10**12


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may use. None: the router's default; 0: unlimited."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None

    def only_set(self) -> dict[str, int]:
        values = {limit.name: getattr(self, limit.name) for limit in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant as it is stored."""

    name: str
    limits: TenantLimits
    created_s: int


class TenantRegistry:
    """Makes and changes tenants.

    A new limit is in force with the next reservation, in every router: the ledger's script reads it from here.

    Raises:
        RempartError: INVALID_REQUEST, ALREADY_EXISTS or NOT_FOUND; UNAVAILABLE when Redis does not answer.
    """

    def __init__(self, redis: RedisClient, clock: Callable[[], float] = time.time) -> None:
        self._redis = redis
        self._clock = clock

    async def create(self, name: str, limits: TenantLimits) -> Tenant:
        _check_name(name)
        _check_limits(limits)
        tenant = Tenant(name, limits, int(self._clock()))
        # Listed first and made second: a crash in between leaves a name that `list` skips and `create` may use.
        await self._redis.call(lambda redis: redis.sadd(TENANTS, name))
        arguments = [tenant.created_s, *(part for limit in limits.only_set().items() for part in limit)]
        (is_new,) = await self._redis.run_script(_CREATE, TenantKeys(name).ledger, arguments)
        if not is_new:
            raise RempartError(ErrorKind.ALREADY_EXISTS, f"The tenant '{name}' exists already.", param="name")
        return tenant

    async def get(self, name: str) -> Tenant:
        _check_name(name, param="tenant")
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
        _check_limits(limits)
        await self.get(name)
        if limits.only_set():
            await self._redis.write_hash(TenantKeys(name).tenant, limits.only_set())
        return await self.get(name)

    async def _load(self, name: str) -> Tenant | None:
        stored = await self._redis.read_hash(TenantKeys(name).tenant)
        if "created_s" not in stored:
            return None
        limits = {limit.name: int(stored[limit.name]) for limit in fields(TenantLimits) if limit.name in stored}
        return Tenant(name, TenantLimits(**limits), int(stored["created_s"]))


def _check_name(name: str, param: str = "name") -> None:
    if _NAME.fullmatch(name) is None:
        raise RempartError(
            ErrorKind.INVALID_REQUEST,
            "A tenant's name has 1 to 63 characters: lower-case letters, digits and '-', starting with a letter.",
            param=param,
        )


def _check_limits(limits: TenantLimits) -> None:
    for name, value in limits.only_set().items():
        if not 0 <= value <= MAX_LIMIT:
            raise RempartError(
                ErrorKind.INVALID_REQUEST, f"'{name}' must be between 0 and {MAX_LIMIT}.", param=f"limits.{name}"
            )
