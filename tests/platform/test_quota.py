import asyncio
import itertools
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.generation import Usage
from rempart_platform.tenancy.closing import Ending, EndingQueue
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.keyspace import TenantKeys
from rempart_platform.tenancy.limits import LimitChange, TenantLimits
from rempart_platform.tenancy.quota import REFUND, Ledger, QuotaConfig, open_ledger
from rempart_platform.tenancy.redis_client import RedisClient, RedisConfig, connect_redis
from rempart_platform.tenancy.reservation import Reservation
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.testing import RecordingObserver, own_redis, patient
from rempart_platform.tenancy.usage import UsageReader


class Counted(NamedTuple):
    """What counts for a tenant in the window, and in flight."""

    requests: int
    tokens: int
    concurrency: int


NOTHING = Counted(requests=0, tokens=0, concurrency=0)
CLOCKS_S = 0.005
"""Between Redis' clock and ours."""


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as client:
        yield client


@pytest.fixture
def observer() -> RecordingObserver:
    return RecordingObserver()


def _brief(url: str) -> RedisConfig:
    """Short enough to wait for, long enough for a busy machine while the server runs."""
    return RedisConfig(url, timeout_s=2.0, open_s=0.2)


async def counted(ledger: Ledger, tenant: str) -> Counted:
    balance = await ledger.balance(tenant)
    return Counted(balance.requests, balance.tokens, balance.concurrency)


def _ledger(redis: RedisClient, observer: RecordingObserver, config: QuotaConfig | None = None) -> Ledger:
    """A ledger whose tasks do not run."""
    return Ledger(redis, config or QuotaConfig(), observer, time.monotonic)


async def _tenant(redis: RedisClient, limits: TenantLimits) -> None:
    await TenantRegistry(redis).create("acme", limits)


async def _refusal(ledger: Ledger, request_id: str, tokens: int) -> RempartError:
    with pytest.raises(RempartError) as raised:
        await ledger.reserve("acme", request_id, tokens)
    return raised.value


async def _is_admitted(ledger: Ledger, request_id: str, tokens: int) -> bool:
    try:
        await ledger.reserve("acme", request_id, tokens)
    except RempartError as error:
        if error.kind is not ErrorKind.RATE_LIMIT_EXCEEDED:
            raise
        return False
    return True


async def _ask_until_admitted(ledger: Ledger) -> tuple[float, float]:
    """Asks without a pause: when the last one that was refused began, and when the one that was admitted had ended."""
    last_refused = 0.0
    for i in itertools.count():
        began = time.monotonic()
        if await _is_admitted(ledger, f"attempt {i}", 1):
            break
        last_refused = began
    return last_refused, time.monotonic()


async def _fill(redis: RedisClient, value_bytes: int) -> None:
    """Writes until Redis takes no more of that size."""
    for i in itertools.count():
        try:
            await redis.write_hash("filling", {f"{value_bytes} {i}": "x" * value_bytes})
        except RempartError:
            return


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(moment - time.monotonic())


async def test_two_routers_admit_exactly_the_limit_of_200_parallel_requests_and_tell_true_waits() -> None:
    observer = RecordingObserver()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(embedded_redis(EmbeddedRedisConfig()))
        clients = [await stack.enter_async_context(connect_redis(patient(server.url))) for _ in range(2)]
        ledgers = [_ledger(client, observer) for client in clients]
        await _tenant(clients[0], TenantLimits(requests_per_minute=50))

        started = time.monotonic()
        results = await asyncio.gather(
            *(ledgers[i % 2].reserve("acme", f"request {i}", 10) for i in range(200)), return_exceptions=True
        )
        elapsed_s = time.monotonic() - started
        refusals = [result for result in results if isinstance(result, RempartError)]
        assert len(refusals) == 150
        assert observer.counts == {"reserved": 50, "refused": 150, "refused requests": 150}
        assert await counted(ledgers[0], "acme") == Counted(requests=50, tokens=500, concurrency=50)
        for refusal in refusals:
            assert refusal.kind is ErrorKind.RATE_LIMIT_EXCEEDED
            assert refusal.retry_after_s is not None
            assert 60.0 - elapsed_s <= refusal.retry_after_s <= 60.0


