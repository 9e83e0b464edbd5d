import asyncio
import json
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rempart_platform.generation import ServiceTier
from rempart_platform.tenancy.api_keys import ApiKeyStore, KeyHasher
from rempart_platform.tenancy.authenticators import Authenticator
from rempart_platform.tenancy.limits import LimitChange, LimitSet, TenantLimits
from rempart_platform.tenancy.money import format_money, format_price, parse_money, parse_price
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.prices import ModelPrice, PriceList, PriceRegistry
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.seed import PlanSeed, Seed, SeedError, TenantSeed, apply_seed
from rempart_platform.tenancy.standing import OwnStanding
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.tenants_file import read_seed
from rempart_platform.tenancy.testing import own_redis

TEXT = """
[plans.gold]
requests_per_minute = 60
money_per_month = "250.00"
weight = 4
max_tier = "priority"
[plans.gold.models."some model"]
concurrent_tokens = 100_000

[tenants.acme]
plan = "gold"
concurrency = 4
weight = 0.5
cache_group = "house"
suspended = true
[tenants.acme.models.small]
tokens_per_day = 0

[prices]
currency = "EUR"
[prices.models."some model"]
input = "0.27"
cached = 0.07
output = 1
"""
SEED = Seed(
    {
        "gold": PlanSeed(
            LimitSet(
                TenantLimits(requests_per_minute=60, money_per_month=250 * 10**9),
                {"some model": TenantLimits(concurrent_tokens=100_000)},
            ),
            OwnStanding(weight=4.0, max_tier=ServiceTier.PRIORITY),
        )
    },
    {
        "acme": TenantSeed(
            "gold",
            LimitSet(TenantLimits(concurrency=4), {"small": TenantLimits(tokens_per_day=0)}),
            OwnStanding(weight=0.5, cache_group="house", suspended=True),
        )
    },
    PriceList("EUR", {"some model": ModelPrice(270, 70, 1000)}),
)


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as client:
        yield client


HASHER = KeyHasher(b"a pepper of 16 bytes or more")
KEY, NEXT_KEY = f"rk_{1:016x}_{2:064x}", f"rk_{3:016x}_{4:064x}"


def store_of(redis: RedisClient) -> ApiKeyStore:
    return ApiKeyStore(redis, HASHER)


def _file(folder: Path, text: str) -> Path:
    path = folder / "tenants.toml"
    path.write_text(text)
    return path


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    assert read_seed(_file(tmp_path, TEXT)) == SEED
    as_json = tmp_path / "tenants.json"
    as_json.write_text(json.dumps(tomllib.loads(TEXT)))
    assert read_seed(as_json) == SEED
    assert read_seed(_file(tmp_path, "")) == Seed({}, {}, PriceList())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants = 5", "tenants must be a table"),
        ("[tenant.acme]", "has no 'tenant'"),
        ("[plans.gold]\nrequests = 5", "plans.gold has no 'requests'"),
        ("[plans.gold]\nplan = 'x'", "plans.gold has no 'plan'"),
        ("[plans.gold]\nconcurrency = true", "plans.gold.concurrency must be a whole number"),
        ("[plans.gold]\nconcurrency = -1", "plans.gold: 'concurrency' must be between"),
        ("[plans.gold]\nmoney_per_day = 'much'", "plans.gold.money_per_day: 'much' is no amount"),
        ("[plans.gold]\nweight = 'heavy'", "plans.gold.weight must be a number"),
        ("[plans.gold]\nweight = 0", "plans.gold: 'weight' must be between"),
        ("[plans.gold]\ncache_group = 'house'", "plans.gold has no 'cache_group'"),
        ("[tenants.a]\nmax_tier = 'best'", "tenants.a.max_tier must be one of priority, default"),
        ("[tenants.a]\nsuspended = 'yes'", "tenants.a.suspended must be true or false"),
        ("[tenants.a]\ncache_group = 'A B'", "tenants.a: 'cache_group' has 1 to 63"),
        ("[tenants.a.models.m]\nplan = 'x'", "tenants.a.models.m has no 'plan'"),
        ("[prices.models.m]\ninput = '0.0001'", "at most three decimals"),
        ("[prices.models.m]\ninput = 1\ncached = 2", "cannot cost more"),
        ("[", "tenants.toml: "),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SeedError, match=message):
        read_seed(_file(tmp_path, text))
    with pytest.raises(SeedError, match=r"none\.toml"):
        read_seed(tmp_path / "none.toml")


def test_keys_are_read_from_where_secrets_lie(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{KEY}\n")
    text = f"""
    [tenants.acme.keys.ci]
    from_file = "{tmp_path}/secret"
    [tenants.acme.keys.app]
    from_environ = "APP_KEY"
    """
    seed = read_seed(_file(tmp_path, text), {"APP_KEY": NEXT_KEY})
    assert seed.tenants["acme"].keys == {"ci": KEY, "app": NEXT_KEY}
    assert KEY not in repr(seed)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("from_environ = 'NOTHING'", "tenants.a.keys.k.from_environ: NOTHING cannot be read"),
        ("from_file = '/none'", "tenants.a.keys.k.from_file: /none cannot be read"),
        ("from_environ = 'SHORT'", "SHORT holds no key, which is rk_"),
        ("from_environ = 'SHORT'\nfrom_file = '/none'", "must have one of from_file, from_environ"),
        ("", "must have one of from_file, from_environ"),
        ("key = 'rk_1'", "has no 'key'"),
    ],
)
def test_a_key_that_is_not_there_is_named_and_not_shown(tmp_path: Path, said: str, message: str) -> None:
    with pytest.raises(SeedError, match=message) as raised:
        read_seed(_file(tmp_path, f"[tenants.a.keys.k]\n{said}"), {"SHORT": "rk_1_SECRET"})
    assert "SECRET" not in str(raised.value)


