"""A client made from the protos against the real model."""

from collections.abc import AsyncIterable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # the package ships no types
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rempart_platform.local.testing import PlatformUnderTest
from rempart_platform.local.welcome import QUESTION
from rempart_protos.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

pytestmark = pytest.mark.e2e

Event = inference_pb2.GenerationEvent


def options(max_tokens: int, **sampling: Any) -> inference_pb2.GenerationOptions:
    params = sampling_pb2.SamplingParams(temperature=0, max_tokens=max_tokens, **sampling)
    return inference_pb2.GenerationOptions(sampling=params)


def chat_request(model: str, max_tokens: int = 16) -> inference_pb2.ChatRequest:
    message = inference_pb2.ChatMessage(role="user", content=QUESTION)
    return inference_pb2.ChatRequest(model=model, messages=[message], options=options(max_tokens))


async def collect(call: AsyncIterable[Event]) -> list[Event]:
    events = [event async for event in call]
    assert [event.WhichOneof("event") for event in events[:1] + events[-1:]] == ["admitted", "usage"]
    return events


def text_of(events: list[Event]) -> str:
    return "".join(event.delta.text for event in events)


class Client:
    """A channel with the tenant's key."""

    def __init__(self, platform: PlatformUnderTest, channel: grpc.aio.Channel) -> None:
        self.stub = inference_pb2_grpc.InferenceStub(channel)
        self.metadata = (("authorization", f"Bearer {platform.api_key}"),)


async def test_chat_and_complete_stream_text_and_usage(platform: PlatformUnderTest, model_name: str) -> None:
    async with grpc.aio.insecure_channel(platform.grpc) as channel:
        client = Client(platform, channel)
        chat = await collect(client.stub.Chat(chat_request(model_name), metadata=client.metadata))
        assert "Paris" in text_of(chat)
        finished = [event.finished for event in chat if event.HasField("finished")]
        assert [each.reason for each in finished] == [sampling_pb2.FINISH_REASON_STOP]
        assert sum(len(event.delta.token_ids) for event in chat) == chat[-1].usage.completion_tokens

        request = inference_pb2.CompleteRequest(
            model=model_name, text="The capital of France is", options=options(4, logprobs=2)
        )
        completion = await collect(client.stub.Complete(request, metadata=client.metadata))
        assert "Paris" in text_of(completion)
        assert completion[-1].usage.completion_tokens == 4
        logprobs = [logprob for event in completion for logprob in event.delta.logprobs]
        assert [len(logprob.top) for logprob in logprobs] == [2] * 4
        assert b"".join(logprob.token_bytes for logprob in logprobs).decode() == text_of(completion)


async def test_token_ids_stand_for_their_text(platform: PlatformUnderTest, model_name: str) -> None:
    async with grpc.aio.insecure_channel(platform.grpc) as channel:
        client = Client(platform, channel)
        text = "The capital of France is"
        tokenize = inference_pb2.TokenizeRequest(model=model_name, text=text)
        tokens = await client.stub.Tokenize(tokenize, metadata=client.metadata)
        assert tokens.max_model_len > 1000
        token_ids = inference_pb2.TokenIds(ids=tokens.token_ids)
        by_ids = inference_pb2.CompleteRequest(model=model_name, token_ids=token_ids, options=options(4))
        by_text = inference_pb2.CompleteRequest(model=model_name, text=text, options=options(4))
        answers = [
            await collect(client.stub.Complete(request, metadata=client.metadata)) for request in (by_ids, by_text)
        ]
        assert text_of(answers[0]) == text_of(answers[1])

        models = await client.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=client.metadata)
        assert [model.name for model in models.models] == [model_name]
        assert models.models[0].max_model_len == tokens.max_model_len


@pytest.mark.parametrize(
    ("model", "text", "code", "reason"),
    [
        ("no-such-model", "hello", grpc.StatusCode.NOT_FOUND, "model_not_found"),
        (None, "word " * 10_000, grpc.StatusCode.INVALID_ARGUMENT, "context_length_exceeded"),
        (None, "", grpc.StatusCode.INVALID_ARGUMENT, "invalid_value"),
    ],
)
async def test_errors_have_a_code_and_details(
    platform: PlatformUnderTest, model_name: str, model: str | None, text: str, code: grpc.StatusCode, reason: str
) -> None:
    request = inference_pb2.CompleteRequest(model=model or model_name, text=text, options=options(1))
    async with grpc.aio.insecure_channel(platform.grpc) as channel:
        client = Client(platform, channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await collect(client.stub.Complete(request, metadata=client.metadata))
    assert refused.value.code() is code
    info = error_details_pb2.ErrorInfo()
    trailers = {key: value for key, value in refused.value.trailing_metadata() or ()}
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.details[0].Unpack(info)
    assert info.reason == reason


async def test_a_wrong_key_is_unauthenticated(platform: PlatformUnderTest, model_name: str) -> None:
    async with grpc.aio.insecure_channel(platform.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await collect(stub.Chat(chat_request(model_name), metadata=(("authorization", "Bearer rk_wrong"),)))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_reflection_lists_the_services_and_all_are_healthy(platform: PlatformUnderTest) -> None:
    async with grpc.aio.insecure_channel(platform.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # its stubs know no aio
        call = stub.ServerReflectionInfo(  # type: ignore[operator]  # nor the method
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        (answer,) = [answer async for answer in call]
        names = {service.name for service in answer.list_services_response.service}
        assert names >= {"rempart.v1.Inference", "rempart.v1.Admin", "grpc.health.v1.Health"}
        for service in ("", "rempart.v1.Inference", "rempart.v1.Admin"):
            request = health_pb2.HealthCheckRequest(service=service)
            health = await health_pb2_grpc.HealthStub(channel).Check(request)  # type: ignore[attr-defined]  # likewise
            assert health.status == health_pb2.HealthCheckResponse.SERVING