async def test_request_is_admitted_after_the_stated_wait_and_not_before(
    redis: RedisClient, observer: RecordingObserver
) -> None:
    ledger = _ledger(redis, observer, QuotaConfig(window_s=2.0))
    await _tenant(redis, TenantLimits(requests_per_minute=3))
    for i in range(3):
        await ledger.reserve("acme", f"early {i}", 1)
        await asyncio.sleep(0.05)
    asked = time.monotonic()
    refusal = await _refusal(ledger, "late", 1)
    answered = time.monotonic()
    assert refusal.retry_after_s is not None
    await _sleep_until(asked + refusal.retry_after_s - 0.03)
    last_refused, admitted = await _ask_until_admitted(ledger)
    rounded_up_s = 0.001
    assert asked + refusal.retry_after_s - rounded_up_s < admitted
    assert last_refused < answered + refusal.retry_after_s


async def test_wait_for_tokens_ends_when_enough_of_the_oldest_reservations_have_left(
    redis: RedisClient, observer: RecordingObserver
) -> None:
    ledger = _ledger(redis, observer)
    await _tenant(redis, TenantLimits(tokens_per_minute=100))
    reserved = []
    for i, tokens in enumerate((10, 20, 70)):
        began = time.monotonic()
        await ledger.reserve("acme", f"request {i}", tokens)
        reserved.append((began, time.monotonic()))
        await asyncio.sleep(0.1)
    for tokens, last_to_leave in ((10, 0), (11, 1), (30, 1), (31, 2), (100, 2)):
        asked = time.monotonic()
        refusal = await _refusal(ledger, f"late {tokens}", tokens)
        answered = time.monotonic()
        assert refusal.violation is not None
        assert (refusal.violation.metric, refusal.violation.limit) == ("tokens", 100)
        assert refusal.retry_after_s is not None
        earliest, latest = reserved[last_to_leave]
        assert earliest + 60 - answered - CLOCKS_S <= refusal.retry_after_s <= latest + 60 - asked + CLOCKS_S


async def test_refused_request_counts_nothing(redis: RedisClient, observer: RecordingObserver) -> None:
    ledger = _ledger(redis, observer)
    await _tenant(redis, TenantLimits(requests_per_minute=5, tokens_per_minute=100))
    await ledger.reserve("acme", "first", 60)
    before = await counted(ledger, "acme")
    for i in range(10):
        await _refusal(ledger, f"late {i}", 41)
    assert await counted(ledger, "acme") == before == Counted(requests=1, tokens=60, concurrency=1)
    assert await _is_admitted(ledger, "small", 40)


async def test_request_larger_than_the_limit_is_told_that_no_wait_helps(
    redis: RedisClient, observer: RecordingObserver
) -> None:
    ledger = _ledger(redis, observer)
    await _tenant(redis, TenantLimits(tokens_per_minute=100))
    refusal = await _refusal(ledger, "huge", 101)
    assert refusal.kind is ErrorKind.INVALID_REQUEST
    assert refusal.retry_after_s is None
    assert refusal.violation is not None
    assert refusal.violation.metric == "tokens"
    assert "100 tokens per minute" in refusal.message
    assert await counted(ledger, "acme") == NOTHING


async def test_concurrency_frees_a_place_with_each_ending(redis: RedisClient, observer: RecordingObserver) -> None:
    ledger = _ledger(redis, observer, QuotaConfig(concurrency_retry_s=0.7))
    await _tenant(redis, TenantLimits(concurrency=2))
    first = await ledger.reserve("acme", "first", 1)
    second = await ledger.reserve("acme", "second", 1)
    refusal = await _refusal(ledger, "third", 1)
    assert refusal.violation is not None
    assert (refusal.violation.metric, refusal.violation.limit) == ("concurrency", 2)
    assert refusal.retry_after_s == 0.7
    await ledger.settle(first, Usage(1, 0), "model")
    assert await _is_admitted(ledger, "third", 1)
    assert not await _is_admitted(ledger, "fourth", 1)
    await ledger.refund(second)
    assert await _is_admitted(ledger, "fourth", 1)


