"""A batch while engines, routers and Redis are each killed and started again: every line is answered, once, rightly.

Processes of their own: two routers over two fake engines, whose words follow from the line, and a Redis that syncs its
append-only file once a second, and is made to forget as much when it is killed.
"""

import asyncio
import itertools
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
from tests.ports import free_ports

from rempart_platform.console.admin_client import open_admin
from rempart_platform.endpoints.testing import hash_token
from rempart_platform.local.testing import write_byte_model
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_protos.v1 import engine_pb2, sampling_pb2

ADMIN_KEY = "an admin key of the tests"
VOCAB_SIZE = 128  # every token is an ASCII character
NUM_TOKENS = 4
SEED = 7
LOST_S = 1.0
ENDPOINT = "/v1/completions"
ROUTER_FLAGS = (
    *("--redis-timeout-s", "5", "--queue-lease-s", "4", "--log-level", "error"),
    *("--batch-lease-s", "3", "--batch-poll-s", "0.2", "--batch-janitor-s", "2"),
)

pytestmark = pytest.mark.e2e


class Victim(Protocol):
    """What can be killed, and then comes back."""

    async def kill(self) -> None:
        """By SIGKILL; returns when it is gone."""

    async def start(self) -> None:
        """Returns when it is ready."""


@dataclass
class PythonProcess:
    """A module that says on stdout when it is ready."""

    args: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    ready: dict[str, Any] = field(default_factory=dict)
    process: Process | None = None

    async def start(self) -> None:
        environ = {**os.environ, **self.environ}
        command = (sys.executable, "-m", *self.args)
        self.process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, env=environ)
        assert self.process.stdout is not None
        self.ready = json.loads(await self.process.stdout.readline())

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@dataclass
class RedisProcess:
    """Keeps its data in a folder. Killing it loses what it was told in its last second, as a power cut would."""

    folder: Path
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    pid: int = 0

    @property
    def socket(self) -> Path:
        return self.folder / "redis.sock"

    async def start(self) -> None:
        config = EmbeddedRedisConfig(data_folder=self.folder / "data", socket=self.socket, start_timeout_s=60.0)
        self.pid = (await self.stack.enter_async_context(embedded_redis(config))).pid

    async def kill(self) -> None:
        """What it has written survives a SIGKILL in the kernel's memory, so the end of its file is cut off as well."""
        before = self.log_sizes()
        await asyncio.sleep(LOST_S)
        await self.end()
        if before.keys() == self.log_sizes().keys():  # else it has just written its data anew
            (log,) = before
            os.truncate(log, before[log])

    def log_sizes(self) -> dict[Path, int]:
        return {log: log.stat().st_size for log in (self.folder / "data" / "appendonlydir").glob("*.incr.aof")}

    async def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            await self.stack.aclose()
            self.pid = 0


@dataclass
class Rig:
    redis: RedisProcess
    engines: list[PythonProcess]
    routers: list[PythonProcess]
    key: str = ""

    @property
    def victims(self) -> list[Victim]:
        """In an order in which each kind comes before one is killed again.

        Redis comes after the others: killed within a second of it, it would forget the batch itself.
        """
        return [self.engines[0], self.routers[0], self.redis, self.engines[1], self.routers[1]]

    async def ask(self, call: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]) -> httpx.Response:
        """Asks one router after the other until one answers; each of them is killed now and then."""
        for router in itertools.cycle(self.routers):
            headers = {"authorization": f"Bearer {self.key}"}
            async with httpx.AsyncClient(base_url=router.ready["http"], headers=headers, timeout=30) as http:
                try:
                    response = await call(http)
                except httpx.TransportError:
                    await asyncio.sleep(0.1)
                    continue
            if response.status_code == 503:
                await asyncio.sleep(0.1)
                continue
            assert response.status_code == 200, response.text
            return response
        raise AssertionError("there are routers")

    async def batch(self, batch_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.ask(lambda http: http.get(f"/v1/batches/{batch_id}"))).json()
        return found


