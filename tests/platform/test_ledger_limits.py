"""What limits mean: accounts of tenant, model and key; plans; tokens in flight; budgets of tokens and money."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]  # the package ships no types

from rempart_platform.apis.grpc_errors import rich_status
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Usage
from rempart_platform.tenancy.keyspace import TenantKeys, plan_record
from rempart_platform.tenancy.limits import LimitChange, LimitSet, TenantLimits
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.prices import ModelPrice, PriceList, PriceRegistry
from rempart_platform.tenancy.quota import RESERVE, Ledger, QuotaConfig
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.reservation import Balance
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.terms import TERMS_S, Terms
from rempart_platform.tenancy.testing import RecordingObserver, own_redis
from rempart_platform.tenancy.usage import UsageReader


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as client:
        yield client


def _ledger(redis: RedisClient, clock: ManualClock | None = None, **config: float) -> Ledger:
    return Ledger(redis, QuotaConfig(**config), RecordingObserver(), clock or time.monotonic)  # type: ignore[arg-type]


async def _tenant(redis: RedisClient, plan: str = "", **limits: int) -> None:
    await TenantRegistry(redis).create("acme", TenantLimits(**limits), plan)


async def _refusal(ledger: Ledger, tokens: int, *, model: str = "", key_id: str = "", prompt: int = 0) -> RempartError:
    request_id = f"refused {time.monotonic_ns()}"
    with pytest.raises(RempartError) as raised:
        await ledger.reserve("acme", request_id, tokens, model=model, key_id=key_id, prompt_tokens=prompt)
    return raised.value


def _named(error: RempartError) -> tuple[str, int]:
    assert error.violation is not None
    return error.violation.metric, error.violation.limit


async def _set_key_limits(redis: RedisClient, key_id: str, **limits: int) -> None:
    await TenantRegistry(redis).change("acme", LimitChange(TenantLimits(**limits), key_id=key_id))


async def test_tokens_in_flight_count_at_their_worst_case_until_the_request_ends(redis: RedisClient) -> None:
    ledger = _ledger(redis, concurrency_retry_s=0.7)
    await _tenant(redis, concurrent_tokens=100)
    first = await ledger.reserve("acme", "first", 60)
    error = await _refusal(ledger, 41)
    assert _named(error) == ("concurrent_tokens", 100)
    assert (error.kind, error.retry_after_s) == (ErrorKind.RATE_LIMIT_EXCEEDED, 0.7)
    second = await ledger.reserve("acme", "second", 40)
    await ledger.settle(first, Usage(10, 5), "model")
    await ledger.refund(second)
    assert (await ledger.balance("acme")).held_tokens == 0
    await ledger.reserve("acme", "third", 100)
    impossible = await _refusal(ledger, 101)
    assert (impossible.kind, _named(impossible)) == (ErrorKind.INVALID_REQUEST, ("concurrent_tokens", 100))


async def test_models_limits_hold_beside_the_tenants(redis: RedisClient) -> None:
    ledger = _ledger(redis)
    await _tenant(redis, requests_per_minute=3)
    await TenantRegistry(redis).change("acme", LimitChange(TenantLimits(requests_per_minute=1), model="big model"))
    await ledger.reserve("acme", "first", 1, model="big model")
    error = await _refusal(ledger, 1, model="big model")
    assert _named(error) == ("requests", 1)
    assert error.violation is not None
    assert error.violation.dimensions == {"model": "big model"}
    assert "for this model" in error.message
    admitted = await ledger.reserve("acme", "second", 1, model="small")
    assert admitted.headers["x-ratelimit-remaining-requests"] == "1"
    await ledger.reserve("acme", "third", 1)
    error = await _refusal(ledger, 1, model="small")
    assert (_named(error), error.violation.dimensions if error.violation else None) == (("requests", 3), {})


async def test_key_is_narrower_than_its_tenant_and_never_wider(redis: RedisClient) -> None:
    ledger = _ledger(redis)
    await _tenant(redis, tokens_per_minute=100)
    await _set_key_limits(redis, "narrow", tokens_per_minute=30)
    await _set_key_limits(redis, "wide", tokens_per_minute=1000)
    admitted = await ledger.reserve("acme", "first", 20, key_id="narrow")
    assert admitted.headers["x-ratelimit-limit-tokens"] == "30"
    assert admitted.headers["x-ratelimit-remaining-tokens"] == "10"
    error = await _refusal(ledger, 11, key_id="narrow")
    assert _named(error) == ("tokens", 30)
    assert error.violation is not None
    assert error.violation.dimensions == {"key_id": "narrow"}
    await ledger.reserve("acme", "second", 80, key_id="wide")
    assert _named(await _refusal(ledger, 1, key_id="wide")) == ("tokens", 100)


async def test_headers_are_those_of_the_account_with_the_least_left(redis: RedisClient) -> None:
    ledger = _ledger(redis)
    await _tenant(redis, requests_per_minute=10, tokens_per_minute=1000)
    await TenantRegistry(redis).change("acme", LimitChange(TenantLimits(tokens_per_minute=300), model="m"))
    await _set_key_limits(redis, "k", requests_per_minute=2)
    headers = (await ledger.reserve("acme", "first", 50, model="m", key_id="k")).headers
    assert headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "300",
        "x-ratelimit-remaining-tokens": "250",
        "x-ratelimit-reset-tokens": "1m0s",
    }
    assert set((await _refusal(ledger, 500, model="m", key_id="k")).headers) == set(headers)


async def test_most_specific_value_that_is_set_holds(redis: RedisClient) -> None:
    default = TenantLimits(requests_per_minute=100, tokens_per_minute=100, concurrency=100)
    ledger = Ledger(redis, QuotaConfig(default_limits=default), RecordingObserver(), time.monotonic)
    plan = TenantLimits(requests_per_minute=50, tokens_per_minute=0)
    await PlanRegistry(redis).set("gold", LimitChange(plan), LimitChange(TenantLimits(concurrency=5), model="m"))
    await _tenant(redis, "gold", requests_per_minute=20)
    admitted = await ledger.reserve("acme", "first", 10_000, model="m")
    assert admitted.headers["x-ratelimit-limit-requests"] == "20"
    assert "x-ratelimit-limit-tokens" not in admitted.headers, "0 of the plan is unlimited"
    for number in range(4):
        await ledger.reserve("acme", f"of m {number}", 1, model="m")
    assert _named(await _refusal(ledger, 1, model="m")) == ("concurrency", 5)
    await TenantRegistry(redis).change("acme", LimitChange(TenantLimits(concurrency=6), model="m"))
    await ledger.reserve("acme", "sixth", 1, model="m")
    await TenantRegistry(redis).change("acme", LimitChange(unset=("requests_per_minute",)))
    admitted = await ledger.reserve("acme", "next", 1)
    assert admitted.headers["x-ratelimit-limit-requests"] == "50"
    await TenantRegistry(redis).set_plan("acme", "")
    assert _named(await _refusal(ledger, 101)) == ("tokens", 100)


async def test_changed_plan_is_in_force_when_what_a_router_remembers_ends(redis: RedisClient) -> None:
    clock = ManualClock()
    ledger = _ledger(redis, clock)
    plans = PlanRegistry(redis)
    await plans.set("free", LimitChange(TenantLimits(requests_per_minute=1)))
    await plans.set("paid", LimitChange(TenantLimits(requests_per_minute=2)))
    await _tenant(redis, "free")
    await ledger.reserve("acme", "first", 1)
    assert _named(await _refusal(ledger, 1)) == ("requests", 1)
    await TenantRegistry(redis).set_plan("acme", "paid")
    await ledger.reserve("acme", "second", 1)  # Another plan of the tenant is seen at once.
    await plans.set("paid", LimitChange(TenantLimits(requests_per_minute=3)))
    clock.now += TERMS_S
    await ledger.reserve("acme", "third", 1)
    await redis.call(lambda redis: redis.delete(plan_record("paid")))
    clock.now += TERMS_S
    assert (await ledger.reserve("acme", "fourth", 1)).headers == {}, "a plan that is gone leaves the defaults"


async def test_spent_budget_is_waited_for_until_the_next_utc_day_or_month(redis: RedisClient) -> None:
    ledger = _ledger(redis)
    await _tenant(redis, tokens_per_day=100)
    await TenantRegistry(redis).change("acme", LimitChange(TenantLimits(tokens_per_month=60), model="m"))
    await ledger.settle(await ledger.reserve("acme", "first", 60, model="m"), Usage(50, 5), "m")
    now = datetime.now(UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    tomorrow, next_month = midnight + timedelta(days=1), (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
    for error, name, end in (
        (await _refusal(ledger, 46), ("tokens_per_day", 100), tomorrow),
        (await _refusal(ledger, 6, model="m"), ("tokens_per_month", 60), next_month),
    ):
        assert _named(error) == name
        assert error.retry_after_s is not None
        assert abs(error.retry_after_s - (end - now).total_seconds()) < 5
    await ledger.reserve("acme", "second", 5, model="m")
    assert (await _refusal(ledger, 101)).kind is ErrorKind.INVALID_REQUEST


async def test_budget_that_is_only_held_is_waited_for_a_moment(redis: RedisClient) -> None:
    ledger = _ledger(redis, concurrency_retry_s=0.7)
    await _tenant(redis, tokens_per_day=100)
    held = await ledger.reserve("acme", "first", 90)
    error = await _refusal(ledger, 11)
    assert (_named(error), error.retry_after_s) == (("tokens_per_day", 100), 0.7)
    await ledger.settle(held, Usage(5, 5), "m")
    await ledger.reserve("acme", "second", 90)


async def test_budget_of_another_day_is_over(redis: RedisClient) -> None:
    ledger = _ledger(redis)
    await _tenant(redis, tokens_per_day=100, tokens_per_month=1000)
    budgets = next(key for key in TenantKeys("acme").ledger_of() if key.endswith("budgets"))
    month = datetime.now(UTC).strftime("%Y-%m")
    spent = {"day_tokens": 100, "day_money": 0, "month_tokens": 950, "month_money": 0}
    await redis.write_hash(budgets, {"day": "2026-01-01", "month": month, **spent})
    reservation = await ledger.reserve("acme", "first", 50)
    await ledger.settle(reservation, Usage(10, 0), "m")
    balance = await ledger.balance("acme")
    assert (balance.tokens_per_day, balance.tokens_per_month) == (10, 960)
    await redis.write_hash(budgets, {"day": "2026-01-01", "month": "2026-01", **spent})
    await ledger.reserve("acme", "second", 100)


async def test_end_of_month_is_the_calendars(redis: RedisClient) -> None:
    functions = RESERVE.text[RESERVE.text.index("local function utc_day") : RESERVE.text.index("-- Tokens that count")]
    script = (
        functions.replace("local today = utc_day(now_s)", "")
        + "local ends = {} for i, s in ipairs(ARGV) do ends[i] = next_month(tonumber(s)) end return ends"
    )
    start = datetime(2023, 12, 25, tzinfo=UTC)
    moments = [start + timedelta(hours=7 * step) for step in range(6000)]
    found = await redis.call(lambda each: each.eval(script, 0, *(int(moment.timestamp()) for moment in moments)))
    for moment, end in zip(moments, found, strict=True):
        first = moment.replace(day=1, hour=0, minute=0, second=0)
        assert datetime.fromtimestamp(end, UTC) == (first + timedelta(days=32)).replace(day=1)


async def test_money_is_reserved_at_the_worst_and_settled_at_the_true_cost(redis: RedisClient) -> None:
    ledger = _ledger(redis)
    prices = PriceRegistry(redis)
    await prices.set_currency("EUR")
    await prices.set_price("m", ModelPrice(input=270, cached=70, output=1100))
    await _tenant(redis, money_per_day=100_000)
    reservation = await ledger.reserve("acme", "first", 150, model="m", prompt_tokens=100)
    assert (await ledger.balance("acme")).held_money == 100 * 270 + 50 * 1100 == 82_000
    error = await _refusal(ledger, 50, model="m", prompt=0)
    assert (_named(error), error.retry_after_s) == (("money_per_day", 100_000), 1.0)
    assert "0.0001 EUR per day" in error.message
    await prices.set_price("m", ModelPrice())
    await ledger.settle(reservation, Usage(100, 10, cached_tokens=80), "m")
    cost = 20 * 270 + 80 * 70 + 10 * 1100
    balance = await ledger.balance("acme")
    assert (balance.money_per_day, balance.money_per_month, balance.held_money) == (cost, cost, 0)
    (record,) = await UsageReader(redis, TenantRegistry(redis)).read("acme")
    assert record.cost_nanos == cost


async def test_repetitions_change_no_account(redis: RedisClient) -> None:
    ledger = _ledger(redis)
    await _tenant(redis)
    await PriceRegistry(redis).set_price("m", ModelPrice(input=10, cached=1, output=20))
    kept = await ledger.reserve("acme", "kept", 50, model="m", key_id="k", prompt_tokens=10)
    settled = await ledger.reserve("acme", "settled", 50, model="m", key_id="k", prompt_tokens=10)
    for _ in range(3):
        await ledger.reserve("acme", "kept", 50, model="m", key_id="k", prompt_tokens=10)
        await ledger.settle(settled, Usage(10, 5), "m")
        await ledger.refund(settled)
        await ledger.renew_leases()
    expected = Balance(2, 65, 1, 50, 10 * 10 + 40 * 20, 15, 200, 15, 200)
    for scope in ({}, {"model": "m"}, {"key_id": "k"}):
        assert await ledger.balance("acme", **scope) == expected
    await ledger.refund(kept)
    assert await ledger.balance("acme", key_id="k") == Balance(1, 15, 0, 0, 0, 15, 200, 15, 200)


async def test_what_a_crashed_router_held_is_free_after_the_lease(redis: RedisClient) -> None:
    await _tenant(redis, concurrent_tokens=100, tokens_per_day=100)
    crashing, survivor = _ledger(redis), _ledger(redis)
    await crashing.reserve("acme", "of a router that crashes", 80, model="m", key_id="k")
    assert _named(await _refusal(survivor, 21))[0] in ("concurrent_tokens", "tokens_per_day")
    for key in TenantKeys("acme").ledger_of("m", "k"):
        if ":leases" in key:
            ended_us = {"of a router that crashes": 1}  # long ago
            await redis.call(lambda each, key=key, ended=ended_us: each.zadd(key, ended))  # type: ignore[misc]
    await survivor.reserve("acme", "next", 100, model="m", key_id="k")
    assert (await survivor.balance("acme", key_id="k")).held_tokens == 100


async def test_late_settling_of_a_swept_reservation_charges_what_was_used(redis: RedisClient) -> None:
    ledger = _ledger(redis, lease_s=0.05)
    reservation = await ledger.reserve("acme", "first", 80)
    await asyncio.sleep(0.06)
    assert (await ledger.balance("acme")).held_tokens == 0
    await ledger.settle(reservation, Usage(10, 5), "m")
    assert await ledger.balance("acme") == Balance(1, 15, 0, 0, 0, 15, 0, 15, 0)


async def test_grpc_names_the_limit_that_refused(redis: RedisClient) -> None:
    ledger = _ledger(redis)
    await _tenant(redis)
    await TenantRegistry(redis).change("acme", LimitChange(TenantLimits(concurrent_tokens=10), model="m"))
    await ledger.reserve("acme", "first", 10, model="m")
    status = rich_status(await _refusal(ledger, 1, model="m"))
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    retry, quota = error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    assert [detail.Unpack(quota) or detail.Unpack(retry) for detail in status.details] == [False, True, True]
    (violation,) = quota.violations
    assert (violation.subject, violation.quota_metric, violation.quota_value) == ("acme", "concurrent_tokens", 10)
    assert dict(violation.quota_dimensions) == {"model": "m"}
    assert retry.retry_delay.ToMilliseconds() == 1000


async def test_tenants_own_hash_tells_no_model_apart_by_its_spaces(redis: RedisClient) -> None:
    tenants = TenantRegistry(redis)
    await _tenant(redis, concurrency=1)
    for model in ("a", "a b", "tokens_per_day a"):
        await tenants.change("acme", LimitChange(TenantLimits(tokens_per_day=5), model=model))
    await tenants.change("acme", LimitChange(unset=("tokens_per_day",), model="a"))
    of_models = dict.fromkeys(("a b", "tokens_per_day a"), TenantLimits(tokens_per_day=5))
    assert (await tenants.get("acme")).limits == LimitSet(TenantLimits(concurrency=1), of_models)


async def test_of_many_who_find_prices_too_old_one_reads_and_the_others_go_on(
    redis: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, may_answer, num_reads = ManualClock(), asyncio.Event(), [0]

    async def read(self: PriceRegistry) -> PriceList:
        num_reads[0] += 1
        await may_answer.wait()
        if num_reads[0] == 3:
            raise RempartError(ErrorKind.UNAVAILABLE, "away")
        return PriceList(f"read {num_reads[0]}")

    monkeypatch.setattr(PriceRegistry, "read", read)
    terms = Terms(redis, clock)
    may_answer.set()
    assert (await terms.prices()).currency == "read 1"
    clock.now += TERMS_S
    may_answer.clear()
    reading = asyncio.create_task(terms.prices())
    await asyncio.sleep(0)
    assert [(await terms.prices()).currency for _ in range(3)] == ["read 1"] * 3
    may_answer.set()
    assert (await reading).currency == "read 2"
    clock.now += TERMS_S
    with pytest.raises(RempartError, match="away"):
        await terms.prices()
    assert (await terms.prices()).currency == "read 4", "what could not be read is asked for again"
