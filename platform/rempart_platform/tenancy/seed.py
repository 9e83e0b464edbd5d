"""Plans, tenants and prices that are put in force at the start of a router; `tenants_file.py` reads them.

What an entry says is put in force once: when it is new, or other than the last time. So a restart changes nothing, what
was edited meanwhile stays, and a changed file wins over it. What is in no file stays as it is. A key's entry changes
with the key; the one that it was before ends, unless the tenant has it by another name: so two names make a change
without a gap.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.api_keys import ApiKeyStore, key_id_of
from rempart_platform.tenancy.keyspace import SEEDS
from rempart_platform.tenancy.limits import LIMITS, LimitChange, LimitSet
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.prices import PriceList, PriceRegistry
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient
from rempart_platform.tenancy.standing import STANDING, OwnStanding, StandingChange
from rempart_platform.tenancy.tenants import TenantRegistry


class SeedError(ValueError):
    """What is wrong in the file, and where."""


@dataclass(frozen=True, slots=True)
class PlanSeed:
    """A plan as the file has it."""

    limits: LimitSet
    standing: OwnStanding = OwnStanding()

    def written(self) -> dict[str, object]:
        """All that it says."""
        return {**self.limits.written(), **self.standing.written()}


@dataclass(frozen=True, slots=True)
class TenantSeed:
    """A tenant as the file has it."""

    plan: str
    limits: LimitSet
    standing: OwnStanding = OwnStanding()
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    """By the names that the file has for them."""

    def written(self) -> list[object]:
        """All that it says, but for its keys."""
        return [self.plan, {**self.limits.written(), **self.standing.written()}]


@dataclass(frozen=True, slots=True)
class Seed:
    """A file."""

    plans: Mapping[str, PlanSeed]
    tenants: Mapping[str, TenantSeed]
    prices: PriceList

    @property
    def models(self) -> set[str]:
        """All that it limits or prices."""
        limits = [plan.limits for plan in self.plans.values()] + [tenant.limits for tenant in self.tenants.values()]
        return {model for each in limits for model in each.of_models}.union(self.prices.of_models)


def tell_nobody(entry: str, tenant: str) -> None:
    """For a router without an audit log."""


async def apply_seed(
    redis: RedisClient, seed: Seed, keys: ApiKeyStore, tell: Callable[[str, str], None] = tell_nobody
) -> None:
    """Puts in force what is new in a seed, waiting for Redis as long as it takes.

    Args:
        redis: where it is put in force.
        seed: what the file says.
        keys: makes its keys valid.
        tell: told of every entry that is about to be put in force: what it is, and of which tenant, "" for none.

    Raises:
        SeedError: a name is not one, a tenant's plan is neither in the seed nor in Redis, or a key is another tenant's.
    """
    while True:
        try:
            await _apply(redis, seed, keys, tell)
        except RedisAwayError as error:
            await asyncio.sleep(error.retry_after_s or 1.0)
        except RempartError as error:
            raise SeedError(error.message) from None
        else:
            return


async def _apply(redis: RedisClient, seed: Seed, keys: ApiKeyStore, tell: Callable[[str, str], None]) -> None:
    applied = await redis.read_hash(SEEDS)
    plans, tenants = PlanRegistry(redis), TenantRegistry(redis)

    async def once(entry: str, said: object, put_in_force: Callable[[], Awaitable[None]], tenant: str = "") -> None:
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        if applied.get(entry) != digest:
            tell(entry, tenant)
            await put_in_force()
            await redis.write_hash(SEEDS, {entry: digest})

    for name, plan in seed.plans.items():
        await once(f"plan {name}", plan.written(), partial(_apply_plan, plans, name, plan))
    for name, tenant in seed.tenants.items():
        await once(f"tenant {name}", tenant.written(), partial(_apply_tenant, tenants, name, tenant), name)
        for key_name, key in tenant.keys.items():
            entry = f"key {name} {key_name}"
            said_before = applied.get(entry, "")
            if said_before != keys.describe(key):
                tell(f"{entry} {key_id_of(key)}", name)
                await keys.adopt(name, key)
                await _revoke_unlisted(keys, said_before.partition(" ")[0], tenant.keys.values())
                await redis.write_hash(SEEDS, {entry: keys.describe(key)})
    if seed.prices != PriceList():
        prices = {model: [price.input, price.cached, price.output] for model, price in seed.prices.of_models.items()}
        said = [seed.prices.currency, prices]
        await once("prices", said, partial(_apply_prices, PriceRegistry(redis), seed.prices))


async def _apply_plan(plans: PlanRegistry, name: str, seed: PlanSeed) -> None:
    plan = await plans.find(name)
    stored = plan.limits if plan is not None else LimitSet()
    await plans.set(name, *_changes(seed.limits, stored), _standing_change(seed.standing))


async def _apply_tenant(tenants: TenantRegistry, name: str, seed: TenantSeed) -> None:
    try:
        await tenants.create(name, seed.limits.own, seed.plan, seed.standing)
    except RempartError as error:
        if error.kind is not ErrorKind.ALREADY_EXISTS:
            raise
    tenant = await tenants.set_plan(name, seed.plan)
    changes = _changes(seed.limits, tenant.limits)
    await tenants.change(name, *changes, _standing_change(seed.standing))


async def _revoke_unlisted(keys: ApiKeyStore, key_id: str, listed: Collection[str]) -> None:
    """Ends the key that a name had before, unless the tenant has it by any name, or somebody has done so already."""
    if not key_id or any(key_id == key_id_of(key) for key in listed):
        return
    try:
        await keys.revoke(key_id)
    except RempartError as error:
        if error.kind is not ErrorKind.NOT_FOUND:
            raise


async def _apply_prices(registry: PriceRegistry, prices: PriceList) -> None:
    if prices.currency:
        await registry.set_currency(prices.currency)
    for model, price in prices.of_models.items():
        await registry.set_price(model, price)


def _changes(wanted: LimitSet, stored: LimitSet) -> list[LimitChange]:
    """What makes the wanted limits of the stored ones."""
    models = ("", *sorted({*wanted.of_models, *stored.of_models}))
    changes = []
    for model in models:
        limits = wanted.of_model(model) if model else wanted.own
        changes.append(LimitChange(limits, tuple(name for name in LIMITS if name not in limits.only_set()), model))
    return changes


def _standing_change(wanted: OwnStanding) -> StandingChange:
    """What makes the wanted standing of whatever is stored."""
    return StandingChange(wanted, tuple(name for name in STANDING if name not in wanted.written()))
