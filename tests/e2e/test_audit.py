"""Two router processes keep one audit log: one is killed, the other stops, and what they did is all there, signed."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from rempart_platform.console.admin_client import open_admin
from rempart_platform.endpoints.testing import FakeEngine, fake_model_info
from rempart_platform.local.testing import run_cli, write_byte_model
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis

ADMIN_KEY = "an admin key of the tests"
SECRETS = {
    "REMPART_ADMIN_KEY": ADMIN_KEY,
    "REMPART_KEY_PEPPER": "a pepper of the tests",
    "REMPART_CACHE_SECRET": "a cache secret of the tests",
}

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Router:
    process: Process
    http: str
    grpc: str


@asynccontextmanager
async def running_router(model: Path, engine: str, redis_url: str, *flags: str) -> AsyncIterator[Router]:
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--redis-timeout-s", "5")
    command = (sys.executable, "-m", "rempart_platform", "--model", f"fake={model}", "--engines", engine)
    environ = {**os.environ, **SECRETS, "REMPART_REDIS_URL": redis_url}
    process = await asyncio.create_subprocess_exec(*command, *ports, *flags, stdin=DEVNULL, stdout=PIPE, env=environ)
    try:
        assert process.stdout is not None
        said = json.loads(await process.stdout.readline())
        yield Router(process, said["http"], said["grpc"])
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def write_keys(folder: Path) -> tuple[Path, Path]:
    key = Ed25519PrivateKey.generate()
    private, public = folder / "private.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


async def ask_until_it_dies(router: Router, key: str, num_answers: int, is_enough: Callable[[], bool]) -> int:
    """Answers that came; the router is killed after `num_answers` or more, when it `is_enough`."""
    num_answered, is_killed = 0, False

    async def ask(http: httpx.AsyncClient) -> None:
        nonlocal num_answered, is_killed
        while True:
            body = {"model": "fake", "prompt": "of nobody's business", "max_tokens": 3}
            try:
                answer = await http.post("/v1/completions", json=body)
            except httpx.TransportError:
                return
            assert answer.status_code == 200
            num_answered += 1
            if num_answered >= num_answers and not is_killed and is_enough():
                is_killed = True
                router.process.kill()

    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=router.http, headers=headers, timeout=60) as http:
        await asyncio.gather(*(ask(http) for _ in range(4)))
    return num_answered


def has_request_stored(folder: Path) -> bool:
    return any(b'"kind":"request"' in path.read_bytes() for path in folder.rglob("*.jsonl"))


def records(url: str, *wanted: str) -> list[dict[str, object]]:
    shown = run_cli("audit", "show", url, "--json", *wanted, environ=os.environ)
    assert shown.returncode == 0, shown.stderr
    return [json.loads(line) for line in shown.stdout.splitlines()]


async def test_a_killed_router_and_one_that_stops_leave_a_log_that_is_right(tmp_path: Path) -> None:
    model, (private, public) = write_byte_model(tmp_path), write_keys(tmp_path)
    url = f"file://{tmp_path}/audit"
    flags = ("--audit-store", url, "--audit-seal-s", "0.02", "--audit-signing-key", str(private))
    info = fake_model_info("fake", vocab_size=258, eos_token_ids=(257,))
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(embedded_redis(EmbeddedRedisConfig()))
        engine = await stack.enter_async_context(FakeEngine(info, token=lambda request, choice, index: 97))
        first, second = [
            await stack.enter_async_context(running_router(model, engine.address, redis.url, *flags)) for _ in range(2)
        ]
        async with open_admin(first.grpc, ADMIN_KEY) as admin:
            await admin.create_tenant("acme")
            key = (await admin.issue_key("acme")).key
        num_answered = await ask_until_it_dies(first, key, 100, lambda: has_request_stored(tmp_path / "audit"))
        async with open_admin(second.grpc, ADMIN_KEY) as admin:
            await admin.list_tenants()
        second.process.terminate()
        assert await second.process.wait() == 0

        check = ("audit", "verify", url, "--redis-url", redis.url, "--public-key", str(public), "--json")
        checked = await asyncio.to_thread(run_cli, *check, environ=os.environ)
        assert (checked.returncode, json.loads(checked.stdout)["problems"]) == (0, []), checked.stderr

        acts = [record["act"] for record in records(url, "--kind", "outcome")]
        assert sorted(map(str, acts)) == ["create_tenant", "issue_key", "list_tenants"]
        (end,) = records(url, "--kind", "end")
        # Four at a time: what was not sealed is what ended in the last moment.
        requests = records(url, "--kind", "request", "--tenant", "acme")
        assert 0 < len(requests) <= num_answered + 4
        log = b"".join(path.read_bytes() for path in (tmp_path / "audit").rglob("*.jsonl"))
        for secret in (key.rpartition("_")[2], "nobody's business", *SECRETS.values()):
            assert secret.encode() not in log

        sorted((tmp_path / "audit" / "chains" / str(end["chain"])).rglob("*.jsonl"))[-1].unlink()
        checked = await asyncio.to_thread(run_cli, *check, environ=os.environ)
        assert (checked.returncode, len(json.loads(checked.stdout)["problems"])) == (1, 1)
