"""Real Redis servers on ports of this machine for tests: alone, watched by Sentinels, or as a cluster."""

import asyncio
import random
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rempart_platform.local.child_process import dying_with_parent
from rempart_platform.tenancy.embedded import find_server

MASTER_NAME = "main"


@dataclass(frozen=True, slots=True)
class RedisProcess:
    """A running server."""

    port: int
    process: asyncio.subprocess.Process

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Redis]:
        client = Redis(port=self.port, protocol=2, driver_info=None, decode_responses=True)
        try:
            yield client
        finally:
            await client.aclose()

    async def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        await self.process.wait()


@dataclass(frozen=True, slots=True)
class WatchedServers:
    """A master, its replica, and three Sentinels."""

    url: str
    master: RedisProcess
    replica: RedisProcess
    sentinels: tuple[RedisProcess, ...]


@dataclass(frozen=True, slots=True)
class ClusterServers:
    """Three masters, each with a replica."""

    url: str
    masters: tuple[RedisProcess, ...]
    replicas: tuple[RedisProcess, ...]


@asynccontextmanager
async def watched_servers() -> AsyncIterator[WatchedServers]:
    """Sentinels that notice a dead master after two seconds, and take none for dead that a busy machine holds up."""
    async with AsyncExitStack() as stack:
        master = await stack.enter_async_context(_server())
        replica = await stack.enter_async_context(_server("--replicaof", "127.0.0.1", str(master.port)))
        await _until(replica, "INFO replication", "master_link_status:up")
        sentinels = tuple([await stack.enter_async_context(_sentinel(master.port)) for _ in range(3)])
        for sentinel in sentinels:
            await _until(sentinel, f"SENTINEL MASTER {MASTER_NAME}", "num-other-sentinels', '2", "num-slaves', '1")
        hosts = ",".join(sentinel.address for sentinel in sentinels)
        yield WatchedServers(f"redis+sentinel://{hosts}/{MASTER_NAME}", master, replica, sentinels)


@asynccontextmanager
async def cluster_servers() -> AsyncIterator[ClusterServers]:
    """A cluster that notices a dead master after two seconds, and takes none for dead that a busy machine holds up."""
    async with AsyncExitStack() as stack:
        options = (
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "2000",
            "--cluster-replica-validity-factor",
            "0",
        )
        nodes = [await stack.enter_async_context(_server(*options)) for _ in range(6)]
        masters, replicas = tuple(nodes[:3]), tuple(nodes[3:])
        for number, node in enumerate(masters):
            first, last = 16384 * number // 3, 16384 * (number + 1) // 3 - 1
            await _ask(node, "CLUSTER", "ADDSLOTSRANGE", str(first), str(last))
            await _ask(node, "CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
        for node in nodes[1:]:
            await _ask(node, "CLUSTER", "MEET", "127.0.0.1", str(nodes[0].port))
        for node in nodes:
            await _until(node, "CLUSTER INFO", "cluster_known_nodes:6", "cluster_state:ok")
        for master, replica in zip(masters, replicas, strict=True):
            await _ask(replica, "CLUSTER", "REPLICATE", str(await _ask(master, "CLUSTER", "MYID")))
        for replica in replicas:
            await _until(replica, "INFO replication", "master_link_status:up")
        hosts = ",".join(node.address for node in masters)
        yield ClusterServers(f"redis+cluster://{hosts}", masters, replicas)


@asynccontextmanager
async def _server(*options: str) -> AsyncIterator[RedisProcess]:
    port = _free_port()
    common = ("--port", str(port), "--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0")
    async with _running(port, [*common, *options]) as server:
        yield server


@asynccontextmanager
async def _sentinel(master_port: int) -> AsyncIterator[RedisProcess]:
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="rempart-sentinel-") as folder:
        config = Path(folder) / "sentinel.conf"  # it writes what it learns there
        config.write_text(
            f"port {port}\n"
            f"sentinel monitor {MASTER_NAME} 127.0.0.1 {master_port} 2\n"
            f"sentinel down-after-milliseconds {MASTER_NAME} 2000\n"
            f"sentinel failover-timeout {MASTER_NAME} 3000\n"
        )
        async with _running(port, [str(config), "--sentinel"]) as sentinel:
            yield sentinel


@asynccontextmanager
async def _running(port: int, arguments: Sequence[str]) -> AsyncIterator[RedisProcess]:
    with tempfile.TemporaryDirectory(prefix="rempart-redis-", ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            *dying_with_parent([str(find_server()), *arguments]),
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        server = RedisProcess(port, process)
        try:
            await _until(server, "PING", "PONG")
            yield server
        finally:
            if process.returncode is None:
                await server.kill()


async def _until(server: RedisProcess, command: str, *wanted: str) -> None:
    """Asks until the answer holds all of these."""
    async with asyncio.timeout(60):
        while True:
            try:
                answer = str(await _ask(server, *command.split()))
            except (OSError, RedisError) as error:
                answer = str(error)
            if all(part in answer for part in wanted):
                return
            assert server.process.returncode is None, f"the server on port {server.port} ended"
            await asyncio.sleep(0.02)


async def _ask(server: RedisProcess, *command: str) -> object:
    async with server.client() as client:
        client.response_callbacks.clear()  # the answer as it comes
        answer: object = await client.execute_command(*command)  # type: ignore[no-untyped-call]
        return answer


def _free_port() -> int:
    """One that nobody listens on, and a cluster's second port, 10000 above.

    Both lie below those that systems give to whoever asks for any, and to outgoing connections: such a port would be
    free when it is looked at, and taken before it is used.
    """
    while True:
        port = random.randrange(10_000, 20_000)
        if not any(_is_taken(each) for each in (port, port + 10_000)):
            return port


def _is_taken(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return True
    return False
