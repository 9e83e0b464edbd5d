"""Reasoning, tools and response formats through both front ends, with a real dispatcher over a fake engine."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessageParam,
    ChatCompletionToolUnionParam,
)

from rempart_platform.apis.grpc import InferenceServicer
from rempart_platform.apis.testing import KEY, MODEL, EngineRig, engine_rig, serve_http, tag_model
from rempart_platform.console.chat import ChatSettings, chat
from rempart_protos.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
SCHEMA: dict[str, object] = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[ChatCompletionToolUnionParam] = [
    {"type": "function", "function": {"name": "weather", "description": "Asks the sky.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock"}},
]
THINK: dict[str, object] = {"chat_template_kwargs": {"thinking": True}}
TWO_CALLS = 'Well. ⟨call weather⟩{"city": "Zürich"}⟨/call⟩⟨call clock⟩{}⟨/call⟩'


def always(text: str) -> Callable[[str, int], str]:
    return lambda prompt, choice: text


@asynccontextmanager
async def client_of(write: Callable[[str, int], str]) -> AsyncIterator[tuple[AsyncOpenAI, EngineRig]]:
    async with (
        engine_rig(write) as rig,
        serve_http(rig.services) as url,
        openai.DefaultAsyncHttpxClient(verify=False) as transport,  # plain HTTP: certificates only take time to load
        AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60, http_client=transport) as client,
    ):
        yield client, rig


@asynccontextmanager
async def plain_client_of(write: Callable[[str, int], str]) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        engine_rig(write) as rig,
        serve_http(rig.services) as url,
        httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60, verify=False) as client,
    ):
        yield client


@asynccontextmanager
async def serve_grpc(
    write: Callable[[str, int], str], *, is_thinking: bool = False
) -> AsyncIterator[tuple[str, EngineRig]]:
    async with engine_rig(write, tag_model(is_thinking=is_thinking)) as rig:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(rig.services), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}", rig
        finally:
            await server.stop(None)


@asynccontextmanager
async def stub_of(write: Callable[[str, int], str]) -> AsyncIterator["inference_pb2_grpc.InferenceAsyncStub"]:
    async with serve_grpc(write) as (address, _), grpc.aio.insecure_channel(address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def prompt_of(rig: EngineRig, position: int = -1) -> str:
    return tag_model().tokenizer.decode(rig.engine.started[position].prompt_token_ids)


def reasoning_of(answer: ChatCompletion, choice: int = 0) -> object:
    message = answer.choices[choice].message.model_dump()
    assert message.get("reasoning_content") == message.get("reasoning")
    return message.get("reasoning_content")


def calls_of(answer: ChatCompletion, choice: int = 0) -> list[tuple[str, str, str]]:
    calls = answer.choices[choice].message.tool_calls or []
    found = []
    for call in calls:
        assert call.type == "function"
        found.append((call.id, call.function.name, call.function.arguments))
    return found


async def test_reasoning_is_told_apart_from_the_answer_and_counted() -> None:
    async with client_of(always("Hm, 2.⟨/think⟩It is 2.")) as (client, rig):
        answer = await client.chat.completions.create(model=MODEL, messages=HI, extra_body=THINK)

    assert prompt_of(rig).endswith("assistant\n⟨think⟩")
    assert reasoning_of(answer) == "Hm, 2."
    assert answer.choices[0].message.content == "It is 2."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("Hm, 2.⟨/think⟩It is 2.".encode()) + 1
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("Hm, 2.")
    assert [usage.completion_tokens for usage in rig.ledger.usages.values()] == [answer.usage.completion_tokens]


@pytest.mark.parametrize(
    ("fields", "is_thinking"),
    [
        ({}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"chat_template_kwargs": {}, "reasoning_effort": None}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"thinking": True}}, True),
    ],
)
async def test_thinking_is_chosen_in_several_ways(fields: dict[str, object], is_thinking: bool) -> None:
    async with client_of(always("a⟨/think⟩b")) as (client, _):
        answer = await client.chat.completions.create(model=MODEL, messages=HI, extra_body=fields)
    assert reasoning_of(answer) == ("a" if is_thinking else None)
    assert answer.choices[0].message.content == ("b" if is_thinking else "a⟨/think⟩b")


async def test_tool_calls_come_whole_with_null_content_when_there_is_no_text() -> None:
    async with client_of(lambda prompt, choice: (TWO_CALLS, TWO_CALLS.removeprefix("Well. "))[choice]) as (client, rig):
        answer = await client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, n=2)

    assert '⟨tool weather⟩{"type":' in prompt_of(rig)
    for choice in (0, 1):
        assert calls_of(answer, choice) == [
            ("call_0", "weather", '{"city": "Zürich"}'),
            ("call_1", "clock", "{}"),
        ]
        assert answer.choices[choice].finish_reason == "tool_calls"
    assert [choice.message.content for choice in answer.choices] == ["Well. ", None]


async def test_a_stream_of_calls_names_each_once_and_goes_on_with_its_arguments() -> None:
    async with plain_client_of(always(f"Hm⟨/think⟩{TWO_CALLS}")) as client:
        body = {"model": MODEL, "messages": HI, "tools": TOOLS, "stream": True, **THINK}
        response = await client.post("/v1/chat/completions", json=body)

    *events, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert done == "[DONE]"
    chunks = [json.loads(event)["choices"][0] for event in events]
    deltas = [chunk["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    assert deltas[-1] == {}
    reasoning = [delta for delta in deltas if "reasoning" in delta]
    assert all(
        delta == {"reasoning_content": delta["reasoning"], "reasoning": delta["reasoning"]} for delta in reasoning
    )
    assert "".join(delta["reasoning"] for delta in reasoning) == "Hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Well. "
    pieces = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert all(len(piece) == 1 for piece in pieces)
    for index, name, arguments in ((0, "weather", '{"city": "Zürich"}'), (1, "clock", "{}")):
        first, *others = [piece[0] for piece in pieces if piece[0]["index"] == index]
        assert first == {
            "index": index,
            "id": f"call_{index}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        assert all(other.keys() == {"index", "function"} for other in others)
        assert all(other["function"].keys() == {"arguments"} for other in others)
        assert "".join(other["function"]["arguments"] for other in others) == arguments


async def test_the_clients_own_stream_puts_two_choices_together_again() -> None:
    texts = (TWO_CALLS, "Only ⟨text")
    async with (
        client_of(lambda prompt, choice: texts[choice]) as (client, _),
        client.chat.completions.stream(
            model=MODEL, messages=HI, tools=TOOLS, n=2, stream_options={"include_usage": True}
        ) as stream,
    ):
        answer = await stream.get_final_completion()

    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls", "stop"]
    assert [choice.message.content for choice in answer.choices] == ["Well. ", "Only ⟨text"]
    calls = answer.choices[0].message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("weather", '{"city": "Zürich"}'),
        ("clock", "{}"),
    ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(len(text.encode()) + 1 for text in texts)


async def test_a_tool_loop_goes_on_with_what_the_answer_was() -> None:
    def write(prompt: str, choice: int) -> str:
        if "tool\n" not in prompt:
            return "I must look.⟨/think⟩⟨call weather⟩{}⟨/call⟩"
        return "So it rains.⟨/think⟩Rain."

    async with client_of(write) as (client, rig):
        first = await client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, extra_body=THINK)
        message = first.choices[0].message
        said: ChatCompletionMessageParam = message.model_dump(exclude_none=True)  # type: ignore[assignment] # as it came
        result: ChatCompletionMessageParam = {"role": "tool", "tool_call_id": "call_0", "content": "rain"}
        second = await client.chat.completions.create(
            model=MODEL, messages=[*HI, said, result], tools=TOOLS, extra_body=THINK
        )

    assert first.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert "assistant\n⟨think⟩I must look.⟨/think⟩⟨call weather⟩{}⟨/call⟩tool\nrain" in prompt_of(rig)
    assert (reasoning_of(second), second.choices[0].message.content) == ("So it rains.", "Rain.")


async def test_what_ends_an_answer_says_whether_its_calls_are_whole() -> None:
    async with client_of(always(TWO_CALLS)) as (client, _):

        async def ask(**fields: object) -> ChatCompletion:
            return await client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, **fields)  # type: ignore[call-overload,no-any-return] # by name

        cut = await ask(max_tokens=30)
        stopped = await ask(stop="Zü")
        single = await ask(parallel_tool_calls=False)
        several = await ask(parallel_tool_calls=True)

    assert (cut.choices[0].finish_reason, calls_of(cut)[0][1]) == ("length", "weather")
    assert (stopped.choices[0].finish_reason, calls_of(stopped)) == ("stop", [("call_0", "weather", '{"city": "')])
    assert single.choices[0].finish_reason == "tool_calls"
    assert calls_of(single) == calls_of(several)[:1]
    assert single.usage is not None
    assert single.usage.completion_tokens == len(TWO_CALLS.partition("{}")[0].encode())


async def test_a_stop_string_in_the_reasoning_ends_the_answer() -> None:
    async with client_of(always("one two⟨/think⟩three")) as (client, _):
        answer = await client.chat.completions.create(model=MODEL, messages=HI, stop=["two"], extra_body=THINK)
    assert (reasoning_of(answer), answer.choices[0].message.content) == ("one ", "")
    assert answer.choices[0].finish_reason == "stop"


async def test_tool_choice_none_keeps_tools_out_of_the_prompt_and_a_forced_call_is_refused() -> None:
    async with client_of(always("ok")) as (client, rig):
        await client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, tool_choice="none")
        assert "⟨tool" not in prompt_of(rig)
        await client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, tool_choice="auto")
        assert "⟨tool" in prompt_of(rig)
        for choice in ("required", {"type": "function", "function": {"name": "clock"}}):
            with pytest.raises(openai.BadRequestError, match="cannot be forced") as refused:
                await client.chat.completions.create(
                    model=MODEL,
                    messages=HI,
                    tools=TOOLS,
                    tool_choice=choice,  # type: ignore[call-overload] # both are right
                )
            assert refused.value.param == "tool_choice"


async def test_a_response_format_is_told_in_the_prompt() -> None:
    async with client_of(always("{}")) as (client, rig):
        await client.chat.completions.create(model=MODEL, messages=HI, response_format={"type": "json_object"})
        assert "schema\nuser" in prompt_of(rig)
        await client.chat.completions.create(
            model=MODEL,
            messages=HI,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
        )
        assert json.loads(prompt_of(rig).partition("schema\n")[2].partition("user\n")[0]) == SCHEMA
        await client.chat.completions.create(model=MODEL, messages=HI, response_format={"type": "text"})
        assert "schema" not in prompt_of(rig)


async def test_log_probabilities_come_for_every_token_with_text() -> None:
    text = "Hm⟨/think⟩Yes ⟨call clock⟩{}⟨/call⟩"
    async with client_of(always(text)) as (client, _):
        answer = await client.chat.completions.create(
            model=MODEL, messages=HI, tools=TOOLS, logprobs=True, extra_body=THINK
        )
        stream = await client.chat.completions.create(
            model=MODEL, messages=HI, tools=TOOLS, logprobs=True, stream=True, extra_body=THINK
        )
        chunks: list[ChatCompletionChunk] = [chunk async for chunk in stream]

    assert answer.choices[0].logprobs is not None
    whole = answer.choices[0].logprobs.content or []
    pieces = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content or []]
    for entries in (whole, pieces):
        assert bytes(byte for entry in entries for byte in entry.bytes or ()) == text.encode()


TOKENIZED: list[dict[str, object]] = [
    {},
    {"tools": TOOLS},
    {"tools": TOOLS, "tool_choice": "none"},
    {"reasoning_effort": "high"},
    THINK,
    {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
]


@pytest.mark.parametrize("fields", TOKENIZED)
async def test_tokenize_renders_what_a_chat_would(fields: dict[str, object]) -> None:
    async with engine_rig(always("ok")) as rig, serve_http(rig.services) as url:
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, verify=False) as client:
            body = {"model": MODEL, "messages": HI, **fields}
            tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert tokens == list(rig.engine.started[0].prompt_token_ids)


def asking(tools: list[str], *, thinking: bool = False, **fields: object) -> inference_pb2.ChatRequest:
    return inference_pb2.ChatRequest(
        model=MODEL,
        messages=[inference_pb2.ChatMessage(role="user", content="hi")],
        tools=[inference_pb2.Tool(name=name, parameters=json.dumps(SCHEMA)) for name in tools],
        thinking=thinking,
        **fields,  # type: ignore[arg-type] # by name
    )


async def test_grpc_events_say_the_same() -> None:
    metadata = (("authorization", f"Bearer {KEY}"),)
    text = f"Hm⟨/think⟩{TWO_CALLS}"
    async with stub_of(always(text)) as stub:
        events = [event async for event in stub.Chat(asking(["weather", "clock"], thinking=True), metadata=metadata)]

    deltas = [event.delta for event in events if event.HasField("delta")]
    assert "".join(delta.reasoning for delta in deltas) == "Hm"
    assert "".join(delta.text for delta in deltas) == "Well. "
    assert all(sum(map(bool, (delta.text, delta.reasoning, delta.tool_calls))) <= 1 for delta in deltas)
    pieces = [piece for delta in deltas for piece in delta.tool_calls]
    assert [(p.index, p.id, p.name, p.arguments) for p in pieces if p.id] == [
        (0, "call_0", "weather", ""),
        (1, "call_1", "clock", ""),
    ]
    assert "".join(piece.arguments for piece in pieces if piece.index == 0) == '{"city": "Zürich"}'
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    assert bytes(token_ids[:-1]) == text.encode()
    assert events[-2].finished.reason == sampling_pb2.FINISH_REASON_TOOL_CALLS
    assert events[-1].usage.completion_tokens == len(token_ids)
    assert events[-1].usage.reasoning_tokens == len("Hm")


async def test_grpc_tokenizes_and_refuses_as_it_chats() -> None:
    metadata = (("authorization", f"Bearer {KEY}"),)
    tools = [inference_pb2.Tool(name="clock")]
    messages = [inference_pb2.ChatMessage(role="user", content="hi")]
    async with stub_of(always("ok")) as stub:
        request = inference_pb2.TokenizeRequest(model=MODEL, messages=messages, tools=tools, thinking=True)
        tokens = await stub.Tokenize(request, metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as nothing_said:
            await stub.Tokenize(inference_pb2.TokenizeRequest(model=MODEL, tools=tools), metadata=metadata)
        required = inference_pb2.ToolChoice(mode=inference_pb2.ToolChoice.MODE_REQUIRED)
        with pytest.raises(grpc.aio.AioRpcError) as forced:
            _ = [event async for event in stub.Chat(asking(["clock"], tool_choice=required), metadata=metadata)]
    rendered = tag_model().tokenizer.decode(tokens.token_ids)
    assert rendered == "tools\n⟨tool clock⟩user\nhiassistant\n⟨think⟩"
    for refused in (nothing_said.value, forced.value):
        assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_console_shows_reasoning_beside_the_answer_and_sends_it_back() -> None:
    answers, errors = io.StringIO(), io.StringIO()
    async with serve_grpc(always("Hm.⟨/think⟩Yes."), is_thinking=True) as (address, rig):
        settings = ChatSettings(address, KEY)
        exit_code = await asyncio.to_thread(chat, settings, io.StringIO("one\ntwo\n"), answers, errors)

    assert (exit_code, answers.getvalue(), errors.getvalue()) == (0, "Yes.\nYes.\n", "Hm.\nHm.\n")
    assert "assistant\n⟨think⟩Hm.⟨/think⟩Yes.user\ntwo" in prompt_of(rig)
