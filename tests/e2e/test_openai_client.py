"""The real `openai` client against the real model."""

from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from rempart_platform.local.testing import PlatformUnderTest

pytestmark = pytest.mark.e2e

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture
async def client(platform: PlatformUnderTest) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{platform.http}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=platform.api_key, max_retries=0, timeout=60) as client:
        yield client


async def test_a_stream_says_what_the_whole_answer_says(client: openai.AsyncOpenAI, model_name: str) -> None:
    whole = await client.chat.completions.create(model=model_name, messages=MESSAGES, temperature=0, max_tokens=12)
    stream = await client.chat.completions.create(
        model=model_name,
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    *parts, last = chunks
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens > 0
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens > 0
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert all(part.usage is None for part in parts)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_max_tokens_ends_an_answer_for_its_length(client: openai.AsyncOpenAI, model_name: str) -> None:
    answer = await client.chat.completions.create(model=model_name, messages=MESSAGES, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


async def test_logprobs_come_with_alternatives(client: openai.AsyncOpenAI, model_name: str) -> None:
    answer = await client.chat.completions.create(
        model=model_name, messages=MESSAGES, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content
    assert tokens is not None
    assert len(tokens) == 4
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token, "greedy takes the likeliest"
        assert 0 >= token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob >= token.top_logprobs[2].logprob


async def test_a_stop_string_ends_the_text_before_it(client: openai.AsyncOpenAI, model_name: str) -> None:
    prompt = "one, two, three, four, five, six,"
    free = await client.completions.create(model=model_name, prompt=prompt, temperature=0, max_tokens=16)
    text = free.choices[0].text
    stop = text[len(text) // 2 - 2 : len(text) // 2 + 2]
    stopped = await client.completions.create(
        model=model_name, prompt=prompt, temperature=0, max_tokens=16, stop=[stop, "never said"]
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


async def test_two_choices_and_a_seed(client: openai.AsyncOpenAI, model_name: str) -> None:
    async def texts() -> list[str | None]:
        answer = await client.chat.completions.create(
            model=model_name, messages=MESSAGES, temperature=1, seed=7, n=2, max_tokens=8
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 16
        return [choice.message.content for choice in answer.choices]

    first = await texts()
    assert first[0] != first[1]
    assert await texts() == first, "the same seed says the same"


async def test_completions_stream_and_do_not(client: openai.AsyncOpenAI, model_name: str) -> None:
    prompt = "The capital of France is"
    whole = await client.completions.create(model=model_name, prompt=prompt, temperature=0, max_tokens=4)
    assert "Paris" in whole.choices[0].text
    stream = await client.completions.create(model=model_name, prompt=prompt, temperature=0, max_tokens=4, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


async def test_models_are_listed(client: openai.AsyncOpenAI, model_name: str) -> None:
    assert [model.id async for model in client.models.list()] == [model_name]
    assert (await client.models.retrieve(model_name)).id == model_name


async def test_a_wrong_key_is_refused(client: openai.AsyncOpenAI, model_name: str) -> None:
    stranger = client.with_options(api_key="rk_wrong")
    with pytest.raises(openai.AuthenticationError) as refused:
        await stranger.chat.completions.create(model=model_name, messages=MESSAGES)
    assert refused.value.code == "invalid_api_key"


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    assert missing.value.code == "model_not_found"


async def test_a_prompt_that_is_too_long_is_a_bad_request(client: openai.AsyncOpenAI, model_name: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model=model_name, messages=[{"role": "user", "content": "word " * 10_000}])
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"model": 5}', b"\xff\xfe", b'{"model": "m", "messages": "hello", "max_tokens": -1}']
)
async def test_a_malformed_body_is_a_bad_request(platform: PlatformUnderTest, body: bytes) -> None:
    headers = {"authorization": f"Bearer {platform.api_key}", "content-type": "application/json"}
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{platform.http}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
