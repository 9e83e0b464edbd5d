"""What a router remembers for a short time of plans and prices, so that a reservation costs one call of Redis."""

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from rempart_platform.tenancy.limits import LimitSet
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.prices import PriceList, PriceRegistry
from rempart_platform.tenancy.redis_client import RedisClient

TERMS_S = 5.0
"""For how long what was read holds: a change is in force everywhere after that."""
_MAX_TENANTS = 10_000
_T = TypeVar("_T")


class _Remembered(Generic[_T]):
    """One value, read anew when it is asked for and too old."""

    def __init__(self, read: Callable[[], Awaitable[_T]], clock: Callable[[], float]) -> None:
        self._read = read
        self._clock = clock
        self._value: _T | None = None
        self._ends_at = 0.0

    async def get(self) -> _T:
        asked_at = self._clock()
        if self._value is not None and asked_at < self._ends_at:
            return self._value
        # Whoever comes while this one reads goes on with what there is.
        had_ended_at, self._ends_at = self._ends_at, asked_at + TERMS_S
        try:
            self._value = await self._read()
        except BaseException:
            self._ends_at = had_ended_at
            raise
        return self._value


class Terms:
    """Plans and prices, at most `TERMS_S` old.

    Args:
        redis: where they are kept.
        clock: monotonic seconds.

    Raises:
        RedisAwayError: they are too old, and Redis does not answer.
    """

    def __init__(self, redis: RedisClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._plans = PlanRegistry(redis)
        self._prices = _Remembered(PriceRegistry(redis).read, clock)
        self._limits_of: dict[str, _Remembered[LimitSet]] = {}
        self._plan_of: OrderedDict[str, str] = OrderedDict()

    async def prices(self) -> PriceList:
        return await self._prices.get()

    async def limits(self, plan: str) -> LimitSet:
        """The limits of a plan; none of "" and of a plan that is gone."""
        if not plan:
            return LimitSet()
        if plan not in self._limits_of:
            self._limits_of[plan] = _Remembered(lambda: self._read(plan), self._clock)
        return await self._limits_of[plan].get()

    def plan_of(self, tenant: str) -> str:
        """The tenant's plan as last seen; the reserve script tells when it is another."""
        return self._plan_of.get(tenant, "")

    def has_plan(self, tenant: str, plan: str) -> None:
        """Remembers a tenant's plan; of many tenants, those seen last."""
        self._plan_of[tenant] = plan
        self._plan_of.move_to_end(tenant)
        if len(self._plan_of) > _MAX_TENANTS:
            self._plan_of.popitem(last=False)

    async def _read(self, plan: str) -> LimitSet:
        found = await self._plans.find(plan)
        return found.limits if found is not None else LimitSet()
