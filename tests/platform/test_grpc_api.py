"""apis/grpc*.py, as a client generated from the protos sees them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped] # the package ships no types
from grpc_status import rpc_status

from rempart_platform.apis.grpc import InferenceServicer
from rempart_platform.apis.grpc_errors import error_status, rich_status
from rempart_platform.apis.grpc_limits import GrpcLimits
from rempart_platform.apis.testing import KEY, MODEL, FakeDispatcher, fake_services
from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError
from rempart_protos.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

AUTH = (("authorization", f"Bearer {KEY}"),)
CHAT = inference_pb2.ChatRequest(model=MODEL, messages=[inference_pb2.ChatMessage(role="user", content="hi")])


@asynccontextmanager
async def stub_of(
    dispatcher: FakeDispatcher, limits: GrpcLimits | None = None
) -> AsyncIterator["inference_pb2_grpc.InferenceAsyncStub"]:
    limits = limits or GrpcLimits()
    server = grpc.aio.server(options=limits.server_options())
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(fake_services(dispatcher), limits), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield inference_pb2_grpc.InferenceStub(channel)
    finally:
        await server.stop(None)


def complete(text: str = "x", *, echo: bool = False, **sampling: object) -> inference_pb2.CompleteRequest:
    params = sampling_pb2.SamplingParams(**sampling)  # type: ignore[arg-type] # fields by name
    options = inference_pb2.GenerationOptions(sampling=params)
    return inference_pb2.CompleteRequest(model=MODEL, text=text, options=options, echo=echo)


async def failure_of(call: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        async for _ in cast(AsyncIterator[object], call):
            pass
    return failed.value


async def failure_of_one(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value


def details_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    metadata = dict(error.trailing_metadata() or ())
    return status_pb2.Status.FromString(metadata["grpc-status-details-bin"])


def unpack(status: status_pb2.Status) -> dict[str, object]:
    found: dict[str, object] = {}
    for detail in status.details:
        message = getattr(error_details_pb2, detail.type_url.rpartition(".")[2])()
        assert detail.Unpack(message)
        found[type(message).__name__] = message
    return found


async def test_a_chat_is_admitted_streamed_finished_and_charged() -> None:
    dispatcher = FakeDispatcher(texts=["hé"])
    async with stub_of(dispatcher) as stub:
        call = stub.Chat(CHAT, metadata=(*AUTH, ("x-request-id", "mine " + "x" * 100)), timeout=30)
        events = [event async for event in call]
        initial = dict(await call.initial_metadata())
        trailing = dict(await call.trailing_metadata())

    assert [event.WhichOneof("event") for event in events] == ["admitted", "delta", "delta", "finished", "usage"]
    request = dispatcher.requests[0]
    assert events[0].admitted.request_id == request.request_id == initial["x-request-id"]
    assert initial["x-client-request-id"] == request.client_request_id == "mine " + "x" * 59
    assert events[0].admitted.model == MODEL
    assert events[0].admitted.service_tier == inference_pb2.SERVICE_TIER_DEFAULT
    assert [event.delta.text for event in events[1:3]] == ["h", "é"]
    assert list(events[1].delta.token_ids) == [ord("h")]
    assert events[3].finished.reason == sampling_pb2.FINISH_REASON_STOP
    assert (events[4].usage.prompt_tokens, events[4].usage.completion_tokens) == (len(request.prompt_token_ids), 2)
    assert events[4].usage.cached_tokens == 2
    assert initial["x-ratelimit-limit-requests"] == trailing["x-ratelimit-limit-requests"] == "60"
    assert request.timeout_s is not None
    assert 20 < request.timeout_s <= 31  # gRPC rounds deadlines up


async def test_completions_carry_echo_logprobs_and_choices() -> None:
    dispatcher = FakeDispatcher(texts=["a", "b"])
    async with stub_of(dispatcher) as stub:
        call = stub.Complete(complete("say ", echo=True, n=2, logprobs=1), metadata=AUTH)
        events = [event async for event in call]
        ids = inference_pb2.CompleteRequest(model=MODEL, token_ids=inference_pb2.TokenIds(ids=b"id"), echo=True)
        echoed = [event async for event in stub.Complete(ids, metadata=AUTH)]

    deltas = [(event.delta.choice, event.delta.text) for event in events if event.HasField("delta")]
    assert deltas == [(0, "say "), (1, "say "), (0, "a"), (1, "b")]
    logprob = events[3].delta.logprobs[0]
    assert (logprob.token, logprob.token_bytes, logprob.logprob) == ("a", b"a", -0.5)
    assert [top.token for top in logprob.top] == ["a"]
    assert echoed[1].delta.text == "id"
    assert dispatcher.requests[0].timeout_s is None


async def test_models_and_token_ids() -> None:
    async with stub_of(FakeDispatcher()) as stub:
        models = await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=AUTH)
        tokens = await stub.Tokenize(inference_pb2.TokenizeRequest(model=MODEL, text="hi"), metadata=AUTH)
    assert [(model.name, model.max_model_len) for model in models.models] == [(MODEL, 512)]
    assert (list(tokens.token_ids), tokens.max_model_len) == (list(b"hi"), 512)


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer wrong"),), (("authorization", KEY),)])
async def test_every_method_needs_a_key(metadata: tuple[tuple[str, str], ...]) -> None:
    service = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
    async with stub_of(FakeDispatcher()) as stub:
        for method in service.methods:
            request = getattr(inference_pb2, method.input_type.name)()
            call = getattr(stub, method.name)(request, metadata=metadata)
            error = await (failure_of(call) if method.server_streaming else failure_of_one(call))
            assert (method.name, error.code()) == (method.name, grpc.StatusCode.UNAUTHENTICATED)
            assert unpack(details_of(error))["ErrorInfo"].reason == "invalid_api_key"  # type: ignore[attr-defined]


async def test_a_field_at_fault_is_named() -> None:
    async with stub_of(FakeDispatcher()) as stub:
        error = await failure_of(stub.Complete(complete(temperature=float("nan")), metadata=AUTH))
        unknown = await failure_of(stub.Chat(inference_pb2.ChatRequest(model="gpt-9"), metadata=AUTH))
        long = await failure_of(stub.Complete(complete("x" * 600), metadata=AUTH))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    bad = unpack(details_of(error))["BadRequest"]
    assert isinstance(bad, error_details_pb2.BadRequest)
    assert bad.field_violations[0].field == "temperature"
    assert unknown.code() is grpc.StatusCode.NOT_FOUND
    assert unpack(details_of(long))["ErrorInfo"] == error_details_pb2.ErrorInfo(
        reason="context_length_exceeded", domain="rempart"
    )


async def test_a_quota_says_which_limit_and_how_long() -> None:
    refusal = RempartError(
        ErrorKind.RATE_LIMIT_EXCEEDED,
        "Too many.",
        retry_after_s=1.5,
        violation=QuotaViolation("tenant-a", "requests", 60),
    )
    refusal.headers["x-ratelimit-remaining-requests"] = "0"
    async with stub_of(FakeDispatcher(refusal=refusal)) as stub:
        error = await failure_of(stub.Chat(CHAT, metadata=AUTH))

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    details = unpack(details_of(error))
    retry, quota = details["RetryInfo"], details["QuotaFailure"]
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert isinstance(quota, error_details_pb2.QuotaFailure)
    violation = quota.violations[0]
    assert (violation.subject, violation.quota_metric, violation.quota_value) == ("tenant-a", "requests", 60)
    assert dict(error.trailing_metadata() or ())["x-ratelimit-remaining-requests"] == "0"


async def test_an_unexpected_failure_is_told_without_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = FakeDispatcher(refusal=ZeroDivisionError("secret"))  # type: ignore[arg-type] # on purpose
    async with stub_of(dispatcher) as stub:
        error = await failure_of(stub.Chat(CHAT, metadata=AUTH))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (error.details() or "")
    assert "ZeroDivisionError" in caplog.text


async def test_a_failure_in_the_stream_comes_after_its_deltas() -> None:
    failure = RempartError(ErrorKind.UNAVAILABLE, "The engine is gone.", retry_after_s=0.1)
    texts = []
    async with stub_of(FakeDispatcher(failure=failure, fail_at=2)) as stub:
        call = stub.Chat(CHAT, metadata=AUTH)
        for _ in range(3):
            event = await call.read()
            assert isinstance(event, inference_pb2.GenerationEvent)
            texts.append(event.delta.text)
        error = await failure_of_one(call.read())
    assert "".join(texts) == "He"
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "The engine is gone.")


@pytest.mark.parametrize("pause_at", [0, 2])
async def test_a_cancelled_call_ends_its_generation(pause_at: int) -> None:
    dispatcher = FakeDispatcher(pause_at=pause_at)
    async with stub_of(dispatcher) as stub:
        call = stub.Chat(CHAT, metadata=AUTH)
        for _ in range(pause_at + 1):
            await call.read()
        assert not dispatcher.ended.is_set()
        call.cancel()
        async with asyncio.timeout(30):
            await dispatcher.ended.wait()
    assert dispatcher.num_delivered == pause_at


async def test_a_deadline_ends_the_generation() -> None:
    dispatcher = FakeDispatcher(pause_at=0)
    async with stub_of(dispatcher) as stub:
        error = await failure_of(stub.Chat(CHAT, metadata=AUTH, timeout=0.2))
        async with asyncio.timeout(30):
            await dispatcher.ended.wait()
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_client_that_does_not_read_is_cut() -> None:
    dispatcher = FakeDispatcher(texts=["x" * 1000], num_repeats=10_000, delta_chars=1000)
    async with stub_of(dispatcher, GrpcLimits(write_timeout_s=1.0)) as stub:
        call = stub.Chat(CHAT, metadata=AUTH)
        await call.read()
        async with asyncio.timeout(30):
            await dispatcher.ended.wait()
        call.cancel()
    assert dispatcher.num_delivered < 10_000


async def test_a_message_too_large_is_refused_before_it_is_read() -> None:
    dispatcher = FakeDispatcher()
    async with stub_of(dispatcher, GrpcLimits(max_message_bytes=1000)) as stub:
        error = await failure_of(stub.Complete(complete("x" * 2000), metadata=AUTH))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not dispatcher.requests


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_every_error_has_a_status_that_agrees_with_its_details(kind: ErrorKind) -> None:
    error = RempartError(kind, "Why.", param="p", retry_after_s=0.25)
    status = error_status(error)
    assert status.code is kind.value.grpc_code
    assert rpc_status.to_status(rich_status(error)).code is status.code
    assert unpack(rich_status(error)).keys() == {"ErrorInfo", "RetryInfo", "BadRequest"}
