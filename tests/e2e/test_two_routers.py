"""Two router processes on one Redis keep one limit between them, to the request."""

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from rempart_platform.console.admin_client import open_admin
from rempart_platform.endpoints.testing import FakeEngine, fake_model_info
from rempart_platform.local.testing import write_byte_model
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_protos.v1 import admin_pb2

LIMIT = 50
NUM_REQUESTS = 200
CLOCKS_S = 0.05
"""By which Redis' clock and this process' may drift apart within seconds."""
ADMIN_KEY = "an admin key of the tests"

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Router:
    http: str
    grpc: str


@asynccontextmanager
async def running_router(model: Path, engine: str, redis_url: str, *flags: str) -> AsyncIterator[Router]:
    secrets = {
        "REMPART_ADMIN_KEY": ADMIN_KEY,
        "REMPART_KEY_PEPPER": "a pepper of the tests",
        "REMPART_CACHE_SECRET": "a cache secret of the tests",
        "REMPART_REDIS_URL": redis_url,
    }
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--redis-timeout-s", "5")
    command = (
        sys.executable,
        "-m",
        "rempart_platform",
        "--model",
        f"fake={model}",
        "--engines",
        engine,
        *ports,
        *flags,
    )
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, env={**os.environ, **secrets})
    try:
        yield await _ready(process)
    finally:
        process.kill()
        await process.wait()


async def _ready(process: Process) -> Router:
    assert process.stdout is not None
    said = json.loads(await process.stdout.readline())
    return Router(said["http"], said["grpc"])


@asynccontextmanager
async def two_routers(folder: Path, *flags: str) -> AsyncIterator[tuple[Router, Router]]:
    info = fake_model_info("fake", vocab_size=258, eos_token_ids=(257,))
    model = write_byte_model(folder)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(embedded_redis(EmbeddedRedisConfig()))
        engine = await stack.enter_async_context(FakeEngine(info, token=lambda request, choice, index: 97))
        first, second = [
            await stack.enter_async_context(running_router(model, engine.address, redis.url, *flags)) for _ in range(2)
        ]
        yield first, second


async def limited_key(router: Router, requests_per_minute: int) -> str:
    async with open_admin(router.grpc, ADMIN_KEY) as admin:
        await admin.create_tenant("acme", admin_pb2.TenantLimits(requests_per_minute=requests_per_minute))
        return (await admin.issue_key("acme")).key


async def ask(clients: Sequence[httpx.AsyncClient], number: int) -> httpx.Response:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return await clients[number % len(clients)].post("/v1/chat/completions", json=body)


@asynccontextmanager
async def clients_of(routers: Sequence[Router], key: str) -> AsyncIterator[list[httpx.AsyncClient]]:
    headers, limits = {"authorization": f"Bearer {key}"}, httpx.Limits(max_connections=NUM_REQUESTS)
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                httpx.AsyncClient(base_url=router.http, headers=headers, limits=limits, timeout=60)
            )
            for router in routers
        ]


async def test_exactly_fifty_of_two_hundred_parallel_requests_are_admitted(tmp_path: Path) -> None:
    async with two_routers(tmp_path) as routers, clients_of(routers, await limited_key(routers[0], LIMIT)) as clients:
        started_at = time.monotonic()
        responses = await asyncio.gather(*(ask(clients, number) for number in range(NUM_REQUESTS)))
        took_s = time.monotonic() - started_at
    admitted = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response.status_code == 429]
    assert (len(admitted), len(refused)) == (LIMIT, NUM_REQUESTS - LIMIT)
    for response in refused:
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        # The window is 60 s from the first admission, which was at most `took_s` ago when the refusal was written.
        assert 60_000 - took_s * 1000 - 1 <= int(response.headers["retry-after-ms"]) <= 60_000
        assert response.headers["x-ratelimit-remaining-requests"] == "0"


@dataclass(frozen=True)
class Refusal:
    """A refusal, and when at the earliest and at the latest it was written."""

    wait_s: float
    asked_at: float
    told_at: float

    @property
    def earliest_end(self) -> float:
        return self.asked_at + self.wait_s

    @property
    def latest_end(self) -> float:
        return self.told_at + self.wait_s


async def test_the_wait_that_a_refusal_names_is_enough_and_not_too_long(tmp_path: Path) -> None:
    refusals: list[Refusal] = []
    async with (
        two_routers(tmp_path, "--quota-window-s", "6") as routers,
        clients_of(routers, await limited_key(routers[0], requests_per_minute=1)) as clients,
    ):
        assert (await ask(clients, 0)).status_code == 200
        while True:
            asked_at = time.monotonic()
            response = await ask(clients, 1)
            told_at = time.monotonic()
            if response.status_code == 200:
                break
            assert response.status_code == 429
            refusals.append(Refusal(int(response.headers["retry-after-ms"]) / 1000, asked_at, told_at))
            await asyncio.sleep(refusals[-1].wait_s / 2 if len(refusals) == 1 else refusals[-1].wait_s)
    assert len(refusals) >= 2, "one in the middle of the wait that the first named"
    # Each tells the same end of the wait, and who comes then is admitted.
    assert max(each.earliest_end for each in refusals) <= min(each.latest_end for each in refusals) + CLOCKS_S
    assert told_at >= max(each.earliest_end for each in refusals) - CLOCKS_S
    assert len(refusals) <= 3, "who waited as long as he was told is admitted, or was a millisecond early"