async def test_settling_corrects_the_window_to_what_was_used(redis: RedisClient, observer: RecordingObserver) -> None:
    ledger = _ledger(redis, observer)
    await _tenant(redis, TenantLimits(tokens_per_minute=100))
    reservation = await ledger.reserve("acme", "first", 90)
    await ledger.settle(reservation, Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=8), "model")
    assert await counted(ledger, "acme") == Counted(requests=1, tokens=15, concurrency=0)
    assert ledger.num_open == 0
    assert await _is_admitted(ledger, "second", 85)


async def test_cached_tokens_count_by_their_weight(redis: RedisClient, observer: RecordingObserver) -> None:
    for i, (weight, tokens) in enumerate(((0.0, 7), (0.5, 11), (1.0, 15))):
        ledger = _ledger(redis, observer, QuotaConfig(cached_token_weight=weight))
        reservation = await ledger.reserve(f"tenant-{i}", "request", 90)
        await ledger.settle(reservation, Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=8), "model")
        assert (await counted(ledger, f"tenant-{i}")).tokens == tokens


async def test_refund_leaves_no_trace(redis: RedisClient, observer: RecordingObserver) -> None:
    ledger = _ledger(redis, observer)
    await _tenant(redis, TenantLimits(requests_per_minute=1))
    reservation = await ledger.reserve("acme", "first", 90)
    await ledger.refund(reservation)
    assert await counted(ledger, "acme") == NOTHING
    assert await _is_admitted(ledger, "second", 90)
    assert await UsageReader(redis, TenantRegistry(redis)).read() == ()


async def test_only_the_first_ending_counts(redis: RedisClient, observer: RecordingObserver) -> None:
    ledger = _ledger(redis, observer)
    await _tenant(redis, TenantLimits())
    settled = await ledger.reserve("acme", "settled", 50)
    refunded = await ledger.reserve("acme", "refunded", 50)
    for _ in range(3):
        await ledger.settle(settled, Usage(10, 5), "model")
        await ledger.refund(settled)
        await ledger.refund(refunded)
        await ledger.settle(refunded, Usage(10, 5), "model")
    assert await counted(ledger, "acme") == Counted(requests=1, tokens=15, concurrency=0)
    (record,) = await UsageReader(redis, TenantRegistry(redis)).read("acme")
    assert (record.requests, record.prompt_tokens, record.completion_tokens) == (1, 10, 5)
    assert observer.counts == {"reserved": 2, "settled": 1, "refunded": 1}


async def test_reserving_the_same_request_twice_counts_once(redis: RedisClient, observer: RecordingObserver) -> None:
    ledger = _ledger(redis, observer)
    await ledger.reserve("acme", "request", 50)
    await ledger.reserve("acme", "request", 50)
    assert await counted(ledger, "acme") == Counted(requests=1, tokens=50, concurrency=1)


async def test_reservation_that_comes_after_its_refund_counts_nothing(
    redis: RedisClient, observer: RecordingObserver
) -> None:
    ledger = _ledger(redis, observer)
    await ledger.refund(Reservation("given up", "acme", 50))
    with pytest.raises(AssertionError, match="serves one reservation"):
        await ledger.reserve("acme", "given up", 50)
    assert await counted(ledger, "acme") == NOTHING


async def test_unset_limits_are_the_routers_and_zero_is_unlimited(
    redis: RedisClient, observer: RecordingObserver
) -> None:
    default = TenantLimits(requests_per_minute=1, tokens_per_minute=10)
    ledger = _ledger(redis, observer, QuotaConfig(default_limits=default))
    tenants = TenantRegistry(redis)
    await tenants.create("acme", TenantLimits(tokens_per_minute=0))
    reservation = await ledger.reserve("acme", "first", 1_000_000)
    assert not await _is_admitted(ledger, "second", 1)
    assert {name for name in reservation.headers if name.endswith("tokens")} == set()
    assert reservation.headers["x-ratelimit-limit-requests"] == "1"


