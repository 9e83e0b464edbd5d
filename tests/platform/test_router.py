import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rempart_platform.cluster.testing import FakeKubernetes, endpoint
from rempart_platform.config import ModelSource, RouterConfig, RouterSecrets
from rempart_platform.endpoints.service_name import ServiceName
from rempart_platform.endpoints.session import SessionConfig
from rempart_platform.endpoints.testing import FakeEngine, Faults, fake_model_info
from rempart_platform.holding import HoldConfig
from rempart_platform.local.testing import write_byte_model
from rempart_platform.router import serve
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_protos.v1 import admin_pb2, admin_pb2_grpc, engine_pb2, inference_pb2, inference_pb2_grpc, sampling_pb2

MODEL = "smol"
ADMIN_KEY = "an admin key for tests"
TOKEN_IDS = tuple(b"round and ")  # a token is a byte


def fake_engine(**options: object) -> FakeEngine:
    """An engine that writes TOKEN_IDS round and round."""

    def token(request: engine_pb2.GenerateRequest, choice: int, index: int) -> int:
        return TOKEN_IDS[index % len(TOKEN_IDS)]

    info = fake_model_info(MODEL, vocab_size=258, max_model_len=2048, eos_token_ids=(257,))
    return FakeEngine(info, token=token, **options)  # type: ignore[arg-type]  # the tests name its parameters


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("model"))


@dataclass(frozen=True)
class Router:
    line: dict[str, str]
    stop: asyncio.Event
    stopped: asyncio.Task[None]
    key: str

    @property
    def authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.line["http"], headers=self.authorization, timeout=60)

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.line["grpc"])

    async def metric(self, name: str, *labels: str) -> float:
        async with httpx.AsyncClient(timeout=60) as client:
            text = (await client.get(self.line["metrics"])).text
        return sum(
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith((name, f"rempart_router_{name}")) and all(label in line for label in labels)
        )

    async def wait_for_metric(self, name: str, *labels: str) -> None:
        """Scrapes until it is 1. Raises TimeoutError."""
        async with asyncio.timeout(30):
            while await self.metric(name, *labels) != 1:  # noqa: ASYNC110 - as an autoscaler
                await asyncio.sleep(0.01)

    async def health(self, service: str) -> health_pb2.HealthCheckResponse:
        async with self.channel() as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=service)
            return await stub.Check(request)  # type: ignore[attr-defined, no-any-return]  # its stubs name no method


@asynccontextmanager
async def running_router(folder: Path, *engines: FakeEngine, **changes: object) -> AsyncIterator[Router]:
    config = RouterConfig(
        models=(ModelSource(MODEL, folder),),
        engines=tuple(engine.address for engine in engines),
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        drain_timeout_s=5.0,
        redis_timeout_s=5.0,
        session=SessionConfig(backoff_initial_s=0.01),
    )
    ready: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    async with embedded_redis(EmbeddedRedisConfig()) as redis:
        secrets = RouterSecrets(ADMIN_KEY, b"a pepper of 16 bytes", b"a secret of 16 bytes", redis.url)
        config = replace(config, **changes)  # type: ignore[arg-type]  # the tests name its fields
        task = asyncio.create_task(serve(config, secrets, ready.set_result, stop))
        try:
            task.add_done_callback(lambda _: ready.cancel())
            try:
                line = {name: str(value) for name, value in (await asyncio.wait_for(ready, 60)).items()}
            except asyncio.CancelledError:
                await task  # it could not start, and says why
                raise
            yield Router(line, stop, task, await make_tenant(line["grpc"]))
        finally:
            stop.set()
            await task


