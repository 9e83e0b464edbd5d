"""Redis behind Sentinels and as a cluster: real servers, killed under traffic."""

import asyncio
import hashlib
import time

import pytest
from redis.asyncio.connection import Connection
from redis.crc import key_slot

from rempart_platform.endpoints.capacity import Capacity
from rempart_platform.generation import Usage
from rempart_platform.tenancy.api_keys import ApiKeyStore, KeyHasher
from rempart_platform.tenancy.fair_queue import open_fair_queue
from rempart_platform.tenancy.keyspace import TenantKeys
from rempart_platform.tenancy.limits import TenantLimits
from rempart_platform.tenancy.lua import Script
from rempart_platform.tenancy.plans import PlanRegistry
from rempart_platform.tenancy.queue_keys import ModelKeys
from rempart_platform.tenancy.queue_testing import RecordingQueueObserver
from rempart_platform.tenancy.queue_values import QueueConfig, QueueRequest
from rempart_platform.tenancy.quota import QuotaConfig, open_ledger
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient, RedisConfig, connect_redis
from rempart_platform.tenancy.redis_testing import cluster_servers, watched_servers
from rempart_platform.tenancy.redis_url import RedisServers, parse_redis_url
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.testing import RecordingObserver, patient
from rempart_platform.tenancy.usage import UsageReader

_TEXT = "return {redis.call('INCR', KEYS[1])}"
COUNT = Script("count", _TEXT, hashlib.sha1(_TEXT.encode()).hexdigest())


async def whole_life(redis: RedisClient) -> None:
    """A plan, tenants, keys, requests with quotas through the fair queue, usage: every module that speaks to Redis."""
    tenants = TenantRegistry(redis)
    await PlanRegistry(redis).set("gold")
    keys = ApiKeyStore(redis, KeyHasher(b"a pepper of 16 bytes"))
    names = [f"tenant-{number}" for number in range(8)]
    for name in names:
        await tenants.create(name, TenantLimits())
        issued = await keys.issue(name)
        assert [key.key_id for key in await keys.list(name)] == [issued.key_id]
    async with (
        open_ledger(redis, QuotaConfig(), RecordingObserver()) as ledger,
        open_fair_queue(redis, QueueConfig(), RecordingQueueObserver(), lambda _: Capacity(2, 10**6)) as queue,
    ):
        for name in names:
            for model in ("small", "large"):
                reservation = await ledger.reserve(name, f"{name}-{model}", 100, model=model, key_id="k")
                asked = QueueRequest(
                    f"{name}-{model}", name, model, num_prompt_tokens=10, num_output_tokens=90, timeout_s=120
                )
                place = await queue.acquire(asked)
                queue.release(place, Usage(10, 5))
                await ledger.settle(reservation, Usage(10, 5), model)
        await queue.drain()
    usage = await UsageReader(redis, tenants).read()
    assert {record.tenant for record in usage} == set(names)
    assert {len({key_slot(key.encode()) for key in TenantKeys(name).ledger_of("m", "k")}) for name in names} == {1}
    assert len({key_slot(key.encode()) for key in ModelKeys("small").queue}) == 1


async def test_all_of_redis_works_on_a_cluster() -> None:
    async with cluster_servers() as servers, connect_redis(patient(servers.url)) as redis:
        await whole_life(redis)
        for master in servers.masters:
            async with master.client() as client:
                assert await client.dbsize() > 0
        # Keys of several slots are a mistake of ours and no outage.
        with pytest.raises(Exception, match="same"):
            await redis.run_script(COUNT, ("{a}", "{b}"), ())
        assert redis.is_available


async def test_a_connection_that_is_closed_under_its_writer_is_an_outage() -> None:
    async with connect_redis(RedisConfig("redis://127.0.0.1:1")) as redis:
        with pytest.raises(RedisAwayError):  # the library's own AttributeError
            await redis.call(lambda _: Connection()._send_packed_command([b"PING"]))
        with pytest.raises(AttributeError):  # ours
            await redis.call(lambda connected: connected.no_such_command())  # type: ignore[attr-defined]


class Traffic:
    """Counts up, many at a time, and remembers how each attempt went."""

    def __init__(self, redis: RedisClient, keys: tuple[str, ...]) -> None:
        self._redis = redis
        self._keys = keys
        self.num_done = 0
        self.num_refused = 0
        self.longest_s = 0.0
        self._changed = asyncio.Event()
        self._is_over = False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(self._count(self._keys[number % len(self._keys)]))

    def end(self) -> None:
        """After the counts under way. A cancellation might be lost: asyncio.wait_for of Python 3.11 does that."""
        self._is_over = True

    async def wait_for_success(self, count: int, timeout_s: float) -> None:
        wanted = self.num_done + count
        async with asyncio.timeout(timeout_s):
            while self.num_done < wanted:
                self._changed.clear()
                await self._changed.wait()

    async def _count(self, key: str) -> None:
        while not self._is_over:
            began_s = time.monotonic()
            try:
                await self._redis.run_script(COUNT, (key,), ())
                self.num_done += 1
                self._changed.set()
            except RedisAwayError:
                self.num_refused += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            await asyncio.sleep(0.005)


