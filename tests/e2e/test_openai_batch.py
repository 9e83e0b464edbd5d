"""A whole batch job, by the real `openai` client and the real model."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from rempart_platform.local.testing import PlatformUnderTest

pytestmark = pytest.mark.e2e

QUESTIONS = {
    "capital": "What is the capital of France?",
    "colour": "Name one colour.",
    "sum": "What is one and one?",
    "opposite": "What is the opposite of hot?",
    "animal": "Name one animal.",
}
FAULTY = "faulty"
_FILE = b'--limit\r\nContent-Disposition: form-data; name="file"; filename="in"\r\n\r\n' + b"{}\n" * 100_000
FORM_OF_ANOTHER_PURPOSE = (
    _FILE + b'\r\n--limit\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n--limit--\r\n'
)
FORM_WITHOUT_END = _FILE


@pytest.fixture
async def client(platform: PlatformUnderTest) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{platform.http}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=platform.api_key, max_retries=0, timeout=60) as client:
        yield client


def body(model: str, question: str) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 4,
    }


def line(custom_id: str, request: dict[str, Any]) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": request}) + "\n"


@pytest.fixture
def lines(model_name: str) -> bytes:
    """A question a line, and one line that the model cannot answer."""
    good = [line(name, body(model_name, question)) for name, question in QUESTIONS.items()]
    return "".join([*good, line(FAULTY, body(model_name, "Hello?") | {"temperature": -1})]).encode()


async def ended(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    async with asyncio.timeout(200):
        while batch.status in ("validating", "in_progress", "finalizing"):
            await asyncio.sleep(0.1)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def results(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    found = [json.loads(each) for each in (await client.files.content(file_id)).text.splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found), "each line once"
    return {each["custom_id"]: each for each in found}


async def test_a_whole_batch(client: openai.AsyncOpenAI, model_name: str, lines: bytes) -> None:
    uploaded = await client.files.create(file=("questions.jsonl", lines), purpose="batch")
    assert uploaded.bytes == len(lines)
    assert (await client.files.content(uploaded.id)).content == lines
    batch = await client.batches.create(
        input_file_id=uploaded.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"job": "test"},
    )
    batch = await ended(client, batch)
    assert (batch.status, batch.errors, batch.model, batch.metadata) == ("completed", None, model_name, {"job": "test"})
    assert batch.request_counts is not None
    counts = batch.request_counts
    assert (counts.completed, counts.failed, counts.total) == (len(QUESTIONS), 1, len(QUESTIONS) + 1)
    assert batch.created_at <= (batch.in_progress_at or 0) <= (batch.completed_at or 0) <= (batch.expires_at or 0)

    answers = await results(client, batch.output_file_id)
    assert answers.keys() == QUESTIONS.keys()
    for name, answer in answers.items():
        assert (answer["response"]["status_code"], answer["error"]) == (200, None)
        online = await client.chat.completions.create(**body(model_name, QUESTIONS[name]))
        assert answer["response"]["body"]["choices"][0]["message"]["content"] == online.choices[0].message.content
        assert answer["response"]["body"]["usage"]["completion_tokens"] > 0
    errors = await results(client, batch.error_file_id)
    assert errors.keys() == {FAULTY}
    assert errors[FAULTY]["response"]["status_code"] == 400
    assert errors[FAULTY]["response"]["body"]["error"]["param"] == "temperature"

    listed = [each.id async for each in client.batches.list()]
    assert listed[0] == batch.id
    output_ids = {each.id async for each in client.files.list(purpose="batch_output")}
    assert {batch.output_file_id, batch.error_file_id} <= output_ids
    with pytest.raises(openai.BadRequestError, match="has ended already"):
        await client.batches.cancel(batch.id)
    assert (await client.files.delete(uploaded.id)).deleted


async def test_an_input_that_is_no_batch_fails_with_its_lines(client: openai.AsyncOpenAI, model_name: str) -> None:
    twice = line("same", body(model_name, "Hello?")) * 2
    uploaded = await client.files.create(file=("twice.jsonl", twice.encode()), purpose="batch")
    batch = await client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    batch = await ended(client, batch)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [each.line for each in batch.errors.data or []] == [2]


@pytest.mark.parametrize("form", [FORM_OF_ANOTHER_PURPOSE, FORM_WITHOUT_END])
async def test_nothing_is_kept_of_an_upload_that_is_refused_at_its_end(
    platform: PlatformUnderTest, client: openai.AsyncOpenAI, form: bytes
) -> None:
    before = [each.id async for each in client.files.list()]
    headers = {
        "authorization": f"Bearer {platform.api_key}",
        "content-type": "multipart/form-data; boundary=limit",
    }
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{platform.http}/v1/files", content=form, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert [each.id async for each in client.files.list()] == before


async def test_another_tenant_sees_none_of_it(platform: PlatformUnderTest, client: openai.AsyncOpenAI) -> None:
    platform.cli("tenant", "create", "batch-stranger")
    key = json.loads(platform.cli("key", "issue", "batch-stranger", "--json").stdout)["key"]
    uploaded = await client.files.create(file=("mine.jsonl", b"{}\n"), purpose="batch")
    stranger = client.with_options(api_key=key)
    assert [each.id async for each in stranger.files.list()] == []
    for call in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
        with pytest.raises(openai.NotFoundError):
            await call(uploaded.id)
    with pytest.raises(openai.NotFoundError):
        await stranger.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    await client.files.delete(uploaded.id)


async def test_the_command_line_runs_a_batch(platform: PlatformUnderTest, lines: bytes, tmp_path: Path) -> None:
    requests = tmp_path / "questions.jsonl"
    requests.write_bytes(lines)
    ran = platform.cli("batch", "run", str(requests), "--poll-s", "0.1", "--json")
    assert ran.returncode == 1, "one line is faulty"
    batch = json.loads(ran.stdout)
    assert (batch["status"], batch["completed"], batch["failed"]) == ("completed", len(QUESTIONS), 1)
    answers = requests.with_name("questions.output.jsonl").read_text().splitlines()
    assert {json.loads(each)["custom_id"] for each in answers} == QUESTIONS.keys()
    (error,) = requests.with_name("questions.errors.jsonl").read_text().splitlines()
    assert json.loads(error)["custom_id"] == FAULTY


async def test_an_online_answer_says_what_is_left_of_the_quota(
    platform: PlatformUnderTest, client: openai.AsyncOpenAI, model_name: str
) -> None:
    platform.cli("tenant", "create", "counted", "--requests-per-minute", "5", "--tokens-per-minute", "10000")
    key = json.loads(platform.cli("key", "issue", "counted", "--json").stdout)["key"]
    counted = client.with_options(api_key=key)

    async def headers() -> dict[str, str]:
        request = body(model_name, "Hello?")
        answer = await counted.chat.completions.with_raw_response.create(**request)
        return {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit-")}

    seen = [await headers() for _ in range(2)]
    for name in ("limit", "remaining", "reset"):
        for of in ("requests", "tokens"):
            assert all(f"x-ratelimit-{name}-{of}" in each for each in seen)
    assert [each["x-ratelimit-limit-requests"] for each in seen] == ["5", "5"]
    assert [each["x-ratelimit-limit-tokens"] for each in seen] == ["10000", "10000"]
    assert [each["x-ratelimit-remaining-requests"] for each in seen] == ["4", "3"]
    left = [int(each["x-ratelimit-remaining-tokens"]) for each in seen]
    assert 10_000 > left[0] > left[1] > 9_000
