"""`rempart up` with a DeepSeek-V3.2 folder: thinking, tools and speculation, as clients meet them.

The model is tiny and knows a few conversations by heart, so that every answer can be told in advance.
"""

import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessage, ChatCompletionMessageParam
from openai.types.chat.chat_completion_message_function_tool_call import ChatCompletionMessageFunctionToolCall

from rempart_platform.chat.message import Message, ToolCall
from rempart_platform.local.testing import PlatformUnderTest, run_cli
from rempart_platform.text.from_folder import load_folder
from rempart_platform.text.tokenizer import Tokenizer
from rempart_protos.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests/ is no installed package

from tests.e2e.taught_model import (
    ANSWER,
    CALLING,
    CONFIG,
    CONTINUATION,
    LAST_ANSWER,
    ORDER,
    QUESTION,
    RESULT,
    TEXT,
    THOUGHTFUL_ANSWER,
    THOUGHTFUL_CALLING,
    TOOL,
    write_taught_model,
)

pytestmark = pytest.mark.e2e

MODEL = "Tiny-DeepSeek-V3.2"
AS_IT_IS = ()
COMPACT_CACHE = (
    *("--engines", "2", "--dtype", "float32", "--max-step-tokens", "128"),
    *("--engine-flag", "kv-cache-dtype=fp8", "--engine-flag", "num-speculative-tokens=3"),
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": TOOL.name,
            "description": TOOL.description,
            "parameters": json.loads(TOOL.parameters),
        },
    }
]