async def test_router_begins_with_the_tenants_of_a_file(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("[plans.small]\nconcurrency = 2\n[tenants.seeded]\nplan = 'small'\ntokens_per_day = 9\n")
    credentials = (("authorization", f"Bearer {ADMIN_KEY}"),)
    async with (
        fake_engine() as engine,
        running_router(model_folder, engine, tenants_file=str(file)) as router,
        router.channel() as channel,
    ):
        listed = await admin_pb2_grpc.AdminStub(channel).ListTenants(
            admin_pb2.ListTenantsRequest(), metadata=credentials
        )
    (tenant,) = (tenant for tenant in listed.tenants if tenant.name == "seeded")
    assert (tenant.plan, tenant.limits) == ("small", admin_pb2.TenantLimits(tokens_per_day=9))


async def make_tenant(address: str) -> str:
    metadata = (("authorization", f"Bearer {ADMIN_KEY}"),)
    async with grpc.aio.insecure_channel(address) as channel:
        admin = admin_pb2_grpc.AdminStub(channel)
        await admin.CreateTenant(admin_pb2.CreateTenantRequest(name="acme"), metadata=metadata)
        return (await admin.IssueKey(admin_pb2.IssueKeyRequest(tenant="acme"), metadata=metadata)).key


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with fake_engine() as engine:
        yield engine


@pytest.fixture
async def router(model_folder: Path, engine: FakeEngine) -> AsyncIterator[Router]:
    async with running_router(model_folder, engine) as router:
        yield router


def chat_body(max_tokens: int = 8, **fields: object) -> dict[str, object]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": max_tokens,
        **fields,
    }


async def test_a_chat_over_http_reaches_an_engine_and_is_metered(router: Router, engine: FakeEngine) -> None:
    async with router.http() as http:
        response = await http.post("/v1/chat/completions", json=chat_body())
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["usage"]["completion_tokens"] == 8
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == len(engine.started[0].prompt_token_ids)
    assert await router.metric("requests_total", 'model="smol"', 'tenant="acme"', 'outcome="ok"') == 1
    assert await router.metric("completion_tokens_total", 'tenant="acme"') == 8
    assert await router.metric("endpoint_ready", engine.address) == 1
    assert await router.metric("requests_in_flight", "smol") == 0


async def test_the_same_over_grpc(router: Router) -> None:
    async with router.channel() as channel:
        request = inference_pb2.CompleteRequest(model=MODEL, text="hello")
        request.options.sampling.CopyFrom(sampling_pb2.SamplingParams(max_tokens=8))
        call = inference_pb2_grpc.InferenceStub(channel).Complete(request, metadata=tuple(router.authorization.items()))
        events = [event async for event in call]
    assert events[0].WhichOneof("event") == "admitted"
    assert [list(event.delta.token_ids) for event in events if event.HasField("delta")] != []
    assert events[-1].usage.completion_tokens == 8


async def test_a_stream_that_its_client_leaves_is_charged_as_delivered(router: Router, engine: FakeEngine) -> None:
    async with (
        router.http() as http,
        http.stream("POST", "/v1/chat/completions", json=chat_body(max_tokens=1900, stream=True)) as response,
    ):
        lines = response.aiter_lines()
        while not (await anext(lines)).startswith("data: "):
            pass
    await engine.wait_for(lambda: engine.num_running == 0)
    assert len(engine.aborted_ids) == 1
    async with router.channel() as channel, asyncio.timeout(30):
        admin, metadata = admin_pb2_grpc.AdminStub(channel), (("authorization", f"Bearer {ADMIN_KEY}"),)
        while not (usage := await admin.GetUsage(admin_pb2.GetUsageRequest(tenant="acme"), metadata=metadata)).records:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # it is settled after its client has gone
    assert 0 < usage.records[0].completion_tokens < 1900
    assert await router.metric("requests_total", 'outcome="client_closed_request"') == 1


async def test_the_models_limits_are_the_engines(router: Router) -> None:
    async with router.http() as http:
        (model,) = (await http.get("/v1/models")).json()["data"]
        assert (model["id"], model["max_model_len"]) == (MODEL, 2048)
        too_long = await http.post("/v1/completions", json={"model": MODEL, "prompt": [1] * 2049})
    assert too_long.status_code == 400
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


