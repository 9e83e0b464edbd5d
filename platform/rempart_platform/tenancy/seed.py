"""Plans, tenants and prices from a file, at the start of a router.

    [plans.gold]
    requests_per_minute = 60
    money_per_month = "250.00"
    weight = 4                                  # share of the engines, where 1 is usual
    max_tier = "priority"                       # the highest service tier; "default" is usual
    [plans.gold.models."deepseek-v3.2"]
    concurrent_tokens = 100_000

    [tenants.acme]
    plan = "gold"
    concurrency = 4
    cache_group = "acme-group"                  # shares its prefix cache with the group's others: they can notice
                                                # by the time what was asked lately. Usual is none
    [tenants.acme.keys.ci]                      # made by: echo rk_$(openssl rand -hex 8)_$(openssl rand -hex 32)
    from_file = "/run/secrets/acme-ci"          # or from_environ = "ACME_CI_KEY"; never the key itself

    [prices]
    currency = "EUR"
    [prices.models."deepseek-v3.2"]             # per million tokens
    input = "0.27"
    cached = "0.07"
    output = "1.10"

Or the same as JSON. What an entry says is put in force once: when it is new, or other than the last time. So a restart
changes nothing, edits that were made meanwhile stay, and a changed file wins over them. What is in no file stays as it
is. A key's entry changes with the key; the one that it was before ends, unless the tenant has it by another name: so
two names make a change without a gap.
"""

import asyncio
import hashlib
import json
import os
import tomllib
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rempart_platform.aliases import means_models
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.api_keys import ApiKeyStore, key_id_of
from rempart_platform.tenancy.keyspace import SEEDS
from rempart_platform.tenancy.limits import LIMITS, LimitChange, LimitSet, TenantLimits
from rempart_platform.tenancy.money import parse_money, parse_price
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.prices import ModelPrice, PriceList, PriceRegistry
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient
from rempart_platform.tenancy.standing import STANDING, TIERS, OwnStanding, StandingChange
from rempart_platform.tenancy.tenants import TenantRegistry

_SECRET_FROM = ("from_file", "from_environ")
_PRICES_OF = ("input", "cached", "output")


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


def read_seed(path: Path, environ: Mapping[str, str] = os.environ, aliases: Collection[str] = ()) -> Seed:
    """Reads a file, and the secrets that it names: JSON when its name ends so, else TOML.

    Args:
        path: of the file.
        environ: where secrets may lie.
        aliases: names that only stand for models: a limit or a price of one would never hold.

    Raises:
        SeedError: it cannot be read, or holds what is unknown or out of range, or a secret is not there.
    """
    try:
        text = path.read_text("utf-8")
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise SeedError(f"{path}: {error}") from None
    root = _table(document, str(path), {"plans", "tenants", "prices"})
    plans = _tables(root, "plans")
    tenants = _tables(root, "tenants")
    seed = Seed(
        {name: _plan(entry, f"plans.{name}") for name, entry in plans.items()},
        {name: _tenant(entry, f"tenants.{name}", environ) for name, entry in tenants.items()},
        _prices(root.get("prices", {})),
    )
    for alias in sorted(seed.models.intersection(aliases)):
        raise SeedError(f"{path}: {means_models(alias)}")
    return seed


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


def _plan(entry: object, where: str) -> PlanSeed:
    names = {"weight", "max_tier"}
    return PlanSeed(_limit_set(entry, where, names), _standing(_table(entry, where, None), where))


def _tenant(entry: object, where: str, environ: Mapping[str, str]) -> TenantSeed:
    limits = _limit_set(entry, where, {"plan", "keys", *STANDING})
    table = _table(entry, where, None)
    keys = {
        name: _key(_table(said, f"{where}.keys.{name}", {*_SECRET_FROM}), f"{where}.keys.{name}", environ)
        for name, said in _tables(table, "keys", where).items()
    }
    return TenantSeed(str(table.get("plan", "")), limits, _standing(table, where), keys)


