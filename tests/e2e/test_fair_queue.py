"""Two router processes on one Redis serve their tenants fairly from one queue, and one of them may be killed."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from rempart_platform.console.admin_client import open_admin
from rempart_platform.endpoints.testing import FakeEngine, fake_model_info
from rempart_platform.local.testing import scrape, write_byte_model
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_protos.v1 import admin_pb2, engine_pb2

ADMIN_KEY = "an admin key of the tests"
END_ID = 257
LONG = 4000
"""Output tokens of a request that does not end by itself within a test."""
ROWS = 4
LEASE_S = 8.0  # a router that lives says so every second, be the machine ever so busy
FLAGS = ("--queue-capacity-rows-per-endpoint", str(ROWS), "--queue-lease-s", str(LEASE_S))

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Router:
    process: Process
    http: str
    grpc: str
    metrics: str

    def total(self, name: str) -> float:
        return scrape(self.metrics).total(f"rempart_router_{name}")


@dataclass
class Endings:
    """Which requests the engine ends at their next token."""

    request_ids: set[str] = field(default_factory=set)
    of_all: bool = False

    def token(self, request: engine_pb2.GenerateRequest, choice: int, index: int) -> int:
        return END_ID if self.of_all or request.request_id in self.request_ids else 97


@dataclass(frozen=True)
class Rig:
    routers: Sequence[Router]
    engine: FakeEngine
    endings: Endings
    keys: dict[str, str]

    async def ask(self, router: Router, tenant: str, max_tokens: int = LONG) -> int:
        """The status of the answer; 0 when none came."""
        body = {"model": "fake", "prompt": f"of {tenant}", "max_tokens": max_tokens}
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        limits = httpx.Limits(max_connections=None)
        try:
            async with httpx.AsyncClient(base_url=router.http, headers=headers, limits=limits, timeout=120) as http:
                return (await http.post("/v1/completions", json=body)).status_code
        except httpx.TransportError:
            return 0

    def started(self) -> list[str]:
        """Tenants of the requests that the engine was given, in order."""
        return [_text(request).removeprefix("of ") for request in self.engine.started]

    def end_one_of(self, tenant: str) -> None:
        """Of those that the engine was given and that were not ended so far."""
        self.endings.request_ids.add(
            next(
                request.request_id
                for request, whose in zip(self.engine.started, self.started(), strict=True)
                if whose == tenant and request.request_id not in self.endings.request_ids
            )
        )


def _text(request: engine_pb2.GenerateRequest) -> str:
    """The byte model's token ids are bytes."""
    return bytes(request.prompt_token_ids).decode()


@asynccontextmanager
async def running_router(model: Path, engine: str, redis_url: str) -> AsyncIterator[Router]:
    secrets = {
        "REMPART_ADMIN_KEY": ADMIN_KEY,
        "REMPART_KEY_PEPPER": "a pepper of the tests",
        "REMPART_CACHE_SECRET": "a cache secret of the tests",
        "REMPART_REDIS_URL": redis_url,
    }
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--redis-timeout-s", "5")
    command = (sys.executable, "-m", "rempart_platform", "--model", f"fake={model}", "--engines", engine)
    environ = {**os.environ, **secrets}
    process = await asyncio.create_subprocess_exec(*command, *ports, *FLAGS, stdin=DEVNULL, stdout=PIPE, env=environ)
    try:
        assert process.stdout is not None
        said = json.loads(await process.stdout.readline())
        yield Router(process, said["http"], said["grpc"], said["metrics"])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def two_routers(folder: Path, *tenants: str) -> AsyncIterator[Rig]:
    info, endings = fake_model_info("fake", vocab_size=258, eos_token_ids=(END_ID,)), Endings()
    model = write_byte_model(folder)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(embedded_redis(EmbeddedRedisConfig()))
        engine = FakeEngine(info, token=endings.token, step_s=0.02)
        await stack.enter_async_context(engine)
        routers = [await stack.enter_async_context(running_router(model, engine.address, redis.url)) for _ in range(2)]
        keys = {}
        async with open_admin(routers[0].grpc, ADMIN_KEY) as admin:
            for tenant in tenants:
                await admin.create_tenant(tenant, admin_pb2.TenantLimits())
                keys[tenant] = (await admin.issue_key(tenant)).key
        yield Rig(routers, engine, endings, keys)


async def test_a_light_tenant_is_served_next_beside_a_flood_on_the_other_router(tmp_path: Path) -> None:
    """Nothing ends but what the test ends, so what is next does not hang on how long a request is on its way."""
    async with two_routers(tmp_path, "flood", "light") as rig:
        first, second = rig.routers
        flood = [asyncio.create_task(rig.ask(first, "flood")) for _ in range(100)]
        await rig.engine.wait_for(lambda: rig.engine.num_running == ROWS, timeout_s=60)
        await until(lambda: first.total("queue_waiting_requests") == len(flood) - ROWS)
        for _ in range(5):
            await serve_next_in_line(rig, second, "light")
        assert first.total("queue_waiting_requests") >= len(flood) - ROWS - 10, "the flood was there all along"
        rig.endings.of_all = True
        assert await asyncio.gather(*flood) == [200] * len(flood)
        assert rig.engine.num_running == 0
        assert first.total("queue_waiting_requests") == second.total("queue_waiting_requests") == 0


async def serve_next_in_line(rig: Rig, router: Router, tenant: str) -> None:
    """Asks for a tenant that has nothing running: no more than one request of the flood ends until it is served."""
    num_started = rig.started().count(tenant)

    def has_started() -> bool:
        return rig.started().count(tenant) > num_started

    answer = asyncio.create_task(rig.ask(router, tenant))
    await until(lambda: has_started() or router.total("queue_waiting_requests") == 1)
    if not has_started():  # else a row was kept for it
        rig.end_one_of("flood")
        await rig.engine.wait_for(has_started, timeout_s=60)
    rig.end_one_of(tenant)
    assert await answer == 200


async def until(predicate: Callable[[], bool]) -> None:
    """Of what no event tells."""
    async with asyncio.timeout(60):
        while True:
            if predicate():
                return
            await asyncio.sleep(0.05)


async def test_a_killed_router_takes_nothing_from_the_other(tmp_path: Path) -> None:
    async with two_routers(tmp_path, "victim", "living") as rig:
        killed, living = rig.routers
        lost = [asyncio.create_task(rig.ask(killed, "victim")) for _ in range(40)]
        await rig.engine.wait_for(lambda: rig.engine.num_running == ROWS, timeout_s=60)
        kept = [asyncio.create_task(rig.ask(living, "living", max_tokens=20)) for _ in range(20)]
        await until(lambda: living.total("queue_waiting_requests") == len(kept))
        killed.process.kill()
        assert await asyncio.gather(*lost) == [0] * len(lost)
        async with asyncio.timeout(LEASE_S + 60):
            assert await asyncio.gather(*kept) == [200] * len(kept)
        assert set(rig.started()[ROWS:]) == {"living"}  # nothing that waited for a client that is gone
        assert living.total("queue_waiting_requests") == 0
