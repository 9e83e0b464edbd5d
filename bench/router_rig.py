"""Everything around a router under test, as processes of their own: a real Redis, fake engines, the router itself."""

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import grpc.aio
import psutil

from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_protos.v1 import admin_pb2, admin_pb2_grpc

TENANT = "bench"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_UNREACHED_LIMIT = 10**11
"""Quotas are counted in full and refuse nothing."""


class RigError(Exception):
    """A process does not start or has ended; with the end of what it logged."""


@dataclass(frozen=True, slots=True)
class FakeModel:
    """A model of a fake engine: what it is served as, and the pause between its steps."""

    name: str
    step_ms: float


@dataclass(frozen=True, slots=True)
class Rig:
    """A router that serves, and how to reach it and what is behind it."""

    http_port: int
    grpc_address: str
    key: str
    admin_key: str
    engine_addresses: Mapping[str, str]
    """By model."""
    pids: Mapping[str, tuple[int, ...]]
    """"router", "engines", "redis"."""

    async def charged_tokens(self) -> int:
        """Output tokens that the tenant was charged so far."""
        async with grpc.aio.insecure_channel(self.grpc_address) as channel:
            usage = await admin_pb2_grpc.AdminStub(channel).GetUsage(
                admin_pb2.GetUsageRequest(tenant=TENANT), metadata=_bearer(self.admin_key)
            )
        return sum(record.completion_tokens for record in usage.records)


class CpuClock:
    """CPU seconds of the rig's processes, all their threads, and of this one, which is the client."""

    def __init__(self, pids: Mapping[str, tuple[int, ...]]) -> None:
        self._processes = {role: [psutil.Process(pid) for pid in of_role] for role, of_role in pids.items()}

    def read(self) -> dict[str, float]:
        """By role; "client" is this process."""
        spent = {role: sum(cpu_s(process) for process in of_role) for role, of_role in self._processes.items()}
        return {**spent, "client": time.process_time()}


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process so far, all its threads."""
    times = process.cpu_times()
    return times.user + times.system


@asynccontextmanager
async def running_rig(tokenizer: Path, vocab_size: int, models: Sequence[FakeModel]) -> AsyncIterator[Rig]:
    """Starts everything and makes a tenant with a key; at the end stops everything.

    Args:
        tokenizer: GGUF file or folder whose text side all models have.
        vocab_size: of that.
        models: one fake engine each.

    Raises:
        RigError: something does not start.
    """
    async with AsyncExitStack() as stack:
        engines = {
            model.name: await stack.enter_async_context(module_process(_engine_args(model, vocab_size), {}))
            for model in models
        }
        addresses = {name: str(line["address"]) for name, (line, _) in engines.items()}
        rig = await stack.enter_async_context(running_router(tokenizer, addresses))
        yield replace(rig, pids={**rig.pids, "engines": tuple(pid for _, pid in engines.values())})


@asynccontextmanager
async def running_router(
    tokenizer: Path, addresses: Mapping[str, str], *, cores: Collection[int] | None = None
) -> AsyncIterator[Rig]:
    """As `running_rig`, before engines that run already.

    Args:
        tokenizer: of all models.
        addresses: of the engines, by model.
        cores: on which alone the router runs; None for any.
    """
    admin_key = secrets.token_hex(16)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(embedded_redis(EmbeddedRedisConfig()))
        environ = {
            "REMPART_ADMIN_KEY": admin_key,
            "REMPART_KEY_PEPPER": secrets.token_hex(16),
            "REMPART_CACHE_SECRET": secrets.token_hex(16),
            "REMPART_REDIS_URL": redis.url,
        }
        audit = stack.enter_context(tempfile.TemporaryDirectory(prefix="rempart-audit-", ignore_cleanup_errors=True))
        router = module_process(_router_args(tokenizer, addresses, Path(audit)), environ, cores=cores)
        line, router_pid = await stack.enter_async_context(router)
        yield Rig(
            http_port=int(line["http"].rpartition(":")[2]),
            grpc_address=line["grpc"],
            key=await _make_tenant(line["grpc"], admin_key),
            admin_key=admin_key,
            engine_addresses=addresses,
            pids={"router": (router_pid,), "redis": (redis.pid,)},
        )


@contextmanager
def starting_on(cores: Collection[int] | None) -> Iterator[None]:
    """Processes that are started in the block run on these cores alone, for good; None: on any."""
    if cores is None:
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _engine_args(model: FakeModel, vocab_size: int) -> list[str]:
    args = ["rempart_platform.endpoints.testing", "--port", "0", "--step-ms", str(model.step_ms)]
    return [*args, "--model-name", model.name, "--vocab-size", str(vocab_size)]


def _router_args(tokenizer: Path, addresses: Mapping[str, str], audit: Path) -> list[str]:
    args = ["rempart_platform", "--engines", ",".join(addresses.values())]
    args += [part for name in addresses for part in ("--model", f"{name}={tokenizer}")]
    args += ["--audit-store", audit.as_uri()]
    args += ["--redis-timeout-s", "2"]  # Redis shares its core with the load, and is not away when it waits for it
    return [*args, "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]


@asynccontextmanager
async def module_process(
    args: Sequence[str], environ: Mapping[str, str], *, cores: Collection[int] | None = None
) -> AsyncIterator[tuple[dict[str, Any], int]]:
    """Runs `python -m ARGS`; gives its ready line and its pid. Its log goes to a file, as it would in production."""
    with tempfile.TemporaryFile("w+") as log:
        with starting_on(cores):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", *args),
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | environ,
                start_new_session=True,
            )
        try:
            yield await _ready_line(process, args[0], log), process.pid
            if process.returncode is not None:
                raise RigError(f"{args[0]} ended with {process.returncode} in the middle: {end_of_log(log)}")
        finally:
            await stop_process(process)


async def _ready_line(process: asyncio.subprocess.Process, name: str, log: TextIO) -> dict[str, Any]:
    assert process.stdout is not None, "opened as a pipe"
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            line = await process.stdout.readline()
    except TimeoutError:
        line = b""
    if not line:
        raise RigError(f"{name} did not become ready: {end_of_log(log)}")
    ready: dict[str, Any] = json.loads(line)
    return ready


def end_of_log(log: TextIO) -> str:
    """What an error tells of it."""
    log.seek(0)
    return log.read()[-2000:]


async def stop_process(process: asyncio.subprocess.Process) -> None:
    """Asks it to end, and soon makes it."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _make_tenant(address: str, admin_key: str) -> str:
    limits = admin_pb2.TenantLimits(
        requests_per_minute=_UNREACHED_LIMIT, tokens_per_minute=_UNREACHED_LIMIT, concurrency=_UNREACHED_LIMIT
    )
    async with grpc.aio.insecure_channel(address) as channel:
        admin = admin_pb2_grpc.AdminStub(channel)
        create = admin_pb2.CreateTenantRequest(name=TENANT, limits=limits)
        await admin.CreateTenant(create, metadata=_bearer(admin_key))
        return (await admin.IssueKey(admin_pb2.IssueKeyRequest(tenant=TENANT), metadata=_bearer(admin_key))).key


def _bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)