async def test_a_seeded_key_is_valid_until_its_entry_has_another(redis: RedisClient) -> None:
    store = store_of(redis)
    authenticator = Authenticator(store, HASHER, cache_s=0.0)

    async def sow(key: str) -> None:
        await apply_seed(redis, Seed({}, {"acme": TenantSeed("", LimitSet(), keys={"ci": key})}, PriceList()), store)

    await sow(KEY)
    caller = await authenticator.authenticate(KEY)
    assert (caller.tenant, [each.key_id for each in await store.list("acme")]) == ("acme", [caller.key_id])
    await store.revoke(caller.key_id)
    await sow(KEY)
    assert await store.list("acme") == (), "what was revoked stays so over a restart"
    await sow(NEXT_KEY)
    assert (await authenticator.authenticate(NEXT_KEY)).tenant == "acme"
    await sow(KEY)
    assert [each.key_id for each in await store.list("acme")] == [caller.key_id], "the one before has ended"
    assert KEY.rpartition("_")[2] not in str(await redis.read_hash("rempart:seeds"))


async def test_a_key_of_another_tenant_is_refused(redis: RedisClient) -> None:
    of_both = {name: TenantSeed("", LimitSet(), keys={"ci": KEY}) for name in ("acme", "beta")}
    with pytest.raises(SeedError, match="another tenant's"):
        await apply_seed(redis, Seed({}, of_both, PriceList()), store_of(redis))
    assert [each.tenant for each in await store_of(redis).list("acme")] == ["acme"]
    assert await store_of(redis).list("beta") == ()


async def test_seed_makes_what_it_says_and_a_restart_changes_nothing(redis: RedisClient) -> None:
    plans, tenants, prices = PlanRegistry(redis), TenantRegistry(redis), PriceRegistry(redis)
    await asyncio.gather(apply_seed(redis, SEED, store_of(redis)), apply_seed(redis, SEED, store_of(redis)))
    gold = await plans.get("gold")
    assert PlanSeed(gold.limits, gold.standing) == SEED.plans["gold"]
    acme = await tenants.get("acme")
    assert (acme.plan, acme.limits) == (
        "gold",
        LimitSet(TenantLimits(concurrency=4), {"small": TenantLimits(tokens_per_day=0)}),
    )
    assert acme.standing == OwnStanding(weight=0.5, cache_group="house", suspended=True)
    assert await prices.read() == SEED.prices

    await tenants.change("acme", LimitChange(TenantLimits(concurrency=9)))
    await plans.set("gold", LimitChange(TenantLimits(concurrency=9)))
    await prices.set_price("some model", ModelPrice())
    await apply_seed(redis, SEED, store_of(redis))
    assert (await tenants.get("acme")).limits.own.concurrency == 9, "edits stay"
    assert (await plans.get("gold")).limits.own.concurrency == 9
    assert (await prices.read()).of("some model") == ModelPrice()


async def test_changed_entry_is_put_in_force_whole_and_no_other(redis: RedisClient) -> None:
    plans, tenants = PlanRegistry(redis), TenantRegistry(redis)
    await tenants.create("old", TenantLimits(concurrency=1))
    await apply_seed(redis, SEED, store_of(redis))
    await tenants.change("acme", LimitChange(TenantLimits(concurrency=9)))
    await plans.set("gold", LimitChange(TenantLimits(concurrency=9)))
    changed = {"acme": TenantSeed("", LimitSet(TenantLimits(tokens_per_minute=5)))}
    await apply_seed(redis, Seed(SEED.plans, changed, SEED.prices), store_of(redis))
    acme = await tenants.get("acme")
    assert (acme.plan, acme.limits) == ("", LimitSet(TenantLimits(tokens_per_minute=5)))
    assert acme.standing == OwnStanding()
    assert (await plans.get("gold")).limits.own.concurrency == 9
    assert (await tenants.get("old")).limits.own == TenantLimits(concurrency=1)


@pytest.mark.parametrize("seed", [{"A b": TenantSeed("", LimitSet())}, {"acme": TenantSeed("gone", LimitSet())}])
async def test_bad_name_or_plan_is_refused(redis: RedisClient, seed: dict[str, TenantSeed]) -> None:
    with pytest.raises(SeedError):
        await apply_seed(redis, Seed({}, seed, PriceList()), store_of(redis))
    assert await TenantRegistry(redis).list() == ()


@pytest.mark.parametrize(
    ("text", "nanos"),
    [("0", 0), ("12.5", 12_500_000_000), ("0.000000001", 1), ("1e3", 10**12), ("250.00", 250 * 10**9)],
)
def test_money_is_read_as_it_is_written(text: str, nanos: int) -> None:
    assert parse_money(text) == nanos
    assert parse_money(format_money(nanos)) == nanos


def test_money_shows_hundredths_at_least_and_prices_are_of_a_million() -> None:
    assert [format_money(nanos) for nanos in (0, 10**9, 1_230_000_000, 1)] == ["0.00", "1.00", "1.23", "0.000000001"]
    assert (parse_price("0.27"), format_price(270)) == (270, "0.27")
    for text in ("", "-1", "nan", "inf", "x", "0.0000000001"):
        with pytest.raises(ValueError, match="no amount of money"):
            parse_money(text)


def test_the_file_that_the_readme_shows_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_CI_KEY", f"rk_{'0' * 16}_{'1' * 64}")
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (tmp_path / "tenants.toml").write_text(readme.partition("```toml\n")[2].partition("```")[0])
    seed = read_seed(tmp_path / "tenants.toml")
    assert set(seed.plans) == {"gold"}
    assert set(seed.tenants) == {"acme"}
    assert set(seed.prices.of_models) == {"deepseek-v3.2"}
