"""What tenants used, per model and UTC day. Written by the settle script, read here."""

from collections import defaultdict
from dataclasses import dataclass

from rempart_platform.tenancy.keyspace import TenantKeys
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.tenants import TenantRegistry


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """Use of one tenant of one model on one day."""

    tenant: str
    model: str
    day: str
    """UTC, "2026-11-23"."""
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cost_nanos: int = 0
    """Billionths of the currency, at the prices of their time."""


class UsageReader:
    """Reads usage.

    Raises:
        RempartError: NOT_FOUND for an unknown tenant; UNAVAILABLE when Redis does not answer.
    """

    def __init__(self, redis: RedisClient, tenants: TenantRegistry) -> None:
        self._redis = redis
        self._tenants = tenants

    async def read(self, tenant: str | None = None) -> tuple[UsageRecord, ...]:
        """Usage of one tenant, or of all, in order of tenant, day, model."""
        tenants = await self._tenants.list() if tenant is None else (await self._tenants.get(tenant),)
        return tuple([record for each in tenants for record in await self._read_tenant(each.name)])

    async def _read_tenant(self, tenant: str) -> list[UsageRecord]:
        stored = await self._redis.read_hash(TenantKeys(tenant).usage)
        counters: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
        for field, count in stored.items():
            # The model comes last, because only it may hold a space.
            day, counter, model = field.split(" ", 2)
            counters[day, model][counter] = int(count)
        return [UsageRecord(tenant, model, day, **counts) for (day, model), counts in sorted(counters.items())]
