import asyncio
import hashlib
import logging
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from rempart_platform.breaker import Breaker
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.lua import Script
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisConfig, connect_redis
from rempart_platform.tenancy.testing import own_redis, patient


def _echo() -> Script:
    text = "return {ARGV[1]}"
    return Script("echo", text, hashlib.sha1(text.encode()).hexdigest())


async def test_script_runs_on_a_server_that_has_never_seen_it_and_again_after_it_forgot() -> None:
    async with own_redis() as redis:
        assert await redis.run_script(_echo(), (), ("one",)) == ["one"]
        await redis.call(lambda each: each.script_flush())
        assert await redis.run_script(_echo(), (), ("two",)) == ["two"]


def _fail() -> Script:
    text = "return redis.error_reply('ODD no such thing')"
    return Script("fail", text, hashlib.sha1(text.encode()).hexdigest())


async def test_scripts_that_share_a_round_trip_have_answers_and_errors_of_their_own() -> None:
    async with own_redis() as redis:
        asked = (redis.run_script(each, (), (str(i),)) for i, each in enumerate((_echo(), _fail(), _echo(), _fail())))
        first, failed, last, failed_too = await asyncio.gather(*asked, return_exceptions=True)
        assert (first, last) == (["0"], ["2"])
        assert "no such thing" in str(failed)
        assert "no such thing" in str(failed_too)
        assert redis.is_available


async def test_one_caller_that_leaves_takes_no_answer_from_the_others() -> None:
    async with own_redis() as redis:
        asking = [asyncio.create_task(redis.run_script(_echo(), (), (str(i),))) for i in range(3)]
        await asyncio.sleep(0)
        asking[1].cancel()
        first, left, last = await asyncio.gather(*asking, return_exceptions=True)
        assert (first, last) == (["0"], ["2"])
        assert isinstance(left, asyncio.CancelledError)


async def test_scripts_behind_an_open_breaker_are_refused_each_time(tmp_path: Path) -> None:
    async with connect_redis(RedisConfig(f"unix://{tmp_path}/none.sock", failures_to_open=1)) as redis:
        for _ in range(3):
            asked = (redis.run_script(_echo(), (), ("one",)) for _ in range(2))
            refused = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(error, RedisAwayError) for error in refused)
            assert refused[0] is not refused[1]


async def test_hash_is_written_by_field_and_read_whole() -> None:
    async with own_redis() as redis:
        await redis.write_hash("key", {"a": 1, "b": "x"})
        await redis.write_hash("key", {"b": "y"})
        assert await redis.read_hash("key") == {"a": "1", "b": "y"}
        assert await redis.read_hash("no such key") == {}


async def test_more_callers_than_connections_all_get_their_answer() -> None:
    async with (
        embedded_redis(EmbeddedRedisConfig()) as server,
        connect_redis(RedisConfig(server.url, timeout_s=10.0, max_connections=2)) as redis,
    ):
        replies = await asyncio.gather(*(redis.run_script(_echo(), (), (str(i),)) for i in range(100)))
        assert replies == [[str(i)] for i in range(100)]
        assert len(await redis.call(lambda each: each.client_list())) == 2


async def test_redis_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    async with connect_redis(RedisConfig(f"unix://{tmp_path}/none.sock")) as redis:
        with pytest.raises(RempartError) as raised:
            await redis.read_hash("key")
    assert raised.value.kind is ErrorKind.UNAVAILABLE
    assert raised.value.retry_after_s == 1.0
    assert str(tmp_path) not in raised.value.message


async def test_hung_redis_is_unavailable_at_once_opens_the_breaker_and_comes_back() -> None:
    now = [0.0]
    async with (
        embedded_redis(EmbeddedRedisConfig()) as server,
        connect_redis(RedisConfig(server.url, timeout_s=1.0, open_s=1.0), clock=lambda: now[0]) as redis,
    ):
        await redis.write_hash("key", {"a": 1})
        os.kill(server.pid, signal.SIGSTOP)
        async with asyncio.timeout(20):  # the defaults of redis-py would take a minute
            errors = await asyncio.gather(*(redis.read_hash("key") for _ in range(200)), return_exceptions=True)
        assert all(isinstance(error, RedisAwayError) for error in errors)
        assert not redis.is_available

        with pytest.raises(RedisAwayError) as raised:
            await redis.read_hash("key")
        assert not raised.value.may_have_run
        assert raised.value.retry_after_s == 1.0

        os.kill(server.pid, signal.SIGCONT)
        now[0] += 1.0
        assert await redis.read_hash("key") == {"a": "1"}
        assert redis.is_available