async def test_changed_limits_are_in_force_with_the_next_reservation(
    redis: RedisClient, observer: RecordingObserver
) -> None:
    ledger = _ledger(redis, observer)
    await _tenant(redis, TenantLimits(requests_per_minute=1))
    assert await _is_admitted(ledger, "first", 1)
    assert not await _is_admitted(ledger, "second", 1)
    await TenantRegistry(redis).change("acme", LimitChange(TenantLimits(requests_per_minute=2)))
    assert await _is_admitted(ledger, "second", 1)
    await TenantRegistry(redis).change("acme", LimitChange(TenantLimits(requests_per_minute=1)))
    assert not await _is_admitted(ledger, "third", 1)


async def test_headers_tell_limit_remaining_and_reset_on_success_and_refusal(
    redis: RedisClient, observer: RecordingObserver
) -> None:
    ledger = _ledger(redis, observer)
    await _tenant(redis, TenantLimits(requests_per_minute=2, tokens_per_minute=100))
    admitted = await ledger.reserve("acme", "first", 60)
    assert admitted.headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "40",
        "x-ratelimit-reset-tokens": "1m0s",
    }
    refused = await _refusal(ledger, "second", 60)
    assert refused.headers["x-ratelimit-remaining-requests"] == "1"
    assert refused.headers["x-ratelimit-remaining-tokens"] == "40"
    assert re.fullmatch(r"1m0s|[1-9][\d.]*s", refused.headers["x-ratelimit-reset-tokens"])


async def test_tenants_do_not_share_a_window(redis: RedisClient, observer: RecordingObserver) -> None:
    ledger = _ledger(redis, observer, QuotaConfig(default_limits=TenantLimits(requests_per_minute=1)))
    await ledger.reserve("acme", "first", 1)
    await ledger.reserve("other", "first", 1)
    assert not await _is_admitted(ledger, "second", 1)


async def test_leases_of_a_crashed_router_end_by_themselves(redis: RedisClient, observer: RecordingObserver) -> None:
    config = QuotaConfig(lease_s=0.2)
    await _tenant(redis, TenantLimits(concurrency=1))
    began = time.monotonic()
    await _ledger(redis, observer, config).reserve("acme", "of a router that crashes", 1)
    _, admitted = await _ask_until_admitted(_ledger(redis, observer, config))
    assert admitted - began >= config.lease_s
    assert observer.counts["leases_expired"] == 1


async def test_leases_of_a_living_router_are_renewed_until_the_request_ends(
    redis: RedisClient, observer: RecordingObserver
) -> None:
    config = QuotaConfig(lease_s=2.0)
    async with open_ledger(redis, config, observer) as ledger:
        reservation = await ledger.reserve("acme", "long", 1)
        await asyncio.sleep(config.lease_s)
        assert (await counted(ledger, "acme")).concurrency == 1
        await ledger.settle(reservation, Usage(1, 0), "model")
        assert (await counted(ledger, "acme")).concurrency == 0
        await ledger.renew_leases()
        assert (await counted(ledger, "acme")).concurrency == 0


async def test_renewal_that_comes_after_the_end_does_not_bring_the_lease_back(
    redis: RedisClient, observer: RecordingObserver
) -> None:
    slow, quick = _ledger(redis, observer), _ledger(redis, observer)
    reservation = await slow.reserve("acme", "request", 1)
    await quick.settle(reservation, Usage(1, 0), "model")
    assert slow.num_open == 1
    await slow.renew_leases()
    assert await counted(slow, "acme") == Counted(requests=1, tokens=1, concurrency=0)


async def test_renewal_gives_back_a_lease_that_was_swept_meanwhile(
    redis: RedisClient, observer: RecordingObserver
) -> None:
    ledger = _ledger(redis, observer)
    await ledger.reserve("acme", "request", 1)
    leases = TenantKeys("acme").account()[6]
    await redis.call(lambda each: each.zadd(leases, {"request": 1}, xx=True))  # it ended long ago
    assert (await counted(ledger, "acme")).concurrency == 0
    await ledger.renew_leases()
    assert (await counted(ledger, "acme")).concurrency == 1


