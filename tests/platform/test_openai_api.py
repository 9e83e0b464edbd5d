"""apis/openai*.py, as the `openai` client and plain HTTP clients see them, over a real server."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.apis.openai import PUBLIC_PATHS, build_routes
from rempart_platform.apis.testing import KEY, MODEL, FakeDispatcher, fake_services, serve_http
from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError
from rempart_platform.generation import FinishReason
from rempart_platform.request_limits import RequestLimits

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
AUTH = {"authorization": f"Bearer {KEY}"}


@asynccontextmanager
async def client_of(dispatcher: FakeDispatcher, **kwargs: object) -> AsyncIterator[AsyncOpenAI]:
    async with (
        serve_http(fake_services(dispatcher, **kwargs)) as url,  # type: ignore[arg-type] # by name
        openai.DefaultAsyncHttpxClient(verify=False) as transport,  # plain HTTP: certificates only take time to load
        AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60, http_client=transport) as client,
    ):
        yield client


@asynccontextmanager
async def plain_client_of(dispatcher: FakeDispatcher, **kwargs: object) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serve_http(fake_services(dispatcher, **kwargs)) as url,  # type: ignore[arg-type] # by name
        httpx.AsyncClient(base_url=url, headers=AUTH, timeout=60, verify=False) as client,
    ):
        yield client


def events_of(body: str) -> list[str]:
    return [line.removeprefix("data: ") for line in body.split("\n\n") if line.startswith("data: ")]


async def test_a_chat_is_answered() -> None:
    dispatcher = FakeDispatcher(texts=["Paris"])
    async with client_of(dispatcher) as client:
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=HI, max_tokens=9, user="u")
    answer = raw.parse()

    assert answer.choices[0].message.content == "Paris"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    prompt = len(dispatcher.requests[0].prompt_token_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 5)
    assert answer.usage.total_tokens == prompt + 5
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer.system_fingerprint
    assert answer.created == 1_700_000_000
    request_id = dispatcher.requests[0].request_id
    assert answer.id == f"chatcmpl-{request_id}"
    assert raw.headers["x-request-id"] == request_id
    assert raw.headers["x-ratelimit-remaining-requests"] == "59"
    assert int(raw.headers["openai-processing-ms"]) >= 0


@pytest.mark.parametrize(
    ("asked", "used"),
    [(None, "default"), ("auto", "default"), ("priority", "default"), ("flex", "flex"), ("batch", "batch")],
)
async def test_the_tier_that_is_used_is_answered_everywhere(asked: str | None, used: str) -> None:
    body = {"model": MODEL, "service_tier": asked}
    chat, text = {**body, "messages": HI}, {**body, "prompt": "hi"}
    dispatcher = FakeDispatcher(texts=["Paris"])
    async with plain_client_of(dispatcher) as client:
        for path, sent in (("/v1/chat/completions", chat), ("/v1/completions", text)):
            whole = await client.post(path, json=sent)
            streamed = await client.post(path, json={**sent, "stream": True})
            chunks = [json.loads(event) for event in events_of(streamed.text)[:-1]]
            assert whole.json()["service_tier"] == used
            assert {chunk["service_tier"] for chunk in chunks} == {used}
    assert {request.service_tier.name.lower() for request in dispatcher.requests} == {used}


async def test_a_tier_that_there_is_not_is_refused() -> None:
    async with plain_client_of(FakeDispatcher()) as client:
        body = {"model": MODEL, "messages": HI, "service_tier": "best"}
        answer = await client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "service_tier")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"x-request-id": "mine-1"}, "mine-1"),
        ({"x-client-request-id": "of OpenAI's", "x-request-id": "of a proxy"}, "of OpenAI's"),
        ({"x-request-id": "x" * 100}, "x" * 64),
        ({"x-request-id": "a\tb\xa0c"}, "abc"),
        ({}, None),
    ],
)
async def test_a_clients_id_of_a_request_is_a_label_and_ours_stays_the_id(
    sent: dict[str, str], kept: str | None
) -> None:
    dispatcher = FakeDispatcher(texts=["Paris"])
    async with plain_client_of(dispatcher) as client:
        body = {"model": MODEL, "messages": HI}
        headers = {name: value.encode("latin-1") for name, value in sent.items()}
        answer = await client.post("/v1/chat/completions", json=body, headers=headers)  # type: ignore[arg-type] # bytes
    (request,) = dispatcher.requests
    assert answer.headers.get("x-client-request-id") == kept
    assert request.client_request_id == (kept or "")
    assert answer.headers["x-request-id"] == request.request_id not in sent.values()


async def test_a_chat_streams_role_text_end_and_usage() -> None:
    async with client_of(FakeDispatcher(texts=["né"], reason=FinishReason.LENGTH)) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=HI,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks: list[ChatCompletionChunk] = [chunk async for chunk in stream]

    assert [chunk.choices[0].delta.role for chunk in chunks[:-1]] == ["assistant", None, None, None]
    assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["", "n", "é", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "length"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_bytes_of_a_stream_are_openais() -> None:
    async with plain_client_of(FakeDispatcher(texts=["a"])) as client:
        response = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": HI, "stream": True})
        with_usage = await client.post(
            "/v1/chat/completions",
            json={"model": MODEL, "messages": HI, "stream": True, "stream_options": {"include_usage": True}},
        )

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-ratelimit-limit-requests"] == "60"
    *events, done = events_of(response.text)
    assert done == "[DONE]"
    first, delta, last = (json.loads(event) for event in events)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert delta["choices"][0]["delta"] == {"content": "a"}
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert not any("usage" in event for event in (first, delta, last))
    usages = [json.loads(event)["usage"] for event in events_of(with_usage.text)[:-1]]
    assert usages[:-1] == [None] * 3
    assert usages[-1]["total_tokens"] > 0


async def test_logprobs_are_given_with_bytes_and_alternatives() -> None:
    async with client_of(FakeDispatcher(texts=["é"])) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2)

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert (logprobs.content[0].token, logprobs.content[0].logprob) == ("é", -0.5)
    assert logprobs.content[0].bytes == list("é".encode())
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["a", "b"]


async def test_two_choices_are_kept_apart() -> None:
    async with client_of(FakeDispatcher(texts=["one", "two"])) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HI, n=2)
        stream = await client.chat.completions.create(model=MODEL, messages=HI, n=2, stream=True)
        texts = {0: "", 1: ""}
        roles = []
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
            roles.append(chunk.choices[0].delta.role)

    assert [choice.message.content for choice in answer.choices] == ["one", "two"]
    assert texts == {0: "one", 1: "two"}
    assert roles.count("assistant") == 2


async def test_every_parameter_reaches_the_request() -> None:
    dispatcher = FakeDispatcher()
    async with client_of(dispatcher) as client:
        await client.chat.completions.create(
            model=MODEL,
            messages=HI,
            temperature=0.5,
            top_p=0.25,
            presence_penalty=1.0,
            frequency_penalty=-1.0,
            logit_bias={"65": 5},
            seed=-1,
            stop=["x", "yy"],
            max_completion_tokens=7,
            prompt_cache_key="k",
            user="u",
            store=True,
            metadata={"a": "b"},
            tool_choice="none",
            parallel_tool_calls=True,
            reasoning_effort="none",
            response_format={"type": "text"},
            extra_body={
                "top_k": -1,
                "min_p": 0.125,
                "repetition_penalty": 1.5,
                "min_tokens": 2,
                "ignore_eos": True,
                "stop_token_ids": [3],
                "allowed_token_ids": [4, 5],
                "include_stop_str_in_output": True,
            },
        )
    request = dispatcher.requests[0]

    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (
        0.5,
        0.25,
        0.125,
        1.5,
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    assert dict(sampling.logit_bias) == {65: 5.0}
    assert (sampling.seed, sampling.top_k, sampling.max_tokens, sampling.min_tokens) == (2**64 - 1, 0, 7, 2)
    assert sampling.ignore_eos
    assert (list(sampling.stop_token_ids), list(sampling.allowed_token_ids)) == ([3], [4, 5])
    assert (request.stop, request.include_stop) == (("x", "yy"), True)
    assert (request.prompt_cache_key, request.user, request.caller.tenant) == ("k", "u", "tenant-a")


async def test_completions_echo_and_count_offsets() -> None:
    async with client_of(FakeDispatcher(texts=["ab"])) as client:
        plain = await client.completions.create(model=MODEL, prompt="say ", echo=True, n=2, best_of=2)
        from_ids = await client.completions.create(model=MODEL, prompt=list(b"ids "), echo=True)
        with_logprobs = await client.completions.create(model=MODEL, prompt=["x"], logprobs=1)
        stream = await client.completions.create(
            model=MODEL, prompt=[[1, 2]], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]

    assert [choice.text for choice in plain.choices] == ["say ab", "say ab"]
    assert from_ids.choices[0].text == "ids ab"
    assert from_ids.object == "text_completion"
    logprobs = with_logprobs.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (["a", "b"], [-0.5, -0.5], [0, 1])
    assert logprobs.top_logprobs == [{"a": -1.0}, {"a": -1.0}]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "ab"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 2


async def test_models_can_be_listed_and_looked_up() -> None:
    async with client_of(FakeDispatcher()) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).object == "model"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.models.retrieve("org/gpt-9")
    assert missing.value.code == "model_not_found"


async def test_tokenize_gives_the_ids_that_would_be_sent() -> None:
    async with plain_client_of(FakeDispatcher()) as client:
        text = await client.post("/tokenize", json={"model": MODEL, "prompt": "hi"})
        messages = await client.post("/tokenize", json={"model": MODEL, "messages": HI})
        both = await client.post("/tokenize", json={"model": MODEL, "messages": HI, "prompt": "hi"})
    assert text.json() == {"tokens": list(b"hi"), "count": 2, "max_model_len": 512, "model": MODEL}
    assert messages.json()["tokens"][0] == 256
    assert both.status_code == 400


ERRORS: list[tuple[type[openai.APIStatusError], str, str, Callable[[AsyncOpenAI], Awaitable[object]]]] = [
    (
        openai.NotFoundError,
        "model_not_found",
        "model",
        lambda client: client.chat.completions.create(model="gpt-9", messages=HI),
    ),
    (
        openai.BadRequestError,
        "context_length_exceeded",
        "prompt",
        lambda client: client.completions.create(model=MODEL, prompt="x" * 600),
    ),
    (
        openai.BadRequestError,
        "invalid_value",
        "temperature",
        lambda client: client.completions.create(model=MODEL, prompt="x", temperature=-1),
    ),
    (
        openai.BadRequestError,
        "invalid_value",
        "best_of",
        lambda client: client.completions.create(model=MODEL, prompt="x", best_of=2),
    ),
    (
        openai.BadRequestError,
        "invalid_value",
        "prompt",
        lambda client: client.completions.create(model=MODEL, prompt=["x", "y"]),
    ),
]


@pytest.mark.parametrize(("kind", "code", "param", "ask"), ERRORS)
async def test_errors_are_the_clients_own_exceptions(
    kind: type[openai.APIStatusError], code: str, param: str, ask: Callable[[AsyncOpenAI], Awaitable[object]]
) -> None:
    async with client_of(FakeDispatcher()) as client:
        with pytest.raises(kind) as failed:
            await ask(client)
    assert (failed.value.code, failed.value.param, failed.value.type) == (code, param, "invalid_request_error")
    assert failed.value.request_id


async def test_a_wrong_key_is_refused() -> None:
    async with client_of(FakeDispatcher()) as client:
        with pytest.raises(openai.AuthenticationError) as failed:
            await client.with_options(api_key="rk_wrong").chat.completions.create(model=MODEL, messages=HI)
    assert failed.value.code == "invalid_api_key"
    assert failed.value.response.headers["www-authenticate"] == "Bearer"


async def test_a_rate_limit_says_how_long_to_wait() -> None:
    refusal = RempartError(
        ErrorKind.RATE_LIMIT_EXCEEDED,
        "Too many.",
        retry_after_s=1.2345,
        violation=QuotaViolation("tenant-a", "requests", 60),
    )
    refusal.headers["x-ratelimit-remaining-requests"] = "0"
    async with client_of(FakeDispatcher(refusal=refusal)) as client:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as failed:
                await client.chat.completions.create(model=MODEL, messages=HI, stream=stream)
            headers = failed.value.response.headers
            assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1235")
            assert headers["x-ratelimit-remaining-requests"] == "0"
            assert failed.value.code == "rate_limit_exceeded"


FIELDS: list[tuple[dict[str, object], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]}, "tools[0].parameters"),
    ({"tools": "f"}, "tools"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice.type"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "thinking"),
    ({"reasoning_effort": "a lot"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"thinking": True}}, "thinking"),
    ({"chat_template_kwargs": {"thinking": True, "enable_thinking": False}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"thinking": True}, "reasoning_effort": "none"}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"persona": "x"}}, "chat_template_kwargs"),
    ({"guided_json": {}}, "guided_json"),
    ({"temperature": "hot"}, "temperature"),
    ({"n": 1.5}, "n"),
    ({"top_k": -2}, "top_k"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"stop": [1]}, "stop"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"model": None}, "model"),
    ({"stream": "yes"}, "stream"),
]


async def test_a_field_that_cannot_be_honoured_is_refused_by_name() -> None:
    async with plain_client_of(FakeDispatcher()) as client:
        for fields, param in FIELDS:
            response = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": HI, **fields})
            assert (fields, response.status_code) == (fields, 400)
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (fields, error["param"]) == (fields, param)
            assert isinstance(error["code"], str)


async def test_content_may_come_in_parts_of_text() -> None:
    dispatcher = FakeDispatcher()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    async with plain_client_of(dispatcher) as client:
        await client.post(
            "/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": parts}]}
        )
    assert bytes(dispatcher.requests[0].prompt_token_ids[1:8]) == b"user\nab"


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"model": "tiny"}',
    b'\xff{"model": "tiny"}',
    b'{"model": NaN}',
    b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "tiny", "prompt_x": [' + b"{}," * 200_001 + b"{}]}",
    b'{"model": "tiny", "temperature": 1e999, "messages": []}',
]


async def test_a_malformed_body_is_answered_with_400() -> None:
    async with plain_client_of(FakeDispatcher()) as client:
        for body in BODIES:
            response = await client.post(
                "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
            )
            assert (body[:40], response.status_code) == (body[:40], 400)
            assert response.json()["error"]["type"] == "invalid_request_error"


async def test_only_json_is_taken() -> None:
    async with plain_client_of(FakeDispatcher()) as client:
        form = await client.post("/v1/completions", data={"model": MODEL})
        charset = await client.post(
            "/v1/completions",
            content=json.dumps({"model": MODEL, "prompt": "x"}),
            headers={"content-type": "application/json; charset=utf-8"},
        )
    assert form.status_code == 400
    assert "content-type" in form.json()["error"]["message"]
    assert charset.status_code == 200


async def test_every_route_but_health_needs_a_key() -> None:
    services = fake_services(FakeDispatcher())
    paths = [(method, route.path) for route in build_routes(services) for method in route.methods or ()]
    assert len(paths) > 8
    async with serve_http(services) as url, httpx.AsyncClient(base_url=url, verify=False) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
            for method, path in [*paths, ("GET", "/nowhere"), ("POST", "/health/"), ("GET", "/v1/../health/x")]:
                response = await client.request(method, path, headers=headers)
                expected = 200 if path in PUBLIC_PATHS else 401
                assert (method, path, response.status_code) == (method, path, expected)
        response = await client.get("/v1/models")
        assert response.json()["error"]["message"] == "No key was given; send it as 'Authorization: Bearer KEY'."


async def test_unknown_paths_and_methods_are_answered_in_the_same_shape() -> None:
    async with plain_client_of(FakeDispatcher()) as client:
        missing = await client.get("/v1/nowhere")
        wrong = await client.get("/v1/chat/completions")
        slash = await client.get("/v1/models/")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert slash.status_code == 404


async def test_health_tells_ready_from_alive() -> None:
    async with plain_client_of(FakeDispatcher(), is_ready=False) as client:
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/health")).status_code == 503


async def test_an_unexpected_failure_is_told_without_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = FakeDispatcher(refusal=ZeroDivisionError("secret"))  # type: ignore[arg-type] # on purpose
    async with plain_client_of(dispatcher) as client:
        response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]
    assert "ZeroDivisionError" in caplog.text


async def test_a_failure_before_the_first_event_has_its_own_status() -> None:
    failure = RempartError(ErrorKind.UNAVAILABLE, "No engine.", retry_after_s=1.0)
    async with client_of(FakeDispatcher(failure=failure)) as client:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as failed:
                await client.chat.completions.create(model=MODEL, messages=HI, stream=stream)
            assert failed.value.status_code == 503
            assert failed.value.code == "service_unavailable"


async def test_a_failure_in_the_stream_is_an_event_and_no_done() -> None:
    failure = RempartError(ErrorKind.UNAVAILABLE, "The engine is gone.")
    async with client_of(FakeDispatcher(failure=failure, fail_at=2)) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="The engine is gone"):
            async for _ in stream:
                pass
    async with plain_client_of(FakeDispatcher(failure=failure, fail_at=2)) as client:
        response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "stream": True})
    last = json.loads(events_of(response.text)[-1])
    assert last == {
        "error": {
            "message": "The engine is gone.",
            "type": "server_error",
            "param": None,
            "code": "service_unavailable",
        }
    }


@pytest.mark.parametrize("pause_at", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_ends_its_generation(pause_at: int, stream: bool) -> None:
    dispatcher = FakeDispatcher(pause_at=pause_at)
    async with plain_client_of(dispatcher) as client:
        body = {"model": MODEL, "prompt": "x", "stream": stream}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        await dispatcher.started.wait()
        assert not dispatcher.ended.is_set()
        asking.cancel()
        async with asyncio.timeout(30):
            await dispatcher.ended.wait()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_silent_stream_is_kept_alive_by_comments() -> None:
    dispatcher = FakeDispatcher(texts=["ab"], pause_at=1)
    async with (
        plain_client_of(dispatcher, http=HttpLimits(keepalive_s=0.05)) as client,
        client.stream("POST", "/v1/completions", json={"model": MODEL, "prompt": "x", "stream": True}) as response,
    ):
        lines = [line async for line in _until_done(response, dispatcher)]
    comments = [line for line in lines if line.startswith(":")]
    assert len(comments) >= 3
    assert lines[-1] == "data: [DONE]"


async def _until_done(response: httpx.Response, dispatcher: FakeDispatcher) -> AsyncIterator[str]:
    num_comments = 0
    async for line in response.aiter_lines():
        num_comments += line.startswith(":")
        if num_comments == 3:
            dispatcher.resume.set()
        if line:
            yield line


async def test_a_body_too_large_is_told_so() -> None:
    async with plain_client_of(FakeDispatcher(), http=HttpLimits(max_body_bytes=100_000)) as client:
        declared = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x" * 150_000})
        chunked = await client.post(
            "/v1/completions", content=_chunks(150), headers={"content-type": "application/json"}
        )
        fine = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x"})
    assert (declared.status_code, chunked.status_code, fine.status_code) == (413, 413, 200)
    assert "100000 bytes" in declared.json()["error"]["message"]


async def _chunks(number: int) -> AsyncIterator[bytes]:
    for _ in range(number):
        yield b" " * 1000


async def test_limits_of_a_request_can_be_set() -> None:
    async with plain_client_of(FakeDispatcher(), limits=RequestLimits(max_n=1)) as client:
        response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "n": 2})
    assert response.json()["error"]["param"] == "n"
