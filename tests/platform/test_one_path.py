"""Whichever way a request comes, the dispatcher is told the real model, and a tier and a group by its caller."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import httpx

from rempart_platform.aliases import parse_alias
from rempart_platform.apis.grpc import InferenceServicer
from rempart_platform.apis.line_runner import OnlineLineRunner
from rempart_platform.apis.openai import build_app
from rempart_platform.apis.services import ApiServices
from rempart_platform.apis.testing import FakeDispatcher, fake_services, tiny_model
from rempart_platform.generation import Caller, ServiceTier, Standing
from rempart_platform.models import ModelCatalog
from rempart_protos.v1 import inference_pb2, inference_pb2_grpc

CALLER = Caller("acme", "oidc:0123", Standing(weight=4.0, max_tier=ServiceTier.FLEX, cache_group="house"))
AUTHORIZATION = "Bearer of whatever kind"


@dataclass(frozen=True)
class AnyBearer:
    """As keys and tokens alike come out of authentication."""

    async def authenticate(self, bearer: str) -> Caller:
        return CALLER


async def by_http(services: ApiServices) -> str:
    transport = httpx.ASGITransport(build_app(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        answer = await client.post("/v1/completions", json=json.loads(BODY), headers={"authorization": AUTHORIZATION})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


@asynccontextmanager
async def serve_inference(services: ApiServices) -> AsyncIterator["inference_pb2_grpc.InferenceAsyncStub"]:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(services), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield inference_pb2_grpc.InferenceStub(channel)
    finally:
        await server.stop(None)


async def by_grpc(services: ApiServices) -> str:
    options = inference_pb2.GenerationOptions(service_tier=inference_pb2.SERVICE_TIER_PRIORITY)
    request = inference_pb2.CompleteRequest(model="chat", text="hi", options=options)
    async with serve_inference(services) as stub:
        events = [event async for event in stub.Complete(request, metadata=[("authorization", AUTHORIZATION)])]
    return events[0].admitted.model


async def by_batch(services: ApiServices) -> str:
    async def now(caller: Caller) -> Caller:
        return replace(caller, standing=replace(caller.standing, max_tier=ServiceTier.BATCH))

    answer = await OnlineLineRunner(services, now)(CALLER, "/v1/completions", BODY, 60.0)
    return str(json.loads(answer.body)["model"])


BODY = json.dumps({"model": "chat", "prompt": "hi", "service_tier": "priority"}).encode()


async def test_a_model_is_shown_by_the_name_that_it_is_listed_by() -> None:
    catalog = ModelCatalog([tiny_model("new")], [parse_alias("chat=new")])
    services = replace(fake_services(FakeDispatcher()), authenticator=AnyBearer(), catalog=catalog)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(build_app(services)), base_url="http://router"
    ) as client:
        client.headers["authorization"] = AUTHORIZATION
        listed = (await client.get("/v1/models")).json()["data"]
        assert [each["id"] for each in listed] == ["chat", "new"]
        assert [(await client.get(f"/v1/models/{each['id']}")).json() for each in listed] == listed
        assert (await client.get("/v1/models/other")).status_code == 404


async def test_all_front_ends_are_one_path() -> None:
    dispatcher = FakeDispatcher()
    catalog = ModelCatalog([tiny_model("new")], [parse_alias("chat=new")])
    services = replace(fake_services(dispatcher), authenticator=AnyBearer(), catalog=catalog)
    assert [await ask(services) for ask in (by_http, by_grpc, by_batch)] == ["new"] * 3
    told = [(each.model, each.service_tier, each.caller.standing.cache_group) for each in dispatcher.requests]
    assert told == [("new", tier, "house") for tier in (ServiceTier.FLEX, ServiceTier.FLEX, ServiceTier.BATCH)]


LABELS = [("", ""), *((f"{key}", "") for key in range(6)), *(("", f"{user}") for user in range(6)), ("0", "1")]


async def test_tokens_are_of_the_model_that_a_request_of_the_same_session_meets() -> None:
    catalog = ModelCatalog([tiny_model("new"), tiny_model("old")], [parse_alias("chat=new:4,old:5")])
    services = replace(fake_services(FakeDispatcher()), authenticator=AnyBearer(), catalog=catalog)
    transport = httpx.ASGITransport(build_app(services))
    asked = httpx.AsyncClient(
        transport=transport, base_url="http://router", headers={"authorization": AUTHORIZATION}, verify=False
    )
    met = []
    async with asked as client, serve_inference(services) as stub:
        for key, user in LABELS:
            body = {"model": "chat", "prompt": "hi", "prompt_cache_key": key, "user": user}
            answered = (await client.post("/v1/completions", json=body)).json()["model"]
            by_http = (await client.post("/tokenize", json=body)).json()
            request = inference_pb2.TokenizeRequest(model="chat", text="hi", prompt_cache_key=key, user=user)
            by_grpc = await stub.Tokenize(request, metadata=[("authorization", AUTHORIZATION)])
            assert by_http == {
                "tokens": list(by_grpc.token_ids),
                "count": 2,
                "max_model_len": 512,
                "model": by_grpc.model,
            }
            met.append(by_http["model"])
            if key or user:
                assert answered == by_http["model"]
    assert met[0] == "old", "without a session, the model of the greatest weight"
    assert set(met[1:]) == {"new", "old"}


async def test_a_label_too_long_for_a_chat_is_too_long_to_tokenize() -> None:
    services = replace(
        fake_services(FakeDispatcher()), authenticator=AnyBearer(), catalog=ModelCatalog([tiny_model("new")])
    )
    transport = httpx.ASGITransport(build_app(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://router", verify=False) as client:
        body = {"model": "new", "prompt": "hi", "user": "u" * 65}
        answer = await client.post("/tokenize", json=body, headers={"authorization": AUTHORIZATION})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "user")
