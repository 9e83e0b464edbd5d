"""The one connection of all scripts, attacked: TLS, passwords, bursts, stalls, ends at the wrong moment."""

import asyncio
import hashlib
import os
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvloop
from redis.asyncio import Redis
from tests.tls import relay, self_signed

from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.lua import Script
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient, RedisConfig, connect_redis
from rempart_platform.tenancy.testing import own_redis, patient

LOOPS: tuple[Callable[[], asyncio.AbstractEventLoop], ...] = (asyncio.new_event_loop, uvloop.new_event_loop)


def script(text: str) -> Script:
    return Script("of a test", text, hashlib.sha1(text.encode()).hexdigest())


ECHO = script("return {ARGV[1]}")
WRITE = script("redis.call('SET', KEYS[1], ARGV[1]) return {ARGV[1]}")
LASTING = script("local ends = os.clock() + ARGV[1] while os.clock() < ends do end return {ARGV[2]}")
"""Seconds of the server's CPU: its clock of the wall stands still in a script."""
MAX_WAIT_S = 60.0


def run_on(loop: Callable[[], asyncio.AbstractEventLoop], test: Coroutine[None, None, None]) -> None:
    """The platform runs on uvloop; its transports are not asyncio's."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(test, MAX_WAIT_S))


@dataclass(slots=True)
class TlsRelay:
    """TLS in front of a real server that has none."""

    port: int
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def close_all(self) -> None:
        for writer in self.writers:
            writer.close()


@asynccontextmanager
async def tls_relay(path: Path, certificate: Path) -> AsyncIterator[TlsRelay]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        far_reader, far_writer = await asyncio.open_unix_connection(str(path))
        running.writers.add(writer)
        try:
            await asyncio.gather(relay(reader, far_writer), relay(far_reader, writer))
        finally:
            running.writers.discard(writer)
            far_writer.close()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    running = TlsRelay(server.sockets[0].getsockname()[1])
    try:
        yield running
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def write_certificate(path: Path) -> Path:
    """With its key."""
    path.write_bytes(b"".join(self_signed()))
    return path


@pytest.mark.parametrize("loop", LOOPS)
def test_scripts_run_over_tls_as_a_user_in_a_database_and_go_on_after_their_connection_ended(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    certificate = write_certificate(tmp_path / "redis.pem")
    other = write_certificate(tmp_path / "other.pem")

    async def test() -> None:
        path = tmp_path / "redis.sock"
        async with (
            embedded_redis(EmbeddedRedisConfig(socket=path)) as server,
            connect_redis(patient(server.url)) as admin,
            tls_relay(path, certificate) as relay,
        ):
            await admin.call(
                lambda redis: redis.acl_setuser("router", True, passwords=["+a p@ss"], categories=["+@all"], keys=["*"])
            )
            await admin.call(lambda redis: redis.config_set("requirepass", "another"))
            address = f"127.0.0.1:{relay.port}/3"
            url = f"rediss://router:a%20p%40ss@{address}?ssl_ca_certs={certificate}"
            async with connect_redis(patient(url)) as redis:
                replies = await asyncio.gather(
                    *(redis.run_script(ECHO, (), ("x" * 1000 + str(i),)) for i in range(500))
                )
                assert replies == [["x" * 1000 + str(i)] for i in range(500)]
                (client,) = [each for each in await admin.call(Redis.client_list) if each["user"] == "router"]
                assert client["db"] == "3"
                relay.close_all()
                while not await answers(redis):
                    pass
                assert redis.is_available
            for wrong in (
                f"rediss://router:wrong@{address}?ssl_ca_certs={certificate}",
                f"rediss://router:a%20p%40ss@{address}?ssl_ca_certs={other}",
                f"rediss://{address}?ssl_ca_certs={certificate}",
            ):
                async with connect_redis(patient(wrong)) as redis:
                    assert not await answers(redis)

    run_on(loop, test())


async def answers(redis: RedisClient) -> bool:
    try:
        return await redis.run_script(ECHO, (), ("a",)) == ["a"]
    except RedisAwayError:
        return False


async def test_user_who_may_not_run_scripts_is_a_mistake_and_no_outage() -> None:
    async with embedded_redis(EmbeddedRedisConfig()) as server, connect_redis(patient(server.url)) as admin:
        await admin.call(lambda redis: redis.acl_setuser("reader", True, passwords=["+word"], categories=["+@read"]))
        url = server.url.replace("unix://", "unix://reader:word@")
        async with connect_redis(patient(url)) as redis:
            for _ in range(5):
                with pytest.raises(Exception, match="permissions"):
                    await redis.run_script(ECHO, (), ("a",))
            assert redis.is_available


async def test_burst_that_takes_longer_than_the_time_out_is_no_outage() -> None:
    """Each is so long that Redis reads it, and answers, by itself."""
    async with (
        embedded_redis(EmbeddedRedisConfig()) as server,
        connect_redis(RedisConfig(server.url, timeout_s=1.0)) as redis,
    ):
        asked = (redis.run_script(LASTING, (), ("0.06", f"{i} {'x' * 40_000}")) for i in range(25))
        replies = await asyncio.gather(*asked)
        assert [str(reply[0]).partition(" ")[0] for reply in replies] == [str(i) for i in range(25)]


@pytest.mark.parametrize("is_sent", [True, False])
@pytest.mark.parametrize("loop", LOOPS)
def test_time_for_which_the_router_itself_was_busy_is_no_outage(
    loop: Callable[[], asyncio.AbstractEventLoop], is_sent: bool
) -> None:
    """Neither between a script and its way to the socket, nor between its answer and that this is read."""

    async def test() -> None:
        async with (
            embedded_redis(EmbeddedRedisConfig()) as server,
            connect_redis(RedisConfig(server.url, timeout_s=1.0)) as redis,
        ):
            await redis.run_script(ECHO, (), ("connects",))
            os.kill(server.pid, signal.SIGSTOP)
            asking = asyncio.create_task(redis.run_script(ECHO, (), ("one",)))
            await asyncio.sleep(0)

            def compute() -> None:
                os.kill(server.pid, signal.SIGCONT)
                time.sleep(1.2)

            if is_sent:
                await asyncio.sleep(0)
                await call_once_readable(compute)
            else:
                compute()
            assert await asking == ["one"]

    run_on(loop, test())


async def call_once_readable(call: Callable[[], None]) -> None:
    """Calls it where the event loop reads from sockets: what comes meanwhile is read in its next pass."""
    loop = asyncio.get_running_loop()
    called = asyncio.Event()
    ours, theirs = socket.socketpair()

    def read() -> None:
        loop.remove_reader(ours)
        call()
        called.set()

    with ours, theirs:
        loop.add_reader(ours, read)
        theirs.send(b"x")
        await called.wait()


async def test_text_of_a_script_is_sent_once_to_a_server_that_forgot_it() -> None:
    async with own_redis() as redis:
        await redis.run_script(ECHO, (), ("connects",))
        await redis.call(lambda each: each.script_flush())
        await redis.call(lambda each: each.config_resetstat())
        replies = await asyncio.gather(*(redis.run_script(ECHO, (), (str(i),)) for i in range(500)))
        assert replies == [[str(i)] for i in range(500)]
        stats = await redis.call(lambda each: each.info("commandstats"))
        assert stats["cmdstat_eval"]["calls"] == 1


async def test_text_is_sent_again_when_whoever_sent_it_has_gone() -> None:
    async with own_redis() as redis:
        await redis.run_script(ECHO, (), ("connects",))
        await redis.call(lambda each: each.script_flush())
        asking = [asyncio.create_task(redis.run_script(ECHO, (), (str(i),))) for i in range(3)]
        await asyncio.wait([asking[0]], timeout=0)
        asking[0].cancel()
        assert await asyncio.gather(*asking[1:]) == [["1"], ["2"]]


@pytest.mark.parametrize("loop", LOOPS)
def test_whoever_asks_while_the_client_is_closed_finds_redis_away(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def test() -> None:
        async with embedded_redis(EmbeddedRedisConfig()) as server:
            for num_passes in range(6):  # the connection is asked for, opened, used
                async with connect_redis(patient(server.url)) as redis:
                    asking = asyncio.create_task(redis.run_script(LASTING, (), ("0.001", "a")))
                    for _ in range(num_passes):
                        await asyncio.sleep(0)
                (reply,) = await asyncio.gather(asking, return_exceptions=True)
                assert isinstance(reply, RedisAwayError)
                with pytest.raises(RedisAwayError):
                    await redis.run_script(ECHO, (), ("too late",))

    run_on(loop, test())


async def test_one_who_leaves_while_the_connection_is_opened_stops_nobody() -> None:
    async with embedded_redis(EmbeddedRedisConfig()) as server, connect_redis(patient(server.url)) as redis:
        asking = [asyncio.create_task(redis.run_script(ECHO, (), (str(i),))) for i in range(3)]
        await asyncio.sleep(0)
        asking[0].cancel()
        assert await asyncio.gather(*asking[1:]) == [["1"], ["2"]]
        assert len(await redis.call(lambda each: each.client_list())) == 2


async def test_connection_that_ends_under_many_scripts_opens_no_breaker() -> None:
    async with (
        embedded_redis(EmbeddedRedisConfig()) as server,
        connect_redis(patient(server.url)) as redis,
        connect_redis(patient(server.url)) as admin,
    ):
        await redis.run_script(ECHO, (), ("connects",))
        await admin.run_script(ECHO, (), ("connects",))
        os.kill(server.pid, signal.SIGSTOP)
        asking = [asyncio.create_task(redis.run_script(WRITE, ("key",), (str(i),))) for i in range(50)]
        killing = asyncio.create_task(admin.call(lambda each: each.client_kill_filter(_type="normal", skipme=True)))
        await asyncio.sleep(0)
        os.kill(server.pid, signal.SIGCONT)
        await killing
        await asyncio.gather(*asking, return_exceptions=True)
        assert redis.is_available
        assert await redis.run_script(ECHO, (), ("next",)) == ["next"]


@pytest.mark.parametrize("serves_stale_data", ["yes", "no"])  # READONLY, MASTERDOWN
async def test_master_that_became_a_replica_is_left(serves_stale_data: str) -> None:
    """Behind Sentinels the next connection asks who the master is."""
    async with (
        embedded_redis(EmbeddedRedisConfig()) as server,
        connect_redis(patient(server.url)) as redis,
        connect_redis(patient(server.url)) as admin,
    ):
        await redis.run_script(ECHO, (), ("connects",))
        before = await connections(admin)
        assert len(before) == 2
        await admin.call(lambda each: each.config_set("replica-serve-stale-data", serves_stale_data))
        await admin.call(lambda each: each.replicaof("127.0.0.1", "1"))
        with pytest.raises(RedisAwayError):
            await redis.run_script(WRITE, ("key",), ("a",))
        await admin.call(lambda each: each.replicaof("NO", "ONE"))
        assert await answers(redis)
        assert len(before & await connections(admin)) == 1  # that of the one who looks


async def connections(redis: RedisClient) -> set[str]:
    return {each["id"] for each in await redis.call(lambda each: each.client_list(_type="normal"))}


async def test_redis_that_demotes_a_master_under_a_waiting_command_is_away() -> None:
    async with own_redis() as redis:
        waiting = asyncio.create_task(redis.call(lambda each: each.blpop(["list"], timeout=60)))
        while not (await redis.call(lambda each: each.info("clients")))["blocked_clients"]:
            pass
        await redis.call(lambda each: each.replicaof("127.0.0.1", "1"))
        with pytest.raises(RedisAwayError):
            await waiting


async def test_redis_that_is_busy_with_a_script_is_away() -> None:
    async with own_redis() as redis:
        await redis.call(lambda each: each.config_set("busy-reply-threshold", 1))
        endless = asyncio.create_task(redis.call(lambda each: each.eval("while true do end", 0)))
        while await answers(redis):
            pass
        await redis.call(lambda each: each.script_kill())
        with pytest.raises(Exception, match="killed"):
            await endless
        assert await answers(redis)


async def test_cancellation_that_is_swallowed_on_the_way_ends_the_call() -> None:
    """As `asyncio.wait_for` of Python 3.11 does when what it waits for ends at the same time."""
    sent = asyncio.Event()

    async def swallow(_: Redis) -> str:
        with suppress(asyncio.CancelledError):
            sent.set()
            await asyncio.Event().wait()
        return "an answer"

    async with own_redis() as redis:
        calling = asyncio.create_task(redis.call(swallow))
        await sent.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
