import asyncio
import os
import signal
import stat
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

from rempart_platform.tenancy import embedded
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, EmbeddedRedisError, embedded_redis


def _socket_of(url: str) -> Path:
    return Path(url.removeprefix("unix://"))


async def test_server_answers_and_leaves_nothing_behind() -> None:
    async with embedded_redis(EmbeddedRedisConfig()) as server:
        async with Redis.from_url(server.url, decode_responses=True) as redis:
            await redis.set("key", "value")
            assert await redis.get("key") == "value"
        folder = _socket_of(server.url).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        connections = psutil.Process(server.pid).net_connections()
        assert [each for each in connections if each.status == psutil.CONN_LISTEN] == []
    assert not folder.exists()
    assert not psutil.pid_exists(server.pid)


async def test_data_folder_outlives_the_server(tmp_path: Path) -> None:
    config = EmbeddedRedisConfig(data_folder=tmp_path / "data")
    async with embedded_redis(config) as server, Redis.from_url(server.url) as redis:
        await redis.set("key", "value")
    async with embedded_redis(config) as server, Redis.from_url(server.url, decode_responses=True) as redis:
        assert await redis.get("key") == "value"


@pytest.mark.parametrize("keeps_data", [True, False])
async def test_server_that_was_stopped_by_a_signal_still_ends(tmp_path: Path, keeps_data: bool) -> None:
    async with embedded_redis(EmbeddedRedisConfig(data_folder=tmp_path if keeps_data else None)) as server:
        os.kill(server.pid, signal.SIGSTOP)
    assert not psutil.pid_exists(server.pid)


async def test_server_that_was_killed_is_no_error_at_the_end() -> None:
    async with embedded_redis(EmbeddedRedisConfig()) as server:
        os.kill(server.pid, signal.SIGKILL)
    assert not _socket_of(server.url).parent.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal of a parent is a Linux feature")
async def test_server_dies_with_its_parent() -> None:
    program = textwrap.dedent("""
        import asyncio
        from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis

        async def main():
            async with embedded_redis(EmbeddedRedisConfig()) as server:
                print(server.pid, server.url, flush=True)
                await asyncio.Event().wait()

        asyncio.run(main())
    """)
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    pid, url = (await parent.stdout.readline()).decode().split()
    server = psutil.Process(int(pid))
    parent.kill()
    await parent.wait()
    psutil.wait_procs([server], timeout=30)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
    socket = _socket_of(url)
    for leftover in socket.parent.iterdir():
        leftover.unlink()
    socket.parent.rmdir()


async def test_server_that_does_not_start_is_an_error_with_its_log() -> None:
    config = EmbeddedRedisConfig(max_memory_bytes=-1)
    with pytest.raises(EmbeddedRedisError, match="ended with 1"):
        async with embedded_redis(config):
            pass


def test_missing_server_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedRedisError, match=r"rempart\[local\]"):
        embedded.find_server()


def test_server_on_path_serves_when_the_wheel_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    (tmp_path / "redis-server").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert embedded.find_server() == tmp_path / "redis-server"