async def test_why_redis_is_away_is_logged_once_and_its_return_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    caplog.set_level(logging.INFO, "rempart_platform.tenancy.redis_client")
    config = RedisConfig(f"unix://{tmp_path}/redis.sock", failures_to_open=2, open_s=1.0)
    async with connect_redis(config, clock=lambda: now[0]) as redis:
        for _ in range(5):
            with pytest.raises(RedisAwayError):
                await redis.read_hash("key")
            now[0] += 1.0
        (away,) = caplog.records
        assert away.getMessage().startswith("Redis does not answer")
        assert "ConnectionError" in vars(away)["reason"]

        async with embedded_redis(EmbeddedRedisConfig()) as server:
            (tmp_path / "redis.sock").symlink_to(server.url.removeprefix("unix://"))
            assert await redis.read_hash("key") == {}
            assert await redis.read_hash("key") == {}
        assert [record.getMessage() for record in caplog.records[1:]] == ["Redis answers again"]


def _write() -> Script:
    text = "redis.call('SET', KEYS[1], ARGV[1]) return {ARGV[1]}"
    return Script("write", text, hashlib.sha1(text.encode()).hexdigest())


async def test_redis_that_takes_no_writes_is_away() -> None:
    """It misses its replicas here; that it cannot save to its disk (MISCONF) it says in the same way."""
    async with own_redis() as redis:
        await redis.call(lambda each: each.config_set("min-replicas-to-write", 1))
        with pytest.raises(RedisAwayError):
            await redis.write_hash("hash", {"name": 1})
        refused = await asyncio.gather(
            *(redis.run_script(_write(), ("key",), ("one",)) for _ in range(2)), return_exceptions=True
        )
        assert all(isinstance(error, RedisAwayError) for error in refused), refused


async def test_mistake_of_ours_is_not_taken_for_an_outage() -> None:
    async with embedded_redis(EmbeddedRedisConfig()) as server, connect_redis(patient(server.url)) as redis:
        await redis.write_hash("key", {"a": 1})
        for _ in range(5):
            with pytest.raises(Exception, match="WRONGTYPE"):
                await redis.call(lambda each: each.get("key"))
        assert redis.is_available


def test_breaker_opens_after_consecutive_failures_only() -> None:
    breaker = Breaker(3, 10.0, lambda: 0.0)
    for _ in range(2):
        breaker.record_failure()
    breaker.record_success()
    for _ in range(2):
        breaker.record_failure()
    assert breaker.wait_s() == 0.0
    breaker.record_failure()
    assert breaker.wait_s() == 10.0


def test_breaker_lets_one_probe_through_and_closes_when_it_succeeds() -> None:
    now = [0.0]
    breaker = Breaker(1, 10.0, lambda: now[0])
    breaker.record_failure()
    now[0] = 9.0
    assert breaker.refuses
    assert breaker.wait_s() == 1.0
    now[0] = 10.0
    assert breaker.wait_s() == 0.0
    assert breaker.wait_s() == 10.0
    breaker.record_success()
    assert breaker.wait_s() == 0.0


def test_breaker_stays_open_when_the_probe_fails() -> None:
    now = [0.0]
    breaker = Breaker(3, 10.0, lambda: now[0])
    for _ in range(3):
        breaker.record_failure()
    now[0] = 10.0
    assert breaker.wait_s() == 0.0
    now[0] = 12.0
    breaker.record_failure()
    assert breaker.wait_s() == 10.0


async def test_scripts_of_a_hung_redis_are_away_at_once_and_run_on_a_new_connection_later() -> None:
    now = [0.0]
    async with (
        embedded_redis(EmbeddedRedisConfig()) as server,
        connect_redis(RedisConfig(server.url, open_s=1.0), clock=lambda: now[0]) as redis,
    ):
        assert await redis.run_script(_echo(), (), ("before",)) == ["before"]
        os.kill(server.pid, signal.SIGSTOP)
        lost = await asyncio.gather(
            *(redis.run_script(_echo(), (), (f"lost {i}",)) for i in range(200)), return_exceptions=True
        )
        assert all(isinstance(error, RedisAwayError) and error.may_have_run for error in lost)
        with pytest.raises(RedisAwayError) as raised:
            await redis.run_script(_echo(), (), ("refused",))
        assert not raised.value.may_have_run

        os.kill(server.pid, signal.SIGCONT)
        now[0] += 1.0
        assert await redis.run_script(_echo(), (), ("after",)) == ["after"]  # and none of the lost ones' replies
        assert redis.is_available


async def test_scripts_go_on_after_redis_closed_their_connection() -> None:
    async with own_redis() as redis:
        assert await redis.run_script(_echo(), (), ("one",)) == ["one"]
        await redis.call(lambda each: each.client_kill_filter(_type="normal", skipme=True))
        with suppress(RedisAwayError):  # the end may not have come here yet
            await redis.run_script(_echo(), (), ("lost",))
        assert await redis.run_script(_echo(), (), ("two",)) == ["two"]


async def test_script_under_way_when_its_connection_ends_may_have_run() -> None:
    async with embedded_redis(EmbeddedRedisConfig()) as server, connect_redis(patient(server.url)) as redis:
        await redis.run_script(_echo(), (), ("connects",))
        os.kill(server.pid, signal.SIGSTOP)
        asking = asyncio.create_task(redis.run_script(_echo(), (), ("one",)))
        await asyncio.sleep(0)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(RedisAwayError) as raised:
            await asking
        assert raised.value.may_have_run
