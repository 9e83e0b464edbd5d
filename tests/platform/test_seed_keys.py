"""Keys of the tenants' file whose names change, and what in it is wrong without looking so."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rempart_platform.tenancy.api_keys import ApiKey, ApiKeyStore, KeyHasher, key_id_of
from rempart_platform.tenancy.limits import LimitSet, TenantLimits
from rempart_platform.tenancy.prices import PriceList
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.seed import Seed, SeedError, TenantSeed, apply_seed
from rempart_platform.tenancy.standing import OwnStanding
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.tenants_file import read_seed
from rempart_platform.tenancy.testing import own_redis

HASHER = KeyHasher(b"a pepper of 16 bytes or more")
KEY, NEXT_KEY = f"rk_{1:016x}_{2:064x}", f"rk_{3:016x}_{4:064x}"


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as client:
        yield client


def store_of(redis: RedisClient) -> ApiKeyStore:
    return ApiKeyStore(redis, HASHER)


@pytest.mark.parametrize(
    "renamed",
    [{"old": KEY, "ci": NEXT_KEY}, {"ci": NEXT_KEY, "old": KEY}],
    ids=["the old name first", "the new key first"],
)
@pytest.mark.parametrize("before", [{"ci": KEY}, {"ci": KEY, "old": NEXT_KEY}], ids=["one key", "two keys"])
async def test_a_key_that_the_file_has_by_another_name_stays_valid(
    redis: RedisClient, before: dict[str, str], renamed: dict[str, str]
) -> None:
    store = store_of(redis)

    async def sow(keys: dict[str, str]) -> set[str]:
        await apply_seed(redis, Seed({}, {"acme": TenantSeed("", LimitSet(), keys=keys)}, PriceList()), store)
        return {key.key_id for key in await store.list("acme")}

    assert await sow(before) == {key_id_of(key) for key in before.values()}
    assert await sow(renamed) == {key_id_of(KEY), key_id_of(NEXT_KEY)}


async def test_two_routers_that_begin_at_once_end_a_key_together(redis: RedisClient) -> None:
    class Slower(ApiKeyStore):
        async def revoke(self, key_id: str) -> ApiKey:
            await store_of(redis).revoke(key_id)  # by the other router
            return await super().revoke(key_id)

    for store, key in ((store_of(redis), KEY), (Slower(redis, HASHER), NEXT_KEY)):
        tenants = {"acme": TenantSeed("", LimitSet(), keys={"ci": key})}
        await apply_seed(redis, Seed({}, tenants, PriceList()), store)
    assert [key.key_id for key in await store.list("acme")] == [key_id_of(NEXT_KEY)]


async def test_a_new_tenant_is_never_there_without_its_limits(
    redis: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(TenantRegistry, "change", crash)
    seed = TenantSeed("", LimitSet(TenantLimits(concurrency=4)), OwnStanding(weight=0.5))
    with pytest.raises(OSError):  # noqa: PT011 - it has no message
        await apply_seed(redis, Seed({}, {"acme": seed}, PriceList()), store_of(redis))
    tenant = await TenantRegistry(redis).get("acme")
    assert (tenant.limits.own, tenant.standing) == (seed.limits.own, seed.standing)


@pytest.mark.parametrize("source", ["from_environ", "from_file"])
def test_a_key_in_the_place_of_its_source_is_not_shown(tmp_path: Path, source: str) -> None:
    (tmp_path / "tenants.toml").write_text(f"[tenants.a.keys.k]\n{source} = '{KEY}'")
    with pytest.raises(SeedError, match=rf"tenants\.a\.keys\.k\.{source} is the key itself") as raised:
        read_seed(tmp_path / "tenants.toml", {})
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[plans.gold]\nmax_tier = ['priority']", r"plans\.gold\.max_tier must be one of"),
        ("[plans.gold]\nmoney_per_day = '1e999999'", r"plans\.gold\.money_per_day: '1e999999' is no amount"),
    ],
)
def test_what_python_stumbles_over_is_named_too(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tenants.toml").write_text(text)
    with pytest.raises(SeedError, match=message):
        read_seed(tmp_path / "tenants.toml")


@pytest.mark.parametrize(
    "text", ["[prices.models.chat]\ninput = 1", "[plans.p.models.chat]\nconcurrency = 1", "[tenants.t.models.chat]"]
)
def test_a_limit_or_price_that_would_never_hold_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tenants.toml").write_text(text)
    assert read_seed(tmp_path / "tenants.toml", aliases=["other"]).models == {"chat"}
    with pytest.raises(SeedError, match="'chat' is an alias"):
        read_seed(tmp_path / "tenants.toml", aliases=["chat"])