async def test_idle_tenant_leaves_nothing_of_the_window_in_redis(
    redis: RedisClient, observer: RecordingObserver
) -> None:
    ledger = _ledger(redis, observer, QuotaConfig(window_s=0.2, lease_s=0.02))
    await ledger.reserve("acme", "first", 10)
    await ledger.reserve("acme", "second", 10)
    await asyncio.sleep(0.25)
    assert await redis.call(lambda each: each.exists(*TenantKeys("acme").ledger_of())) == 0


async def test_redis_that_hangs_at_the_end_of_a_request_gets_the_usage_once_when_it_is_back(
    observer: RecordingObserver,
) -> None:
    async with (
        embedded_redis(EmbeddedRedisConfig()) as server,
        connect_redis(_brief(server.url)) as redis,
        connect_redis(patient(server.url)) as patient_redis,
    ):
        await _tenant(patient_redis, TenantLimits())
        async with open_ledger(redis, QuotaConfig(), observer) as ledger:
            reservation = await ledger.reserve("acme", "request", 50)
            os.kill(server.pid, signal.SIGSTOP)
            async with asyncio.timeout(20):
                await ledger.settle(reservation, Usage(10, 5), "model")
            assert observer.counts["ending_deferred"] == 1
            os.kill(server.pid, signal.SIGCONT)
            await ledger.endings.wait_until_empty()
        assert await counted(_ledger(patient_redis, observer), "acme") == Counted(1, 15, concurrency=0)
        (record,) = await UsageReader(patient_redis, TenantRegistry(patient_redis)).read("acme")
        assert (record.requests, record.prompt_tokens, record.completion_tokens) == (1, 10, 5)
        assert observer.counts["ending_lost"] == 0


async def test_reservation_that_redis_takes_after_its_caller_gave_up_is_given_back(
    observer: RecordingObserver,
) -> None:
    async with (
        embedded_redis(EmbeddedRedisConfig()) as server,
        connect_redis(_brief(server.url)) as redis,
        connect_redis(patient(server.url)) as patient_redis,
        open_ledger(redis, QuotaConfig(), observer) as ledger,
    ):
        await ledger.refund(await ledger.reserve("acme", "so that the server knows the scripts", 1))
        os.kill(server.pid, signal.SIGSTOP)
        refusal = await _refusal(ledger, "timed out", 50)
        assert refusal.kind is ErrorKind.UNAVAILABLE
        cancelled = asyncio.create_task(ledger.reserve("acme", "cancelled", 50))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        os.kill(server.pid, signal.SIGCONT)
        await ledger.endings.wait_until_empty()
        assert await counted(_ledger(patient_redis, observer), "acme") == NOTHING
        assert observer.counts["refused unavailable"] == 1
        assert ledger.num_open == 0


async def test_settling_that_is_cancelled_is_brought_later(observer: RecordingObserver) -> None:
    async with (
        embedded_redis(EmbeddedRedisConfig()) as server,
        connect_redis(patient(server.url)) as redis,
        open_ledger(redis, QuotaConfig(), observer) as ledger,
    ):
        reservation = await ledger.reserve("acme", "request", 50)
        os.kill(server.pid, signal.SIGSTOP)
        settling = asyncio.create_task(ledger.settle(reservation, Usage(10, 5), "model"))
        await asyncio.sleep(0.05)
        settling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await settling
        os.kill(server.pid, signal.SIGCONT)
        await ledger.endings.wait_until_empty()
        assert await counted(ledger, "acme") == Counted(requests=1, tokens=15, concurrency=0)


