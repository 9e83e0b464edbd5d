"""Plans that are removed while tenants come to have them."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.limits import LimitChange, TenantLimits
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.testing import away_after, own_redis, take_turns

GOLD = TenantLimits(concurrency=5)


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as client:
        yield client


def _moves(name: str, plan: str) -> Callable[[RedisClient], Awaitable[object]]:
    return lambda redis: TenantRegistry(redis).set_plan(name, plan)


def _creates(name: str, plan: str) -> Callable[[RedisClient], Awaitable[object]]:
    return lambda redis: TenantRegistry(redis).create(name, TenantLimits(), plan)


def _removes(plan: str) -> Callable[[RedisClient], Awaitable[object]]:
    return lambda redis: PlanRegistry(redis).remove(plan)


def _sets(plan: str) -> Callable[[RedisClient], Awaitable[object]]:
    return lambda redis: PlanRegistry(redis).set(plan, LimitChange(GOLD))


@pytest.mark.parametrize(
    ("orders", "acts"),
    [
        (range(20), (_moves("acme", "gold"), _removes("gold"))),
        (range(60), (_moves("acme", "gold"), _removes("gold"), _removes("silver"))),
        (range(60), (_moves("acme", "gold"), _moves("acme", "silver"), _removes("gold"), _removes("silver"))),
        (
            range(560, 600),
            (_creates("new", "gold"), _creates("new", "silver"), _removes("gold")),
        ),  # one of them is rare
        (range(60), (_moves("acme", "gold"), _removes("gold"), _sets("gold"), _removes("gold"))),
    ],
    ids=["a move", "from another that goes too", "two moves", "two new ones", "set again"],
)
async def test_no_tenant_has_a_plan_that_is_gone(
    redis: RedisClient, orders: range, acts: tuple[Callable[[RedisClient], Awaitable[object]], ...]
) -> None:
    tenants, plans = TenantRegistry(redis), PlanRegistry(redis)
    await tenants.create("acme", TenantLimits())
    num_moved = 0
    for seed in orders:
        await tenants.set_plan("acme", "")
        for plan in ("gold", "silver"):
            await plans.set(plan, LimitChange(GOLD))
        await tenants.set_plan("acme", "silver")
        await take_turns(redis, random.Random(seed), *acts)
        there = {plan.name for plan in await plans.list()}
        assert there.issuperset({tenant.plan for tenant in await tenants.list()} - {""}), seed
        assert all(plan.limits.own == GOLD for plan in await plans.list()), "nothing is left of a plan that was removed"
        num_moved += "gold" in there
        if "new" in {tenant.name for tenant in await tenants.list()}:
            await redis.call(lambda redis: redis.delete("rempart:{new}:tenant"))
    assert 0 < num_moved < len(orders), "the order was always the same"


@pytest.mark.parametrize("num_calls", range(1, 5))
async def test_removal_that_was_cut_short_leaves_its_limits_and_is_ended_by_the_next(
    redis: RedisClient, num_calls: int
) -> None:
    tenants, plans = TenantRegistry(redis), PlanRegistry(redis)
    await tenants.create("acme", TenantLimits())
    await plans.set("gold", LimitChange(GOLD))
    with pytest.raises(RedisAwayError), away_after(redis, num_calls):
        await plans.remove("gold")
    assert (await plans.get("gold")).limits.own == GOLD
    if num_calls > 1:
        with pytest.raises(RempartError, match="'gold' is being removed; set it to keep it") as raised:
            await tenants.set_plan("acme", "gold")
        assert raised.value.kind is ErrorKind.NOT_FOUND
    await plans.remove("gold")
    assert await plans.list() == ()


async def test_plan_whose_removal_was_cut_short_is_kept_by_setting_it(redis: RedisClient) -> None:
    tenants, plans = TenantRegistry(redis), PlanRegistry(redis)
    await tenants.create("acme", TenantLimits())
    await plans.set("gold", LimitChange(GOLD))
    with pytest.raises(RedisAwayError), away_after(redis, 3):
        await plans.remove("gold")
    await plans.set("gold")
    assert (await tenants.set_plan("acme", "gold")).plan == "gold"


@pytest.mark.parametrize("num_calls", range(2, 4))
async def test_move_that_was_cut_short_leaves_the_plan_of_before_and_is_ended_by_the_next(
    redis: RedisClient, num_calls: int
) -> None:
    tenants, plans = TenantRegistry(redis), PlanRegistry(redis)
    for plan in ("gold", "silver"):
        await plans.set(plan)
    await tenants.create("acme", TenantLimits(), "silver")
    with pytest.raises(RedisAwayError), away_after(redis, num_calls):
        await tenants.set_plan("acme", "gold")
    assert (await tenants.get("acme")).plan == "silver"
    with pytest.raises(RempartError, match="'acme' has this plan"):
        await plans.remove("gold")  # it may be about to have it
    await tenants.set_plan("acme", "silver")
    await plans.remove("gold")