async def test_the_cache_salt_never_comes_from_the_client(router: Router, engine: FakeEngine) -> None:
    async with router.http() as http:
        for key in ("a", "b"):
            await http.post("/v1/chat/completions", json=chat_body(prompt_cache_key=key))
    first, second = (request.cache_salt for request in engine.started)
    assert len(first) == len(second) == 32
    assert first != second


async def test_a_lost_engine_makes_the_router_unready_and_its_return_ready(router: Router, engine: FakeEngine) -> None:
    assert (await router.health("")).status == health_pb2.HealthCheckResponse.SERVING
    assert (await router.health("rempart.v1.Inference")).status == health_pb2.HealthCheckResponse.SERVING
    async with router.channel() as channel, router.http() as http:
        watch = health_pb2_grpc.HealthStub(channel).Watch(  # type: ignore[attr-defined]  # its stubs name no method
            health_pb2.HealthCheckRequest(service="rempart.v1.Inference")
        )
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await engine.stop()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await http.get("/readyz")).status_code == 503
        refused = await http.post("/v1/chat/completions", json=chat_body())
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        await engine.start(engine.address)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await http.post("/v1/chat/completions", json=chat_body())).status_code == 200
        watch.cancel()


async def test_an_engine_lost_before_its_first_token_goes_unnoticed(model_folder: Path) -> None:
    async with (
        fake_engine(faults=Faults(die_at=0)) as dying,
        fake_engine() as other,
        running_router(model_folder, dying, other) as router,
        router.http() as http,
    ):
        for _ in range(8):
            assert (await http.post("/v1/chat/completions", json=chat_body())).status_code == 200
        assert len(dying.started) == await router.metric("dispatch_retries_total") <= 1