async def test_open_breaker_refuses_without_leaving_refunds_to_bring(
    observer: RecordingObserver, tmp_path: Path
) -> None:
    async with connect_redis(RedisConfig(f"unix://{tmp_path}/none.sock", failures_to_open=2, open_s=60.0)) as redis:
        ledger = _ledger(redis, observer)
        for i in range(10):
            refusal = await _refusal(ledger, f"request {i}", 1)
            assert refusal.kind is ErrorKind.UNAVAILABLE
        assert len(ledger.endings) == 2


async def test_what_is_granted_beyond_a_limit_is_seen_by_counting_anew(
    observer: RecordingObserver, caplog: pytest.LogCaptureFixture
) -> None:
    async with own_redis() as redis:
        ledger = _ledger(
            redis, observer, QuotaConfig(default_limits=TenantLimits(tokens_per_minute=100), recount_s=0.0)
        )
        first = await ledger.reserve("acme", "first", 60)
        assert observer.counts["overgranted"] == 0
        spent = TenantKeys("acme").account()[5]
        await redis.call(lambda each: each.set(spent, 0))  # as a script that miscounts would leave it
        await ledger.reserve("acme", "second", 60)
        assert observer.counts["overgranted"] == 20
        assert "beyond a limit" in caplog.text
        await ledger.settle(first, Usage(10, 0), "")
        await ledger.reserve("acme", "third", 30)
        assert observer.counts["overgranted"] == 20


async def test_what_is_refused_leaves_the_count_to_the_next_grant(observer: RecordingObserver) -> None:
    async with own_redis() as redis:
        config = QuotaConfig(default_limits=TenantLimits(tokens_per_minute=100), recount_s=3600.0)
        await _ledger(redis, observer, config).reserve("acme", "first", 60)
        await redis.call(lambda each: each.set(TenantKeys("acme").account()[5], 0))
        ledger = _ledger(redis, observer, config)
        assert (await _refusal(ledger, "larger than the limit", 101)).kind is ErrorKind.INVALID_REQUEST
        await ledger.reserve("acme", "second", 60)
        assert observer.counts["overgranted"] == 20


async def test_full_redis_refuses_to_reserve_and_still_settles(observer: RecordingObserver) -> None:
    async with (
        embedded_redis(EmbeddedRedisConfig(max_memory_bytes=8 * 2**20)) as server,
        connect_redis(patient(server.url)) as redis,
    ):
        ledger = _ledger(redis, observer)
        reservation = await ledger.reserve("acme", "request", 50)
        await _fill(redis, 100_000)
        # Buffers that are freed later would make room again for a little.
        await redis.call(lambda each: each.config_set("maxmemory", 1))
        refusal = await _refusal(ledger, "next", 1)
        assert refusal.kind is ErrorKind.UNAVAILABLE
        await redis.call(lambda each: each.ping())
        await ledger.settle(reservation, Usage(10, 5), "model")
        assert observer.counts["ending_deferred"] == 0
        assert (await counted(ledger, "acme")).concurrency == 0


async def test_endings_beyond_capacity_or_age_are_lost_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now, num_lost = [0.0], [0]

    def count_loss() -> None:
        num_lost[0] += 1

    async with connect_redis(RedisConfig(f"unix://{tmp_path}/none.sock")) as redis:
        queue = EndingQueue(redis, capacity=2, max_age_s=10.0, clock=lambda: now[0], on_lost=count_loss)
        for i in range(3):
            queue.put(Ending(REFUND, TenantKeys("acme").ledger_of(), (f"id {i}", 1, 1), {"reservation_id": f"id {i}"}))
        assert (len(queue), num_lost) == (2, [1])
        now[0] = 11.0
        running = asyncio.create_task(queue.run())
        await queue.wait_until_empty()
        assert num_lost == [3]
        running.cancel()
        queue.put(Ending(REFUND, TenantKeys("acme").ledger_of(), ("id 4", 1, 1), {"reservation_id": "id 4"}))
        await queue.drain(timeout_s=0.01)
        assert (len(queue), num_lost) == (0, [4])
    lost = [record.fields["reservation_id"] for record in caplog.records if hasattr(record, "fields")]
    assert lost == ["id 0", "id 1", "id 2", "id 4"]
