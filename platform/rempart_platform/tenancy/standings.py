"""The standing of every tenant that asks, remembered for a moment, so that a request costs no call of Redis for it.

It lies in the records of tenants and plans, which are in other slots of a cluster than a model's queue: no script of
the queue could read them.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller, Standing
from rempart_platform.tenancy.keyspace import TenantKeys, plan_record
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient
from rempart_platform.tenancy.standing import STANDING, OwnStanding
from rempart_platform.tenancy.terms import TERMS_S

_CAPACITY = 10_000


@dataclass(frozen=True, slots=True)
class _Known:
    standing: Standing
    ends_at: float


class Standings:
    """Reads what tenants and their plans say of their standing.

    Args:
        redis: where the records are.
        clock: monotonic seconds.
        memory_s: how late a change is noticed.
    """

    def __init__(self, redis: RedisClient, clock: Callable[[], float], memory_s: float = TERMS_S) -> None:
        self._redis = redis
        self._clock = clock
        self._memory_s = memory_s
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def of(self, tenant: str) -> Standing:
        """How a tenant stands whose requests are served; of one that was seen before also while Redis is away.

        Raises:
            RempartError: PERMISSION_DENIED, it is suspended.
            RedisAwayError: Redis does not answer.
        """
        standing = await self._standing(tenant)
        if standing.is_suspended:
            raise RempartError(ErrorKind.PERMISSION_DENIED, "This tenant is suspended.")
        return standing

    async def _standing(self, tenant: str) -> Standing:
        known, now = self._known.get(tenant), self._clock()
        if known is not None:
            if now < known.ends_at:
                return known.standing
            # Whoever comes while this one reads, or while Redis is away, goes on with what there is.
            self._known[tenant] = _Known(known.standing, now + self._memory_s)
        try:
            standing = await self._read(tenant)
        except RedisAwayError:
            if known is None:
                raise
            return known.standing
        self._known[tenant] = _Known(standing, now + self._memory_s)
        self._known.move_to_end(tenant)
        if len(self._known) > _CAPACITY:
            self._known.popitem(last=False)
        return standing

    async def _read(self, tenant: str) -> Standing:
        record = await self._fields(TenantKeys(tenant).tenant, ("plan", *STANDING))
        plan = await self._fields(plan_record(record["plan"]), STANDING) if "plan" in record else {}
        return OwnStanding.parse(record).inherit(OwnStanding.parse(plan))

    async def _fields(self, key: str, names: Sequence[str]) -> dict[str, str]:
        values = await self._redis.call(lambda redis: redis.hmget(key, list(names)))
        return {name: str(value) for name, value in zip(names, values, strict=True) if value is not None}


class Authenticator(Protocol):
    """Bearer token → caller."""

    async def authenticate(self, bearer: str) -> Caller:
        """Raises RempartError."""


class StandingAuthenticator:
    """An authenticator whose callers know how they stand."""

    def __init__(self, authenticator: Authenticator, standings: Standings) -> None:
        self._authenticator = authenticator
        self._standings = standings

    async def authenticate(self, bearer: str) -> Caller:
        """Raises RempartError, as the authenticator does; UNAVAILABLE when Redis does not answer."""
        caller = await self._authenticator.authenticate(bearer)
        return replace(caller, standing=await self._standings.of(caller.tenant))
