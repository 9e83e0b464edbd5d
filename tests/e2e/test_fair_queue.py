"""Two router processes on one Redis serve their tenants fairly from one queue, and one of them may be killed."""

import asyncio
import itertools
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from rempart_platform.console.admin_client import open_admin
from rempart_platform.endpoints.testing import FakeEngine, fake_model_info
from rempart_platform.local.testing import scrape, write_byte_model
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_protos.v1 import admin_pb2, engine_pb2

ADMIN_KEY = "an admin key of the tests"
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


@dataclass(frozen=True)
class Rig:
    routers: Sequence[Router]
    engine: FakeEngine
    keys: dict[str, str]

    async def ask(self, router: Router, tenant: str, max_tokens: int = 20) -> int:
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
async def two_routers(folder: Path, *tenants: str, step_s: float) -> AsyncIterator[Rig]:
    info = fake_model_info("fake", vocab_size=258, eos_token_ids=(257,))
    model = write_byte_model(folder)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(embedded_redis(EmbeddedRedisConfig()))
        engine = FakeEngine(info, token=lambda request, choice, index: 97, step_s=step_s)
        await stack.enter_async_context(engine)
        routers = [await stack.enter_async_context(running_router(model, engine.address, redis.url)) for _ in range(2)]
        keys = {}
        async with open_admin(routers[0].grpc, ADMIN_KEY) as admin:
            for tenant in tenants:
                await admin.create_tenant(tenant, admin_pb2.TenantLimits())
                keys[tenant] = (await admin.issue_key(tenant)).key
        yield Rig(routers, engine, keys)


async def test_a_light_tenant_is_served_next_beside_a_flood_on_the_other_router(tmp_path: Path) -> None:
    async with two_routers(tmp_path, "flood", "light", step_s=0.005) as rig:
        first, second = rig.routers
        flood = [asyncio.create_task(rig.ask(first, "flood")) for _ in range(100)]
        await rig.engine.wait_for(lambda: len(rig.engine.started) >= 2 * ROWS, timeout_s=60)
        num_started_when_asked = []
        for _ in range(5):
            num_started_when_asked.append(len(rig.engine.started))
            assert await rig.ask(second, "light") == 200
        assert await asyncio.gather(*flood) == [200] * 100
        assert rig.engine.num_running == 0
        places = [number for number, tenant in enumerate(rig.started()) if tenant == "light"]
        assert len(places) == 5
        # While one request of the light tenant is on its way through HTTP, rows of the flood end and begin: two rounds
        # of them are far below the 90 that stood before it.
        assert all(place - asked <= 2 * ROWS for place, asked in zip(places, num_started_when_asked, strict=True))
        assert first.total("queue_waiting_requests") == second.total("queue_waiting_requests") == 0


async def test_a_killed_router_takes_nothing_from_the_other(tmp_path: Path) -> None:
    async with two_routers(tmp_path, "victim", "living", step_s=0.02) as rig:
        killed, living = rig.routers
        long = 4000  # such a request would run for longer than this test
        lost = [asyncio.create_task(rig.ask(killed, "victim", long)) for _ in range(40)]
        await rig.engine.wait_for(lambda: rig.engine.num_running == ROWS, timeout_s=60)
        kept = [asyncio.create_task(rig.ask(living, "living")) for _ in range(20)]
        async with asyncio.timeout(60):
            for _ in itertools.count():
                if living.total("queue_waiting_requests") == len(kept):
                    break
                await asyncio.sleep(0.05)
        killed.process.kill()
        assert await asyncio.gather(*lost) == [0] * len(lost)
        async with asyncio.timeout(LEASE_S + 60):
            assert await asyncio.gather(*kept) == [200] * len(kept)
        assert set(rig.started()[ROWS:]) == {"living"}  # nothing that waited for a client that is gone
        assert living.total("queue_waiting_requests") == 0