def _key(table: Mapping[str, object], where: str, environ: Mapping[str, str]) -> str:
    """The key that a file of its own or the environment holds: this one is no place for secrets."""
    if len(table) != 1:
        raise SeedError(f"{where} must have one of {', '.join(_SECRET_FROM)}")
    ((source, name),) = table.items()
    if key_id_of(str(name).strip()) is not None:
        raise SeedError(f"{where}.{source} is the key itself; it must name where the key lies")
    try:
        key = (Path(str(name)).read_text("utf-8") if source == "from_file" else environ[str(name)]).strip()
    except (OSError, ValueError, KeyError) as error:
        raise SeedError(f"{where}.{source}: {name} cannot be read ({type(error).__name__})") from None
    if key_id_of(key) is None:
        raise SeedError(f"{where}.{source}: {name} holds no key, which is rk_<16 hex digits>_<64 hex digits>")
    return key


def _standing(table: Mapping[str, object], where: str) -> OwnStanding:
    weight, max_tier, group = (table.get(name) for name in STANDING)
    if not isinstance(weight, int | float | None) or isinstance(weight, bool):
        raise SeedError(f"{where}.weight must be a number")
    if max_tier is not None and str(max_tier) not in TIERS:
        raise SeedError(f"{where}.max_tier must be one of {', '.join(TIERS)}")
    standing = OwnStanding(
        weight=None if weight is None else float(weight),
        max_tier=None if max_tier is None else TIERS[str(max_tier)],
        cache_group=None if group is None else str(group),
    )
    try:
        StandingChange(standing)
    except RempartError as error:
        raise SeedError(f"{where}: {error.message}") from None
    return standing


def _limit_set(entry: object, where: str, others: set[str]) -> LimitSet:
    table = _table(entry, where, {"models", *LIMITS, *others})
    models = _tables(table, "models", where)
    of_models = {
        model: _limits(_table(limits, f"{where}.models.{model}", set(LIMITS)), f"{where}.models.{model}")
        for model, limits in sorted(models.items())
    }
    return LimitSet(_limits(table, where), of_models)


def _limits(table: Mapping[str, object], where: str) -> TenantLimits:
    values = {name: _limit(name, table[name], f"{where}.{name}") for name in LIMITS if name in table}
    limits = TenantLimits(**values)
    try:
        LimitChange(limits)
    except RempartError as error:
        raise SeedError(f"{where}: {error.message}") from None
    return limits


def _limit(name: str, value: object, where: str) -> int:
    if name.startswith("money"):
        return _decimal(value, where, parse_money)
    if not isinstance(value, int) or isinstance(value, bool):
        raise SeedError(f"{where} must be a whole number")
    return value


def _prices(entry: object) -> PriceList:
    table = _table(entry, "prices", {"currency", "models"})
    of_models = {}
    for model, prices in sorted(_tables(table, "models", "prices").items()):
        where = f"prices.models.{model}"
        values = _table(prices, where, set(_PRICES_OF))
        numbers = {
            name: _decimal(values[name], f"{where}.{name}", parse_price) for name in _PRICES_OF if name in values
        }
        try:
            of_models[model] = ModelPrice(**numbers)
        except RempartError as error:
            raise SeedError(f"{where}: {error.message}") from None
    return PriceList(str(table.get("currency", "")), of_models)


def _decimal(value: object, where: str, parse: Callable[[str], int]) -> int:
    try:
        return parse(str(value))
    except ValueError as error:
        raise SeedError(f"{where}: {error}") from None


def _tables(table: Mapping[str, object], name: str, where: str = "") -> Mapping[str, object]:
    return _table(table.get(name, {}), f"{where}.{name}".lstrip("."), None)


def _table(value: object, where: str, known: set[str] | None) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise SeedError(f"{where} must be a table")
    unknown = set(value) - known if known is not None else set()
    if unknown:
        raise SeedError(f"{where} has no '{min(unknown)}'")
    return value
