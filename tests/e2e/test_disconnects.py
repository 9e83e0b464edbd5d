"""Clients that leave in mid-stream: all they held comes back, and they are charged for what they were given."""

import asyncio
import json
import random
from dataclasses import dataclass

import grpc
import httpx
import pytest
from prometheus_client import CollectorRegistry

from rempart_platform.local.testing import PlatformUnderTest, scrape
from rempart_platform.metrics import QuotaMetrics, RouterMetrics
from rempart_platform.tenancy.quota import QuotaConfig, open_ledger
from rempart_platform.tenancy.redis_client import RedisConfig, connect_redis
from rempart_protos.v1 import engine_pb2, engine_pb2_grpc, inference_pb2, inference_pb2_grpc, sampling_pb2

pytestmark = pytest.mark.e2e

TENANT = "leavers"
NUM_CLIENTS = 200
NUM_AT_ONCE = 16
MAX_TOKENS = 100


@dataclass(frozen=True)
class Leaver:
    """What one client does: it reads some elements of a stream and goes; with 0 it goes before the first."""

    model: str
    text: str
    num_choices: int
    num_reads: int
    patience_s: float

    @staticmethod
    def draw(rng: random.Random, model: str) -> "Leaver":
        return Leaver(
            model=model,
            text=f"Tale {rng.randrange(10)}: once upon a time there was",
            num_choices=rng.choice((1, 1, 1, 2)),
            num_reads=rng.choice((0, 1, 1, 2, 3, 5)),
            patience_s=rng.uniform(0.0, 0.3),
        )


async def leave_http(http: httpx.AsyncClient, leaver: Leaver) -> int:
    """Tokens that the client saw: it asks for log-probabilities, of which every token has one."""
    body = {
        "model": leaver.model,
        "prompt": leaver.text,
        "n": leaver.num_choices,
        "max_tokens": MAX_TOKENS,
        "logprobs": 0,
        "stream": True,
    }
    num_tokens = 0
    try:
        async with asyncio.timeout(leaver.patience_s if leaver.num_reads == 0 else None):
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                num_reads = 0
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            num_tokens += len((choice["logprobs"] or {"tokens": []})["tokens"])
                        num_reads += 1
                        if num_reads >= leaver.num_reads > 0:
                            break
    except TimeoutError:
        pass
    return num_tokens


async def leave_grpc(stub: "inference_pb2_grpc.InferenceAsyncStub", key: str, leaver: Leaver) -> int:
    """Tokens that the client saw."""
    params = sampling_pb2.SamplingParams(n=leaver.num_choices, max_tokens=MAX_TOKENS)
    options = inference_pb2.GenerationOptions(sampling=params)
    request = inference_pb2.CompleteRequest(model=leaver.model, text=leaver.text, options=options)
    call = stub.Complete(request, metadata=(("authorization", f"Bearer {key}"),))
    num_tokens = 0
    try:
        async with asyncio.timeout(leaver.patience_s if leaver.num_reads == 0 else None):
            num_reads = 0
            async for event in call:
                num_tokens += len(event.delta.token_ids)
                num_reads += event.WhichOneof("event") == "delta"
                if num_reads >= leaver.num_reads > 0:
                    break
    except TimeoutError:
        pass
    finally:
        call.cancel()
    return num_tokens