@pytest.mark.slow
async def test_a_master_that_dies_under_traffic_is_replaced_by_its_replica() -> None:
    async with watched_servers() as servers, connect_redis(RedisConfig(servers.url)) as redis:
        traffic = Traffic(redis, ("counter",))
        running = asyncio.create_task(traffic.run())
        await traffic.wait_for_success(50, 60)
        await servers.master.kill()
        await traffic.wait_for_success(200, 60)
        await servers.sentinels[0].kill()  # any of the others knows
        await traffic.wait_for_success(50, 60)
        traffic.end()
        await running
        assert traffic.num_refused > 0
        assert traffic.longest_s < 5.0  # time-outs are 0.25 s each; nobody waits for the failover
        async with servers.replica.client() as replica:
            assert int(str(await replica.get("counter"))) >= 250
        assert redis.is_available
        async with connect_redis(patient(servers.url)) as later:  # it has to ask for the master of now
            await whole_life(later)


@pytest.mark.slow
async def test_a_master_that_is_demoted_under_traffic_takes_no_queue_with_it() -> None:
    """It goes on answering; whoever waits in it for a grant is told that it is no master any more."""
    async with (
        watched_servers() as servers,
        connect_redis(patient(servers.url)) as redis,
        open_fair_queue(redis, QueueConfig(), RecordingQueueObserver(), lambda _: Capacity(1, 10**6)) as queue,
    ):
        asked = [
            QueueRequest(name, name, "m", num_prompt_tokens=10, num_output_tokens=90, timeout_s=120)
            for name in ("runs", "waits")
        ]
        place = await queue.acquire(asked[0])
        waiting = asyncio.create_task(queue.acquire(asked[1]))
        async with servers.master.client() as master, servers.sentinels[0].client() as sentinel:
            while not (await master.info("clients"))["blocked_clients"]:
                pass
            await sentinel.execute_command("SENTINEL", "FAILOVER", "main")  # type: ignore[no-untyped-call]
            while (await master.info("replication"))["role"] != "slave":
                pass
        queue.release(place, Usage(10, 5))
        queue.release(await waiting, Usage(10, 5))
        traffic = Traffic(redis, ("counter",))
        running = asyncio.create_task(traffic.run())
        await traffic.wait_for_success(50, 60)
        traffic.end()
        await running


@pytest.mark.slow
async def test_a_cluster_goes_on_when_one_of_its_masters_dies() -> None:
    async with cluster_servers() as servers, connect_redis(RedisConfig(servers.url)) as redis:
        keys = tuple(f"counter-{{{number}}}" for number in range(8))
        traffic = Traffic(redis, keys)
        running = asyncio.create_task(traffic.run())
        await traffic.wait_for_success(50, 60)
        await servers.masters[1].kill()
        async with asyncio.timeout(120):
            while not await _all_work(redis, keys):
                await traffic.wait_for_success(20, 60)
        traffic.end()
        await running
        assert traffic.num_refused > 0
        assert traffic.longest_s < 5.0


async def _all_work(redis: RedisClient, keys: tuple[str, ...]) -> bool:
    try:
        for key in keys:
            await redis.run_script(COUNT, (key,), ())
    except RedisAwayError:
        return False
    return True


def test_a_url_of_sentinels_names_hosts_master_and_database() -> None:
    url = "rediss+sentinel://user:p%40ss@one:1,[fd00::1]:2,three/main/5?ssl_ca_certs=/ca.pem&sentinel_password=word"
    servers = parse_redis_url(url)
    assert servers == RedisServers(
        kind="sentinel",
        hosts=(("one", 1), ("fd00::1", 2), ("three", 26379)),
        is_tls=True,
        master_name="main",
        db=5,
        credentials={"username": "user", "password": "p@ss"},
        options={"ssl_ca_certs": "/ca.pem", "sentinel_password": "word"},
    )
    assert servers.tls == {"ssl": True, "ssl_ca_certs": "/ca.pem"}
    assert servers.sentinel_credentials == {"password": "word"}
    assert not any(secret in repr(servers) for secret in ("p@ss", "word"))


def test_a_url_of_a_cluster_names_hosts() -> None:
    servers = parse_redis_url("redis+cluster://:word@one,two:7000")
    assert servers is not None
    assert (servers.kind, servers.hosts, servers.is_tls) == ("cluster", (("one", 6379), ("two", 7000)), False)
    assert servers.credentials == {"password": "word"}
    assert servers.tls == {}


@pytest.mark.parametrize("url", ["redis://host/0", "rediss://u:p@host:1/0?ssl_ca_certs=x", "unix:///tmp/redis.sock"])
def test_a_url_of_one_server_is_left_to_the_library(url: str) -> None:
    assert parse_redis_url(url) is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "redis:",
        "http://host",
        "redis+sentinel://host:1",
        "redis+sentinel://host:1/main/x",
        "redis+sentinel://:secret@host:x/main",
        "redis+sentinel://:secret@/main",
        "redis+cluster://:secret@host:1/0",
        "redis+cluster://:secret@host:1?color=red",
        "redis+cluster://:secret@host:99999",
        "redis+cluster://user:secret",
        "redis+cluster://user:secret\u2100@host:1",
        "redis+cluster://:a?secret=1@host:1",
        "redis+cluster://host:1?sentinel_password=secret",
        "redis+cluster://host:1?ssl_ca_certs=/secret",
        "redis+sentinel://host:1/main?ssl_ca_certs=/secret",
    ],
)
def test_a_malformed_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        parse_redis_url(url)
    assert "secret" not in str(raised.value)