@asynccontextmanager
async def running_rig(folder: Path, step_ms: int) -> AsyncIterator[Rig]:
    model = write_byte_model(folder)
    ports = list(itertools.islice(free_ports(), 8))
    redis = RedisProcess(folder)
    engines = [PythonProcess(engine_args(port, step_ms)) for port in ports[:2]]
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports[:2])
    routers = [
        PythonProcess(
            (
                *("rempart_platform", "--model", f"fake={model}", "--engines", addresses),
                *("--batch-store", f"file://{folder}/objects", *ROUTER_FLAGS),
                *("--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)),
            ),
            secrets(f"unix://{redis.socket}"),
        )
        for http, grpc, metrics in (ports[2:5], ports[5:8])
    ]
    rig = Rig(redis, engines, routers)
    try:
        await asyncio.gather(redis.start(), *(engine.start() for engine in engines))
        await asyncio.gather(*(router.start() for router in routers))
        async with open_admin(routers[0].ready["grpc"], ADMIN_KEY) as admin:
            await admin.create_tenant("acme")
            rig.key = (await admin.issue_key("acme")).key
        yield rig
    finally:
        for process in (*routers, *engines):
            await process.kill()
        await redis.end()


def engine_args(port: int, step_ms: int) -> tuple[str, ...]:
    args = ("--port", str(port), "--step-ms", str(step_ms), "--vocab-size", str(VOCAB_SIZE))
    return ("rempart_platform.endpoints.testing", *args)


def secrets(redis_url: str) -> dict[str, str]:
    return {
        "REMPART_ADMIN_KEY": ADMIN_KEY,
        "REMPART_KEY_PEPPER": "a pepper of the tests",
        "REMPART_CACHE_SECRET": "a cache secret of the tests",
        "REMPART_REDIS_URL": redis_url,
    }


def prompt_of(number: int) -> str:
    return f"question {number}"


def input_of(num_lines: int) -> bytes:
    lines = []
    for number in range(num_lines):
        body = {"model": "fake", "prompt": prompt_of(number), "max_tokens": NUM_TOKENS, "seed": SEED}
        lines.append({"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": body})
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def right_text(number: int) -> str:
    """What the fake engine says to a line, found without one."""
    request = engine_pb2.GenerateRequest(
        prompt_token_ids=prompt_of(number).encode(), sampling=sampling_pb2.SamplingParams(seed=SEED)
    )
    return bytes(hash_token(request, 0, index, VOCAB_SIZE) for index in range(NUM_TOKENS)).decode("ascii")


async def submit(rig: Rig, num_lines: int) -> str:
    files = {"file": ("input.jsonl", input_of(num_lines), "application/jsonl")}
    uploaded = await rig.ask(lambda http: http.post("/v1/files", data={"purpose": "batch"}, files=files))
    body = {"input_file_id": uploaded.json()["id"], "endpoint": ENDPOINT, "completion_window": "24h"}
    batch_id: str = (await rig.ask(lambda http: http.post("/v1/batches", json=body))).json()["id"]
    return batch_id


async def run_through_crashes(rig: Rig, num_lines: int, num_crashes: int) -> None:
    """Runs a batch, and kills one process after the other at even distances of its progress.

    One that is done before all were killed, for it went on while another process took long to start, is followed by
    another one.
    """
    victims = iter(itertools.islice(itertools.cycle(rig.victims), num_crashes))
    victim = next(victims, None)
    while victim is not None:
        batch_id, num_answered_then = await submit(rig, num_lines), 0
        while (batch := await rig.batch(batch_id))["status"] in ("validating", "in_progress", "finalizing"):
            num_answered = batch["request_counts"]["completed"]
            if victim is not None and num_answered - num_answered_then >= num_lines / (num_crashes + 2):
                await victim.kill()
                await victim.start()
                victim, num_answered_then = next(victims, None), num_answered
            await asyncio.sleep(0.05)
        await check_results(rig, batch, num_lines)


async def check_results(rig: Rig, batch: dict[str, Any], num_lines: int) -> None:
    assert (batch["status"], batch["error_file_id"], batch["errors"]) == ("completed", None, None)
    assert batch["request_counts"] == {"total": num_lines, "completed": num_lines, "failed": 0}
    content = (await rig.ask(lambda http: http.get(f"/v1/files/{batch['output_file_id']}/content"))).text
    results = [json.loads(line) for line in content.splitlines()]
    assert [result["custom_id"] for result in results] == [f"line-{number}" for number in range(num_lines)]
    for number, result in enumerate(results):
        assert result["error"] is None
        assert result["response"]["status_code"] == 200
        assert result["response"]["body"]["choices"][0]["text"] == right_text(number)


async def test_a_batch_outlives_a_crash_of_each_process(tmp_path: Path) -> None:
    async with running_rig(tmp_path, step_ms=150) as rig:
        await run_through_crashes(rig, num_lines=300, num_crashes=5)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_ten_thousand_lines_outlive_three_crashes_of_each_process(tmp_path: Path) -> None:
    async with running_rig(tmp_path, step_ms=2) as rig:
        await run_through_crashes(rig, num_lines=10_000, num_crashes=15)
