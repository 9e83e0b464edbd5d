"""A whole router with its audit log."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import httpx
import pytest

from rempart_platform.audit.heads import HeadStore
from rempart_platform.audit.store import SegmentStore
from rempart_platform.audit.testing import CHAIN, write_chain
from rempart_platform.audit.values import AuditConfig
from rempart_platform.audit.verify import Verification, Wanted, read_records, verify
from rempart_platform.config import ModelSource, RouterConfig, RouterSecrets
from rempart_platform.endpoints.session import SessionConfig
from rempart_platform.endpoints.testing import FakeEngine, fake_model_info
from rempart_platform.local.testing import write_byte_model
from rempart_platform.object_store import open_object_store
from rempart_platform.oidc.testing import AUDIENCE, local_issuer, new_key
from rempart_platform.oidc.values import OidcConfig
from rempart_platform.router import serve
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.redis_client import connect_redis
from rempart_platform.tenancy.tenants import TenantRegistry
from rempart_platform.tenancy.testing import patient
from rempart_platform.tenancy.usage import UsageReader
from rempart_protos.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

MODEL = "tiny"
ADMIN_KEY = "an admin key for tests"
PEPPER, CACHE_SECRET = "a pepper of 16 bytes", "a secret of 16 bytes"
PROMPT = "the patient of room seven"
TOKEN_IDS = tuple(b"a most private answer ")


def fake_engine() -> FakeEngine:
    def token(request: object, choice: int, index: int) -> int:
        return TOKEN_IDS[index % len(TOKEN_IDS)]

    info = fake_model_info(MODEL, vocab_size=258, max_model_len=2048, eos_token_ids=(257,))
    return FakeEngine(info, token=token)


@dataclass(frozen=True)
class Audited:
    line: dict[str, str]
    store: SegmentStore
    redis_url: str
    folder: Path
    stop: asyncio.Event
    stopped: asyncio.Task[None]

    async def check(self) -> Verification:
        async with connect_redis(patient(self.redis_url)) as redis:
            return await verify(self.store, heads=HeadStore(redis))

    async def records(self, kind: str = "") -> list[dict[str, object]]:
        return [record async for record in read_records(self.store, Wanted(kind=kind))]

    async def make_key(self) -> str:
        return await make_key(self.line["grpc"])


async def make_key(address: str) -> str:
    metadata = (("authorization", f"Bearer {ADMIN_KEY}"),)
    async with grpc.aio.insecure_channel(address) as channel:
        admin = admin_pb2_grpc.AdminStub(channel)
        await admin.CreateTenant(admin_pb2.CreateTenantRequest(name="acme"), metadata=metadata)
        return (await admin.IssueKey(admin_pb2.IssueKeyRequest(tenant="acme"), metadata=metadata)).key


@asynccontextmanager
async def audited_router(
    folder: Path,
    model_folder: Path,
    engine: FakeEngine,
    of_router: Mapping[str, Any] = MappingProxyType({}),
    **of_audit: Any,
) -> AsyncIterator[Audited]:
    audit = AuditConfig(store=f"file://{folder}", seal_s=0.05, backoff_s=0.01, max_backoff_s=0.05)
    config = RouterConfig(
        models=(ModelSource(MODEL, model_folder),),
        engines=(engine.address,),
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        drain_timeout_s=5.0,
        redis_timeout_s=5.0,
        session=SessionConfig(backoff_initial_s=0.01),
        audit=replace(audit, **of_audit),
    )
    config = replace(config, **of_router)
    ready: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    async with embedded_redis(EmbeddedRedisConfig()) as redis:
        secrets = RouterSecrets(ADMIN_KEY, PEPPER.encode(), CACHE_SECRET.encode(), redis.url)
        task = asyncio.create_task(serve(config, secrets, ready.set_result, stop))
        try:
            line = {name: str(value) for name, value in (await asyncio.wait_for(ready, 60)).items()}
            store = SegmentStore(open_object_store(config.audit.store))
            yield Audited(line, store, redis.url, folder, stop, task)
        finally:
            stop.set()
            await task


def chat(key: str, url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60)


def body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "user": "dr jekyll", **fields}


@pytest.fixture(scope="session")
def byte_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with fake_engine() as engine:
        yield engine


async def test_every_act_and_request_is_in_the_log_and_no_text(
    tmp_path: Path, byte_model_folder: Path, engine: FakeEngine
) -> None:
    async with audited_router(tmp_path, byte_model_folder, engine) as router:
        key = await router.make_key()
        # An act is in the log when it is answered.
        acts = [record["act"] for record in await router.records("outcome")]
        assert acts == ["create_tenant", "issue_key"]
        async with chat(key, router.line["http"]) as http:
            assert (await http.post("/v1/completions", json=body())).status_code == 200
        async with grpc.aio.insecure_channel(router.line["grpc"]) as channel:
            request = inference_pb2.CompleteRequest(model=MODEL, text=PROMPT)
            request.options.sampling.max_tokens = 5
            credentials = (("authorization", f"Bearer {key}"),)
            call = inference_pb2_grpc.InferenceStub(channel).Complete(request, metadata=credentials)
            assert [event async for event in call]
            admin = admin_pb2_grpc.AdminStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await admin.ListTenants(admin_pb2.ListTenantsRequest(), metadata=credentials)
            with pytest.raises(grpc.aio.AioRpcError):
                await admin.ListKeys(
                    admin_pb2.ListKeysRequest(tenant="nobody"), metadata=(("authorization", f"Bearer {ADMIN_KEY}"),)
                )
        router.stop.set()
        await router.stopped
        done = await router.check()
        assert (done.problems, done.num_chains) == ([], 1)
        requests = await router.records("request")
        assert [record["completion_tokens"] for record in requests] == [8, 5]
        assert {(record["tenant"], record["outcome"], record["prompt_tokens"]) for record in requests} == {
            ("acme", "ok", len(PROMPT))
        }
        assert requests[0]["endpoints"] == [engine.address]
        outcomes = [(record["act"], record["who"], record["outcome"]) for record in await router.records("outcome")]
        assert outcomes[2:] == [("list_tenants", "", "invalid_api_key"), ("list_keys", "admin key", "not_found")]
        assert [record["kind"] for record in await router.records()][-1] == "end"
        log = b"".join(await asyncio.to_thread(lambda: [path.read_bytes() for path in tmp_path.rglob("*.jsonl")]))
        assert key.split("_")[1].encode() in log
        secrets = (key.split("_")[2], ADMIN_KEY, PEPPER, CACHE_SECRET)
        for text in (*secrets, PROMPT, "dr jekyll", bytes(TOKEN_IDS[:8]).decode()):
            assert text.encode() not in log, text


async def test_a_router_whose_log_cannot_be_stored_refuses_acts_and_then_requests(
    tmp_path: Path, byte_model_folder: Path, engine: FakeEngine
) -> None:
    async with audited_router(tmp_path, byte_model_folder, engine, max_buffered=3, act_timeout_s=2.0) as router:
        key = await router.make_key()
        chains = tmp_path / "chains"
        chains.rename(tmp_path / "moved")
        chains.write_text("no folder")
        async with chat(key, router.line["http"]) as http:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await make_key(router.line["grpc"])
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "audit log" in str(refused.value.details())
            answers = [await http.post("/v1/completions", json=body()) for _ in range(4)]
            assert [answer.status_code for answer in answers][-1] == 503
            assert "audit_max_buffered" in answers[-1].text
            assert int(answers[-1].headers["retry-after"]) >= 1
            chains.unlink()
            (tmp_path / "moved").rename(chains)
            async with asyncio.timeout(60):
                while (await http.post("/v1/completions", json=body())).status_code != 200:
                    pass
        router.stop.set()
        await router.stopped
        assert (await router.check()).problems == []
        assert "not_begun" in [record["outcome"] for record in await router.records("outcome")]


async def test_what_the_tenants_file_changes_is_in_the_log(
    tmp_path: Path, byte_model_folder: Path, engine: FakeEngine
) -> None:
    secret = f"rk_{7:016x}_{8:064x}"
    (tmp_path / "secret").write_text(secret)
    file = tmp_path / "tenants.toml"
    file.write_text(
        f"""
        [plans.gold]
        weight = 2
        [tenants.acme]
        plan = "gold"
        [tenants.acme.keys.ci]
        from_file = "{tmp_path}/secret"
        """
    )
    async with audited_router(tmp_path, byte_model_folder, engine, {"tenants_file": str(file)}) as router:
        router.stop.set()
        await router.stopped
        acts = await router.records("act")
        assert {(record["act"], record["who"]) for record in acts} == {("apply_tenants_file", "tenants file")}
        told = [(record["entry"], record["tenant"]) for record in acts]
        assert told == [("plan gold", ""), ("tenant acme", "acme"), (f"key acme ci {7:016x}", "acme")]
        assert secret[-64:] not in str(acts)


async def test_streams_that_a_drain_cuts_off_are_settled_and_in_the_log(
    tmp_path: Path, byte_model_folder: Path, engine: FakeEngine
) -> None:
    engine.step_s = 0.02
    async with audited_router(tmp_path, byte_model_folder, engine, {"drain_timeout_s": 0.2}) as router:
        key = await router.make_key()
        async with grpc.aio.insecure_channel(router.line["grpc"]) as channel, chat(key, router.line["http"]) as http:
            request = inference_pb2.CompleteRequest(model=MODEL, text=PROMPT)
            request.options.sampling.max_tokens = 2000
            credentials = (("authorization", f"Bearer {key}"),)
            call = inference_pb2_grpc.InferenceStub(channel).Complete(request, metadata=credentials)
            await anext(aiter(call))
            async with http.stream("POST", "/v1/completions", json=body(max_tokens=2000, stream=True)) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                router.stop.set()
                await router.stopped
                async with connect_redis(patient(router.redis_url)) as redis:
                    (used,) = await UsageReader(redis, TenantRegistry(redis)).read("acme")
        assert (await router.check()).problems == []
        records = await router.records("request")
        assert [record["outcome"] for record in records] == ["client_closed_request"] * 2
        assert [record["kind"] for record in await router.records()][-1] == "end"
        assert used.requests == 2
        assert used.completion_tokens == sum(int(str(record["completion_tokens"])) for record in records)


async def test_who_comes_with_a_token_is_in_the_log_an_admin_by_name_a_tenant_by_digest(
    tmp_path: Path, byte_model_folder: Path, engine: FakeEngine
) -> None:
    with local_issuer() as issuer:
        issuer.keys["ed"] = new_key("EdDSA")
        oidc = OidcConfig(issuer=issuer.url, audience=AUDIENCE, admin_role="operator")
        async with audited_router(tmp_path, byte_model_folder, engine, {"oidc": oidc}) as router:
            tenant, operator = (
                issuer.token("ed", "EdDSA", sub="ophelia"),
                issuer.token("ed", "EdDSA", sub="grace", roles=["operator"]),
            )
            async with grpc.aio.insecure_channel(router.line["grpc"]) as channel:
                admin = admin_pb2_grpc.AdminStub(channel)
                request = admin_pb2.CreateTenantRequest(name="acme")
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await admin.CreateTenant(request, metadata=(("authorization", f"Bearer {tenant}"),))
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
                await admin.CreateTenant(request, metadata=(("authorization", f"Bearer {operator}"),))
            async with chat(tenant, router.line["http"]) as http:
                assert (await http.post("/v1/completions", json=body())).status_code == 200
            router.stop.set()
            await router.stopped
            assert (await router.check()).problems == []
            outcomes = [(record["who"], record["outcome"]) for record in await router.records("outcome")]
            assert outcomes == [("", "invalid_api_key"), ("oidc:grace", "ok")]
            (asked,) = await router.records("request")
            assert asked["tenant"] == "acme"
            assert str(asked["key_id"]).startswith("oidc:")
            assert "ophelia" not in str(asked)


async def test_a_router_removes_what_is_older_than_it_is_to_keep(
    tmp_path: Path, byte_model_folder: Path, engine: FakeEngine
) -> None:
    old = write_chain([2, 2]).segments
    for path, data in old.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    async with audited_router(tmp_path, byte_model_folder, engine, retention_days=30) as audited, asyncio.timeout(60):
        while not (removals := await audited.records("removal")) or await audited.store.days(CHAIN):  # noqa: ASYNC110 - below
            await asyncio.sleep(0.01)  # nothing of a router says it
    (removal,) = removals
    assert (removal["of_chain"], removal["first"], removal["last"]) == (CHAIN, 0, 3)
    done = await verify(audited.store)
    assert (done.problems, done.num_chains) == ([], 1), "that of the router, which is of today"