async def leave_all(platform: PlatformUnderTest, key: str, model: str) -> int:
    """Tokens that all clients saw together."""
    rng = random.Random(5)
    leavers = [(Leaver.draw(rng, model), rng.random() < 0.5) for _ in range(NUM_CLIENTS)]
    at_once = asyncio.Semaphore(NUM_AT_ONCE)
    headers = {"authorization": f"Bearer {key}"}
    async with (
        httpx.AsyncClient(base_url=platform.http, headers=headers, timeout=60) as http,
        grpc.aio.insecure_channel(platform.grpc) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def leave(leaver: Leaver, is_http: bool) -> int:
            async with at_once:
                return await (leave_http(http, leaver) if is_http else leave_grpc(stub, key, leaver))

        return sum(await asyncio.gather(*(leave(leaver, is_http) for leaver, is_http in leavers)))


async def engine_load(platform: PlatformUnderTest) -> engine_pb2.EngineLoad:
    (address,) = platform.engines
    async with grpc.aio.insecure_channel(address) as channel:
        return await engine_pb2_grpc.EngineStub(channel).GetLoad(engine_pb2.GetLoadRequest())


async def num_reserved(platform: PlatformUnderTest) -> int:
    """Places in flight that Redis still holds for the tenant."""
    observer = QuotaMetrics(RouterMetrics(CollectorRegistry()))
    config = RedisConfig(f"unix://{platform.redis_socket()}", timeout_s=5.0)
    async with connect_redis(config) as redis, open_ledger(redis, QuotaConfig(), observer) as ledger:
        return (await ledger.balance(TENANT)).concurrency


async def what_is_held(platform: PlatformUnderTest) -> dict[str, float]:
    """Everything that must come back to zero."""
    load, router = await engine_load(platform), scrape(platform.metrics)
    return {
        "waiting": load.num_waiting,
        "running": load.num_running,
        "KV blocks": load.num_blocks - load.num_free_blocks,
        "in flight in the router": router.total("rempart_router_requests_in_flight"),
        "in flight at the endpoint": router.total("rempart_router_endpoint_in_flight_requests"),
        "reserved": await num_reserved(platform),
    }


async def test_two_hundred_clients_that_leave_leave_nothing(platform: PlatformUnderTest, model_name: str) -> None:
    platform.cli("tenant", "create", TENANT)
    key = json.loads(platform.cli("key", "issue", TENANT, "--json").stdout)["key"]
    generated_before = platform.engine_metrics().total("rempart_engine_generation_tokens_total")
    num_seen = await leave_all(platform, key, model_name)
    held: dict[str, float] = {}
    try:
        async with asyncio.timeout(120):
            while not held or any(held.values()):
                held = await what_is_held(platform)
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"still held: {held}")

    engine, router = platform.engine_metrics(), scrape(platform.metrics)
    assert engine.total("rempart_engine_kv_usage_ratio") == 0
    assert engine.total("vllm:num_requests_running") == engine.total("vllm:num_requests_waiting") == 0

    (usage,) = json.loads(platform.cli("usage", "--tenant", TENANT, "--json").stdout)["records"]
    num_delivered = router.total("rempart_router_completion_tokens_total", tenant=TENANT)
    num_generated = engine.total("rempart_engine_generation_tokens_total") - generated_before
    assert usage["completion_tokens"] == num_delivered, "charged is what was delivered"
    assert 0 < num_seen <= num_delivered <= num_generated
    assert num_delivered - num_seen <= NUM_CLIENTS, "what was on its way when a client left, and not what was generated"
    assert usage["prompt_tokens"] == router.total("rempart_router_prompt_tokens_total", tenant=TENANT)
    left_early = router.total("rempart_router_requests_total", tenant=TENANT, outcome="client_closed_request")
    assert left_early > NUM_CLIENTS / 2, "otherwise this shows nothing"
    assert router.total("rempart_router_requests_total", tenant=TENANT) <= NUM_CLIENTS


async def test_an_answer_read_to_its_end_is_charged_to_the_token(platform: PlatformUnderTest, model_name: str) -> None:
    platform.cli("tenant", "create", "readers")
    key = json.loads(platform.cli("key", "issue", "readers", "--json").stdout)["key"]
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=platform.http, headers=headers, timeout=60) as http:
        answers = [
            await http.post("/v1/completions", json={"model": model_name, "prompt": "Hello", "max_tokens": 5, "n": n})
            for n in (1, 2)
        ]
    told = sum(answer.json()["usage"]["completion_tokens"] for answer in answers)
    (usage,) = json.loads(platform.cli("usage", "--tenant", "readers", "--json").stdout)["records"]
    assert usage["completion_tokens"] == told
    assert usage["requests"] == 2