@pytest.fixture(scope="session")
def taught_model(deepseek_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / MODEL
    write_taught_model(folder, deepseek_tokenizer)
    return folder


@pytest.fixture(scope="session")
def manifest(taught_model: Path) -> Path:
    path = taught_model.with_suffix(".json")
    written = run_cli("verify", str(taught_model), "--manifest", str(path), "--write", environ=os.environ)
    assert written.returncode == 0, written.stderr
    return path


@pytest.fixture(scope="session")
def tokenizer(taught_model: Path) -> Tokenizer:
    return load_folder(taught_model).tokenizer


@pytest.fixture(scope="module", params=[AS_IT_IS, COMPACT_CACHE], ids=["as-it-is", "two-engines-compact-cache"])
def flags(request: pytest.FixtureRequest) -> tuple[str, ...]:
    chosen: tuple[str, ...] = request.param
    return chosen


@pytest.fixture(scope="module")
def platform(
    taught_model: Path, manifest: Path, flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PlatformUnderTest]:
    log = tmp_path_factory.mktemp("deepseek") / "up.log"
    args = ("--model", str(taught_model), "--require-manifest", str(manifest), *flags)
    with PlatformUnderTest(*args, environ=os.environ, log_path=log) as platform:
        platform.wait_until_ready()
        yield platform


def connect(platform: PlatformUnderTest) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{platform.http}/v1", api_key=platform.api_key, max_retries=0, timeout=60)


@pytest.fixture
async def client(platform: PlatformUnderTest) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connect(platform) as client:
        yield client


@dataclass(frozen=True)
class Said:
    """An answer, whichever way it came."""

    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    """Name and arguments."""
    finish_reason: str | None


def taught(answer: Message) -> Said:
    calls = tuple((call.name, call.arguments) for call in answer.tool_calls)
    return Said(answer.content, answer.reasoning, calls, "tool_calls" if calls else "stop")


def as_openai(message: Message) -> ChatCompletionMessageParam:
    """How a client sends a message back, reasoning and all."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        fields["reasoning_content"] = message.reasoning
    if message.tool_calls:
        fields["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    return fields  # type: ignore[return-value]  # OpenAI's own types know no reasoning


def _call(call: ToolCall) -> dict[str, object]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def request_of(*messages: Message, thinking: bool = False, has_tools: bool = False) -> dict[str, Any]:
    request: dict[str, Any] = {
        "messages": [as_openai(message) for message in messages],
        "temperature": 0,
        "max_tokens": 200,
    }
    if thinking:
        request["extra_body"] = {"chat_template_kwargs": {"thinking": True}}
    if has_tools:
        request["tools"] = TOOLS
    return request


async def answer_of(client: openai.AsyncOpenAI, request: dict[str, Any]) -> tuple[Said, openai.types.CompletionUsage]:
    """Asked whole and as a stream, which must say the same."""
    whole = await client.chat.completions.create(model=MODEL, **request)
    stream = await client.chat.completions.create(
        model=MODEL, stream=True, stream_options={"include_usage": True}, **request
    )
    chunks = [chunk async for chunk in stream]
    (choice,) = whole.choices
    said = Said(
        choice.message.content or "",
        getattr(choice.message, "reasoning_content", ""),
        _calls_of(choice.message),
        choice.finish_reason,
    )
    assert _assembled(chunks) == said
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    return said, whole.usage


def _calls_of(message: ChatCompletionMessage) -> tuple[tuple[str, str], ...]:
    calls = [
        call for call in message.tool_calls or () if isinstance(call, ChatCompletionMessageFunctionToolCall) and call.id
    ]
    return tuple((call.function.name, call.function.arguments) for call in calls)


def _assembled(chunks: list[ChatCompletionChunk]) -> Said:
    content, reasoning, finish_reason = "", "", None
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", "")
        finish_reason = choice.finish_reason or finish_reason
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            if call.id:
                names[call.index] = call.function.name or ""
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    return Said(content, reasoning, tuple((names[index], arguments[index]) for index in sorted(names)), finish_reason)


async def test_it_is_listed_under_its_folders_name(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]


async def test_it_answers_without_thinking(client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    said, usage = await answer_of(client, request_of(QUESTION))
    assert said == taught(ANSWER)
    assert usage.completion_tokens == len(tokenizer.encode(ANSWER.content)) + 1, "and the end of the sequence"
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 0


async def test_what_it_thinks_is_told_from_what_it_answers(client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    said, usage = await answer_of(client, request_of(QUESTION, thinking=True))
    assert said == taught(THOUGHTFUL_ANSWER)
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == len(tokenizer.encode(THOUGHTFUL_ANSWER.reasoning))


@pytest.mark.parametrize("thinking", [False, True])
async def test_it_calls_a_tool(client: openai.AsyncOpenAI, thinking: bool) -> None:
    said, usage = await answer_of(client, request_of(ORDER, thinking=thinking, has_tools=True))
    assert said == taught(THOUGHTFUL_CALLING if thinking else CALLING)
    assert json.loads(said.calls[0][1]) == {"city": "Paris", "days": 3}
    assert usage.prompt_tokens > CONFIG.indexer.top_k, "attention chooses among these tokens"


async def test_the_tools_result_leads_to_the_answer(client: openai.AsyncOpenAI) -> None:
    said, _ = await answer_of(client, request_of(ORDER, THOUGHTFUL_CALLING, RESULT, thinking=True, has_tools=True))
    assert said == taught(LAST_ANSWER)


async def test_it_continues_raw_text(client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    for prompt in (TEXT, [CONFIG.bos_token_id, *tokenizer.encode(TEXT)]):
        completion = await client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=20)  # type: ignore[arg-type]
        assert completion.choices[0].text == CONTINUATION
        assert completion.choices[0].finish_reason == "stop"


async def test_it_thinks_over_grpc_too(platform: PlatformUnderTest) -> None:
    message = inference_pb2.ChatMessage(role="user", content=QUESTION.content)
    sampling = sampling_pb2.SamplingParams(temperature=0, max_tokens=40)
    options = inference_pb2.GenerationOptions(sampling=sampling)
    request = inference_pb2.ChatRequest(model=MODEL, messages=[message], thinking=True, options=options)
    metadata = (("authorization", f"Bearer {platform.api_key}"),)
    async with grpc.aio.insecure_channel(platform.grpc) as channel:
        events = [event async for event in inference_pb2_grpc.InferenceStub(channel).Chat(request, metadata=metadata)]
    assert "".join(event.delta.reasoning for event in events) == THOUGHTFUL_ANSWER.reasoning
    assert "".join(event.delta.text for event in events) == THOUGHTFUL_ANSWER.content
    assert events[-1].usage.reasoning_tokens > 0


@pytest.mark.parametrize("flags", [AS_IT_IS], indirect=True, ids=["as-it-is"])
async def test_the_mtp_layers_drafts_are_counted(client: openai.AsyncOpenAI, platform: PlatformUnderTest) -> None:
    await answer_of(client, request_of(QUESTION))
    metrics = platform.engine_metrics()
    num_drafts = metrics.total("rempart_engine_draft_tokens_total")
    assert 0 <= metrics.total("rempart_engine_accepted_draft_tokens_total") < num_drafts, "they are random"


async def test_speciale_always_thinks_and_refuses_tools(taught_model: Path, tmp_path: Path) -> None:
    name = "Tiny-DeepSeek-V3.2-Speciale"
    args = ("--model", str(taught_model), "--served-model-name", name, "--dtype", "fp8")
    with PlatformUnderTest(*args, environ=os.environ, log_path=tmp_path / "up.log") as platform:
        platform.wait_until_ready()
        async with connect(platform) as client:
            with pytest.raises(openai.BadRequestError, match="cannot call tools") as refused:
                await client.chat.completions.create(model=name, **request_of(ORDER, has_tools=True))
            assert refused.value.param == "tools"
            whole = await client.chat.completions.create(model=name, **request_of(QUESTION))
    assert whole.choices[0].message.content == THOUGHTFUL_ANSWER.content
