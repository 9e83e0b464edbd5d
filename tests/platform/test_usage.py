import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from importlib import resources

import pytest

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Usage
from rempart_platform.tenancy.keyspace import TenantKeys
from rempart_platform.tenancy.limits import TenantLimits
from rempart_platform.tenancy.quota import Ledger, QuotaConfig
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.testing import RecordingObserver, own_redis
from rempart_platform.tenancy.usage import UsageReader, UsageRecord


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as client:
        yield client


@pytest.fixture
async def reader(redis: RedisClient) -> UsageReader:
    tenants = TenantRegistry(redis)
    for name in ("beta", "alpha"):
        await tenants.create(name, TenantLimits())
    return UsageReader(redis, tenants)


async def _use(redis: RedisClient, tenant: str, model: str, usage: Usage, request_id: str) -> None:
    ledger = Ledger(redis, QuotaConfig(), RecordingObserver(), clock=lambda: 0.0)
    await ledger.settle(await ledger.reserve(tenant, request_id, 1000), usage, model)


async def test_settled_requests_add_up_by_tenant_and_model(redis: RedisClient, reader: UsageReader) -> None:
    before = datetime.now(UTC).date()
    await _use(redis, "beta", "big model", Usage(10, 5, 4), "one")
    await _use(redis, "beta", "big model", Usage(1, 0, 0), "two")
    await _use(redis, "beta", "another/model", Usage(3, 2, 1), "three")
    await _use(redis, "alpha", "big model", Usage(7, 7, 7), "four")
    records = await reader.read()
    assert {record.day for record in records} <= {str(before), str(datetime.now(UTC).date())}
    assert [(each.tenant, each.model, each.requests, each.prompt_tokens) for each in records] == [
        ("alpha", "big model", 1, 7),
        ("beta", "another/model", 1, 3),
        ("beta", "big model", 2, 11),
    ]
    assert (records[2].completion_tokens, records[2].cached_tokens) == (5, 4)
    assert await reader.read("alpha") == (records[0],)


async def test_records_are_in_order_of_day_and_then_of_model(redis: RedisClient, reader: UsageReader) -> None:
    counters = {"requests": 1, "prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 0}
    for day, model in (("2026-12-01", "a"), ("2026-11-30", "z"), ("2026-12-01", "B 2")):
        fields = {f"{day} {counter} {model}": count for counter, count in counters.items()}
        await redis.write_hash(TenantKeys("beta").usage, fields)
    assert await reader.read("beta") == (
        UsageRecord("beta", "z", "2026-11-30", 1, 2, 3, 0),
        UsageRecord("beta", "B 2", "2026-12-01", 1, 2, 3, 0),
        UsageRecord("beta", "a", "2026-12-01", 1, 2, 3, 0),
    )


async def test_tenant_without_use_has_no_records_and_an_unknown_one_is_not_found(reader: UsageReader) -> None:
    assert await reader.read("alpha") == ()
    with pytest.raises(RempartError) as raised:
        await reader.read("nobody")
    assert raised.value.kind is ErrorKind.NOT_FOUND


async def test_day_of_the_settle_script_is_the_utc_day(redis: RedisClient) -> None:
    script = (resources.files("rempart_platform.tenancy") / "scripts" / "ledger.lua").read_text()
    function = script[script.index("local function utc_day") : script.index("local today")]
    days = function + "local days = {} for i, s in ipairs(ARGV) do days[i] = utc_day(tonumber(s)) end return days"
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    noon_of_each_day = [12 * 3600 + 86400 * day for day in range(366 * 40)]
    edges = [edge + shift for edge in (0, 951782400, 951868800, 4107542400) for shift in (0, 1, 86399)]
    random_seconds = [random.Random(7).randrange(0, 8_000_000_000) for _ in range(1000)]
    for seconds in (noon_of_each_day[:7000], noon_of_each_day[7000:], edges, random_seconds):
        found = await redis.call(lambda each, seconds=seconds: each.eval(days, 0, *seconds))  # type: ignore[misc]
        assert found == [str((epoch + timedelta(seconds=each)).date()) for each in seconds]
