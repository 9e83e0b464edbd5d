"""How tenants stand: what is kept of it, what a plan passes on, and how soon a change is noticed."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Caller, ServiceTier, Standing
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.limits import TenantLimits
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient, connect_redis
from rempart_platform.tenancy.standing import MAX_WEIGHT, OwnStanding, StandingChange
from rempart_platform.tenancy.standings import StandingAuthenticator, Standings
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.testing import own_redis, patient


class Clock:
    """Seconds, set by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as client:
        yield client


@pytest.mark.parametrize(
    ("stored", "weight"),
    [
        ("4", 4.0),
        ("0.5", 0.5),
        ("1e-308", 1.0),
        ("1e9", 1.0),
        ("0", 1.0),
        ("-1", 1.0),
        ("nan", 1.0),
        ("x", 1.0),
        ("", 1.0),
    ],
)
async def test_a_record_that_was_spoiled_stands_as_if_nothing_were_set(
    redis: RedisClient, stored: str, weight: float
) -> None:
    await redis.write_hash("rempart:{acme}:tenant", {"weight": stored, "max_tier": "best"})
    assert await Standings(redis, Clock()).of("acme") == Standing(weight=weight)


async def test_what_a_tenant_does_not_say_its_plan_says(redis: RedisClient) -> None:
    tenants, plans, standings = TenantRegistry(redis), PlanRegistry(redis), Standings(redis, Clock())
    await plans.set("gold", StandingChange(OwnStanding(weight=4.0, max_tier=ServiceTier.PRIORITY)))
    await tenants.create("plain", TenantLimits())
    await tenants.create("golden", TenantLimits(), "gold")
    own = OwnStanding(weight=0.25, max_tier=ServiceTier.FLEX, cache_group="house")
    assert (await tenants.create("own", TenantLimits(), "gold", own)).standing == own
    assert await standings.of("plain") == Standing()
    assert await standings.of("golden") == Standing(4.0, ServiceTier.PRIORITY)
    assert await standings.of("own") == Standing(0.25, ServiceTier.FLEX, "house")
    assert await standings.of("nobody") == Standing()


async def test_a_change_of_the_tenant_or_of_its_plan_is_noticed_within_5_s(redis: RedisClient) -> None:
    tenants, plans, clock = TenantRegistry(redis), PlanRegistry(redis), Clock()
    standings = Standings(redis, clock)
    await plans.set("gold", StandingChange(OwnStanding(weight=4.0)))
    await tenants.create("acme", TenantLimits(), "gold")
    assert await standings.of("acme") == Standing(4.0)
    await plans.set("gold", StandingChange(OwnStanding(weight=3.0)))
    await tenants.change("acme", StandingChange(OwnStanding(max_tier=ServiceTier.PRIORITY)))
    clock.now_s = 4.9
    assert await standings.of("acme") == Standing(4.0)
    clock.now_s = 5.0
    assert await standings.of("acme") == Standing(3.0, ServiceTier.PRIORITY)
    assert await standings.of("acme") == Standing(3.0, ServiceTier.PRIORITY)
    await tenants.change("acme", StandingChange(unset=("max_tier",)))
    await tenants.set_plan("acme", "")
    clock.now_s = 10.0
    assert await standings.of("acme") == Standing()


async def test_a_suspended_tenant_is_refused_until_it_or_its_plan_says_otherwise(redis: RedisClient) -> None:
    tenants, plans, clock = TenantRegistry(redis), PlanRegistry(redis), Clock()
    standings = Standings(redis, clock)
    await plans.set("trial", StandingChange(OwnStanding(suspended=True)))
    await tenants.create("acme", TenantLimits(), standing=OwnStanding(suspended=True))
    await tenants.create("beta", TenantLimits(), "trial")
    await tenants.create("gamma", TenantLimits(), "trial", OwnStanding(suspended=False))
    for tenant in ("acme", "beta"):
        for _ in range(2):  # read, and remembered
            with pytest.raises(RempartError, match="suspended") as raised:
                await standings.of(tenant)
            assert raised.value.kind is ErrorKind.PERMISSION_DENIED
    assert await standings.of("gamma") == Standing()
    await tenants.change("acme", StandingChange(unset=("suspended",)))
    clock.now_s = 5.0
    assert await standings.of("acme") == Standing()


async def test_while_redis_is_away_those_that_were_seen_stand_as_they_did() -> None:
    clock = Clock()
    living = AsyncExitStack()
    server = await living.enter_async_context(embedded_redis(EmbeddedRedisConfig()))
    async with living, connect_redis(patient(server.url)) as redis:
        await TenantRegistry(redis).create("acme", TenantLimits(), standing=OwnStanding(weight=7.0))
        standings = Standings(redis, clock)
        assert await standings.of("acme") == Standing(7.0)
        await living.aclose()
        clock.now_s = 60.0
        assert await standings.of("acme") == Standing(7.0)
        with pytest.raises(RedisAwayError):
            await standings.of("never-seen")


@pytest.mark.parametrize(
    ("own", "param"),
    [
        (OwnStanding(weight=0.0), "standing.weight"),
        (OwnStanding(weight=float("nan")), "standing.weight"),
        (OwnStanding(weight=MAX_WEIGHT * 2), "standing.weight"),
        (OwnStanding(cache_group=""), "standing.cache_group"),
        (OwnStanding(cache_group="a{b}"), "standing.cache_group"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(own: OwnStanding, param: str) -> None:
    with pytest.raises(RempartError) as raised:
        StandingChange(own)
    assert (raised.value.kind, raised.value.param) == (ErrorKind.INVALID_REQUEST, param)


def test_only_what_there_is_can_be_unset() -> None:
    with pytest.raises(RempartError, match="no 'created_s'"):
        StandingChange(unset=("created_s",))


async def test_a_caller_comes_with_its_standing(redis: RedisClient) -> None:
    class Anyone:
        async def authenticate(self, bearer: str) -> Caller:
            return Caller(bearer, "key")

    await TenantRegistry(redis).create("acme", TenantLimits(), standing=OwnStanding(weight=2.0))
    authenticator = StandingAuthenticator(Anyone(), Standings(redis, Clock()))
    assert await authenticator.authenticate("acme") == Caller("acme", "key", Standing(2.0))