async def test_reflection_lists_the_services(router: Router) -> None:
    async with router.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # its stubs know no aio
        call = stub.ServerReflectionInfo(  # type: ignore[operator]  # nor the method
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        response = await call.read()
        names = {service.name for service in response.list_services_response.service}
        call.cancel()
    assert {"rempart.v1.Inference", "rempart.v1.Batches", "rempart.v1.Admin", "grpc.health.v1.Health"} <= names


async def test_a_drain_lets_running_streams_end_and_takes_no_new_ones(model_folder: Path, engine: FakeEngine) -> None:
    async with running_router(model_folder, engine, drain_timeout_s=120.0) as router, router.channel() as channel:
        engine.step_s = 0.01
        async with (
            router.http() as http,
            http.stream("POST", "/v1/chat/completions", json=chat_body(max_tokens=100, stream=True)) as response,
        ):
            request = inference_pb2.CompleteRequest(model=MODEL, text="hello")
            request.options.sampling.max_tokens = 100
            call = inference_pb2_grpc.InferenceStub(channel).Complete(
                request, metadata=tuple(router.authorization.items())
            )
            await engine.wait_for(lambda: engine.num_running == 2)
            router.stop.set()
            lines = [line async for line in response.aiter_lines()]
            events = [event async for event in call]
        assert lines[-2:] == ["data: [DONE]", ""]
        assert events[-1].usage.completion_tokens == 100
        await router.stopped
        with pytest.raises(httpx.ConnectError):
            async with router.http() as http:
                await http.get("/livez")


async def test_a_drain_that_takes_too_long_ends_what_still_runs(model_folder: Path, engine: FakeEngine) -> None:
    async with running_router(model_folder, engine, drain_timeout_s=0.2) as router, router.channel() as channel:
        request = inference_pb2.CompleteRequest(model=MODEL, text="hello")
        engine.faults = Faults(hang_at=1)
        call = inference_pb2_grpc.InferenceStub(channel).Complete(request, metadata=tuple(router.authorization.items()))
        await engine.wait_for(lambda: engine.num_running == 1)
        router.stop.set()
        with pytest.raises(grpc.aio.AioRpcError):
            _ = [event async for event in call]
        await router.stopped
        await engine.wait_for(lambda: engine.num_running == 0)


async def test_a_taken_port_is_refused(model_folder: Path, engine: FakeEngine) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with running_router(model_folder, engine, http_port=int(engine.address.rpartition(":")[2])):
            pass
    assert caught.group_contains(OSError, match="in use")


async def router_process(model_folder: Path, redis_url: str, *flags: str) -> asyncio.subprocess.Process:
    secrets = {
        "REMPART_ADMIN_KEY": ADMIN_KEY,
        "REMPART_KEY_PEPPER": "a pepper of 16 bytes",
        "REMPART_CACHE_SECRET": "a secret of 16 bytes",
        "REMPART_REDIS_URL": redis_url,
    }
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rempart_platform", "--model", f"{MODEL}={model_folder}", *flags),
        env=os.environ | secrets,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_the_process_says_why_it_cannot_start(model_folder: Path, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("[tenants.acme]\nplna = 'gold'\n")
    flags = ("--engines", "127.0.0.1:1", "--tenants-file", str(tenants))
    process = await router_process(model_folder, "redis://127.0.0.1:1", *flags)
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    said = json.loads(errors.splitlines()[-1])
    assert said["message"] == "the router cannot go on"
    assert "plna" in said["reason"]


async def test_the_process_prints_one_ready_line_and_leaves_by_a_signal_with_0(
    model_folder: Path, engine: FakeEngine
) -> None:
    async with embedded_redis(EmbeddedRedisConfig()) as redis:
        flags = ("--engines", engine.address, "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
        process = await router_process(model_folder, redis.url, *flags)
        assert process.stdout is not None
        line = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        assert set(line) == {"ready", "http", "grpc", "metrics"}
        async with httpx.AsyncClient(timeout=60) as client:
            assert (await client.get(f"{line['http']}/readyz")).status_code == 200
        process.send_signal(signal.SIGTERM)
        rest, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors
    assert rest == b""
    assert all(json.loads(entry) for entry in errors.splitlines())


def kubeconfig(api: FakeKubernetes, folder: Path) -> str:
    """A file that leads to the API."""
    path = folder / "kubeconfig"
    config = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "clusters": [{"name": "here", "cluster": {"server": api.url()}}],
        "users": [{"name": "me", "user": {}}],
    }
    path.write_text(json.dumps(config))
    return str(path)


async def test_a_request_wakes_engines_that_kubernetes_then_names(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = ServiceName("llm", "engines")
    found: dict[str, object] = {
        "engines_kubernetes": (service,),
        "hold": HoldConfig(without_engine_s=30.0),
        "leader_lease": ("llm", "router"),
    }
    async with FakeKubernetes() as api, fake_engine() as engine:
        monkeypatch.setenv("KUBECONFIG", kubeconfig(api, tmp_path))
        async with running_router(model_folder, **found) as router, router.http() as http:
            assert (await http.get("/readyz")).status_code == 200  # without one engine, or nobody would come
            assert await router.metric("rempart_requests_held", MODEL) == 0
            asking = asyncio.create_task(http.post("/v1/chat/completions", json=chat_body()))
            await router.wait_for_metric("rempart_requests_held", MODEL)
            port = int(engine.address.rpartition(":")[2])
            await api.put_slice("engines-a", "engines", endpoint("127.0.0.1"), ports=[{"name": "grpc", "port": port}])
            assert (await asking).status_code == 200
            assert await router.metric("rempart_discovery_endpoints", str(service), "serving") == 1
            assert await router.metric("rempart_discovery_last_sync_timestamp_seconds", str(service)) > 0
            await router.wait_for_metric("rempart_is_leader")
            await api.stop()
            assert (await http.post("/v1/chat/completions", json=chat_body())).status_code == 200
            assert (await http.get("/readyz")).status_code == 200
