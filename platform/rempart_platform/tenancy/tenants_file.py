"""The tenants' file of a router: plans, tenants and prices, as TOML or as the same in JSON.

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
"""

import json
import os
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from rempart_platform.aliases import means_models
from rempart_platform.errors import RempartError
from rempart_platform.tenancy.api_keys import key_id_of
from rempart_platform.tenancy.limits import LIMITS, LimitChange, LimitSet, TenantLimits
from rempart_platform.tenancy.money import parse_money, parse_price
from rempart_platform.tenancy.prices import ModelPrice, PriceList
from rempart_platform.tenancy.seed import PlanSeed, Seed, SeedError, TenantSeed
from rempart_platform.tenancy.standing import STANDING, TIERS, OwnStanding, StandingChange

_SECRET_FROM = ("from_file", "from_environ")
_PRICES_OF = ("input", "cached", "output")


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


def _plan(entry: object, where: str) -> PlanSeed:
    return PlanSeed(
        _limit_set(entry, where, {*STANDING} - {"cache_group"}), _standing(_table(entry, where, None), where)
    )


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
    weight, max_tier, group, suspended = (table.get(name) for name in STANDING)
    if not isinstance(weight, int | float | None) or isinstance(weight, bool):
        raise SeedError(f"{where}.weight must be a number")
    if max_tier is not None and str(max_tier) not in TIERS:
        raise SeedError(f"{where}.max_tier must be one of {', '.join(TIERS)}")
    if not isinstance(suspended, bool | None):
        raise SeedError(f"{where}.suspended must be true or false")
    standing = OwnStanding(
        weight=None if weight is None else float(weight),
        max_tier=None if max_tier is None else TIERS[str(max_tier)],
        cache_group=None if group is None else str(group),
        suspended=suspended,
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
