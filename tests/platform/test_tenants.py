import asyncio
from collections.abc import AsyncIterator

import pytest

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.limits import MAX_LIMIT, LimitChange, LimitSet, TenantLimits
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.tenants import Tenant, TenantRegistry
from rempart_platform.tenancy.testing import own_redis


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as client:
        yield client


@pytest.fixture
def tenants(redis: RedisClient) -> TenantRegistry:
    return TenantRegistry(redis, clock=lambda: 1_700_000_000.9)


async def test_created_tenant_is_found_with_the_limits_that_were_set(tenants: TenantRegistry) -> None:
    limits = TenantLimits(requests_per_minute=50, concurrency=0)
    created = await tenants.create("acme", limits)
    assert created == Tenant("acme", LimitSet(limits), 1_700_000_000)
    assert await tenants.get("acme") == created


async def test_name_that_is_taken_is_refused_and_its_limits_stay(tenants: TenantRegistry) -> None:
    await tenants.create("acme", TenantLimits(requests_per_minute=50))
    with pytest.raises(RempartError) as raised:
        await tenants.create("acme", TenantLimits(requests_per_minute=1))
    assert raised.value.kind is ErrorKind.ALREADY_EXISTS
    assert (await tenants.get("acme")).limits.own == TenantLimits(requests_per_minute=50)


async def test_of_many_who_create_one_name_at_once_one_succeeds(tenants: TenantRegistry) -> None:
    results = await asyncio.gather(
        *(tenants.create("acme", TenantLimits(concurrency=i)) for i in range(20)), return_exceptions=True
    )
    created = [result for result in results if isinstance(result, Tenant)]
    assert len(created) == 1
    assert await tenants.get("acme") == created[0]


@pytest.mark.parametrize(
    "name", ["", "Acme", "1acme", "-acme", "a" * 64, "a_b", "a b", "a{b}", "acme\n", "é", "a:b", "a*"]
)
async def test_name_outside_the_rule_is_refused(tenants: TenantRegistry, name: str) -> None:
    with pytest.raises(RempartError) as raised:
        await tenants.create(name, TenantLimits())
    assert raised.value.kind is ErrorKind.INVALID_REQUEST
    assert raised.value.param == "name"


@pytest.mark.parametrize("name", ["a", "a" * 63, "a-1", "z9-"])
async def test_name_within_the_rule_is_taken(tenants: TenantRegistry, name: str) -> None:
    assert (await tenants.create(name, TenantLimits())).name == name


@pytest.mark.parametrize("value", [-1, MAX_LIMIT + 1])
async def test_limit_out_of_range_is_refused_by_name(tenants: TenantRegistry, value: int) -> None:
    with pytest.raises(RempartError) as raised:
        await tenants.create("acme", TenantLimits(tokens_per_minute=value))
    assert raised.value.param == "limits.tokens_per_minute"
    assert await tenants.list() == ()


async def test_list_is_in_order_of_name(tenants: TenantRegistry) -> None:
    for name in ("beta", "alpha", "gamma"):
        await tenants.create(name, TenantLimits())
    assert [tenant.name for tenant in await tenants.list()] == ["alpha", "beta", "gamma"]


async def test_set_limits_changes_only_what_is_given(tenants: TenantRegistry) -> None:
    await tenants.create("acme", TenantLimits(requests_per_minute=50, tokens_per_minute=1000))
    changed = await tenants.change("acme", LimitChange(TenantLimits(tokens_per_minute=0, concurrency=4)))
    assert changed.limits.own == TenantLimits(requests_per_minute=50, tokens_per_minute=0, concurrency=4)
    assert await tenants.get("acme") == changed
    assert await tenants.change("acme", LimitChange(TenantLimits())) == changed


async def test_unknown_tenant_is_not_found(tenants: TenantRegistry) -> None:
    for attempt in (tenants.get("nobody"), tenants.change("nobody", LimitChange(TenantLimits(concurrency=1)))):
        with pytest.raises(RempartError) as raised:
            await attempt
        assert raised.value.kind is ErrorKind.NOT_FOUND
    assert await tenants.list() == ()
