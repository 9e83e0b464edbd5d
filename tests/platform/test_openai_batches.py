"""apis/openai_batches.py, as the `openai` client and plain HTTP clients see it, over a real server."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch
from openai.types.batch import Errors
from openai.types.batch_error import BatchError
from openai.types.batch_request_counts import BatchRequestCounts

from rempart_platform.apis.batch_testing import NOW_S, FakeBatches, FakeFiles, batch_services
from rempart_platform.apis.testing import CALLER, KEY, OTHER_KEY, serve_http
from rempart_platform.batch.values import BatchLimits, BatchStatus, InputError, LineCounts

CHAT: Final = "/v1/chat/completions"


class Rig:
    """Two tenants' clients of one server, and what lies behind it."""

    def __init__(self, client: AsyncOpenAI, other: AsyncOpenAI, plain: httpx.AsyncClient, batches: FakeBatches) -> None:
        self.client = client
        self.other = other
        self.plain = plain
        self.batches = batches
        self.input_file_id = ""

    async def create(self, **metadata: str) -> Batch:
        return await self.client.batches.create(
            input_file_id=self.input_file_id, endpoint=CHAT, completion_window="24h", metadata=metadata
        )


@asynccontextmanager
async def rig(limits: BatchLimits | None = None) -> AsyncIterator[Rig]:
    files = FakeFiles()
    batches = FakeBatches(files)
    async with (
        serve_http(batch_services(files, batches, limits=limits)) as url,
        openai.DefaultAsyncHttpxClient(verify=False) as transport,  # plain HTTP: certificates only take time to load
        httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {KEY}"}, verify=False) as plain,
        AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60, http_client=transport) as client,
    ):
        made = Rig(client, client.with_options(api_key=OTHER_KEY), plain, batches)
        made.input_file_id = files.add(CALLER.tenant, b"{}\n").file_id
        yield made


async def test_a_batch_is_made_for_its_caller() -> None:
    async with rig() as it:
        raw = await it.client.batches.with_raw_response.create(
            input_file_id=it.input_file_id, endpoint=CHAT, completion_window="24h", metadata={"job": "nightly"}
        )
        created = raw.parse()
        assert json.loads(raw.text).keys() == Batch.model_fields.keys(), "OpenAI's fields and no other"
        kept = it.batches.kept[created.id]
        assert (kept.caller, kept.completion_window_s) == (CALLER, 24 * 3600)
        assert created == Batch(
            id=created.id,
            completion_window="24h",
            created_at=kept.created_s,
            endpoint=CHAT,
            input_file_id=it.input_file_id,
            object="batch",
            status="validating",
            expires_at=kept.created_s + 24 * 3600,
            metadata={"job": "nightly"},
            request_counts=BatchRequestCounts(completed=0, failed=0, total=0),
        )
        assert await it.client.batches.retrieve(created.id) == created
        assert (await it.create()).metadata is None


async def test_all_that_a_batch_has_come_to_is_told() -> None:
    async with rig() as it:
        batch_id = (await it.create()).id
        times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        it.batches.change(
            batch_id,
            status=BatchStatus.COMPLETED,
            model="tiny",
            counts=LineCounts(10, 7, 3),
            output_file_id="file-o",
            error_file_id="file-e",
            errors=(InputError("invalid_json_line", "No JSON.", "body", 3), InputError("empty_file", "Empty.")),
            **{f"{name}_s": NOW_S + number for number, name in enumerate(times)},
        )
        batch = await it.client.batches.retrieve(batch_id)
    assert (batch.status, batch.model, batch.output_file_id, batch.error_file_id) == (
        "completed",
        "tiny",
        "file-o",
        "file-e",
    )
    assert batch.request_counts == BatchRequestCounts(completed=7, failed=3, total=10)
    assert [getattr(batch, f"{name}_at") for name in times] == [NOW_S + number for number in range(7)]
    assert batch.errors == Errors(
        object="list",
        data=[
            BatchError(code="invalid_json_line", line=3, message="No JSON.", param="body"),
            BatchError(code="empty_file", message="Empty."),
        ],
    )


@pytest.mark.parametrize("status", list(BatchStatus))
async def test_every_status_is_one_of_openais(status: BatchStatus) -> None:
    async with rig() as it:
        batch_id = (await it.create()).id
        it.batches.change(batch_id, status=status)
        Batch.model_validate(json.loads((await it.plain.get(f"/v1/batches/{batch_id}")).text), strict=True)


async def test_lists_come_in_pages_newest_first() -> None:
    async with rig() as it:
        ids = [(await it.create()).id for _ in range(25)][::-1]
        assert [batch.id async for batch in it.client.batches.list()] == ids, "the client asks for all pages"
        first = await it.client.batches.list()
        assert ([batch.id for batch in first.data], first.has_more) == (ids[:20], True)
        rest = await it.client.batches.list(limit=10, after=ids[19])
        assert ([batch.id for batch in rest.data], rest.has_more) == (ids[20:], False)
        assert [batch.id async for batch in it.other.batches.list()] == []
        for limit in (0, 101):
            with pytest.raises(openai.BadRequestError, match="between 1 and 100"):
                await it.client.batches.list(limit=limit)
        with pytest.raises(openai.BadRequestError) as refused:
            await it.client.batches.list(after="batch_gone")
    assert refused.value.param == "after"


async def test_a_batch_is_cancelled_once_it_runs_and_not_when_it_has_ended() -> None:
    async with rig() as it:
        batch_id = (await it.create()).id
        cancelled = await it.client.batches.cancel(batch_id)
        assert (cancelled.status, cancelled.cancelling_at) == ("cancelling", NOW_S)
        it.batches.change(batch_id, status=BatchStatus.CANCELLED)
        with pytest.raises(openai.BadRequestError, match="has ended"):
            await it.client.batches.cancel(batch_id)


async def test_another_tenants_batch_and_file_are_not_there() -> None:
    async with rig() as it:
        batch_id = (await it.create()).id
        for each in (batch_id, "batch_unknown", "batch_" + "A" * 32):
            for call in (it.other.batches.retrieve, it.other.batches.cancel):
                with pytest.raises(openai.NotFoundError) as missing:
                    await call(each)
                assert missing.value.code == "not_found"
        with pytest.raises(openai.NotFoundError):
            await it.other.batches.create(input_file_id=it.input_file_id, endpoint=CHAT, completion_window="24h")
    assert it.batches.kept[batch_id].status is BatchStatus.VALIDATING
    assert len(it.batches.kept) == 1


@pytest.mark.parametrize(("window", "seconds"), [("1h", 3600), ("24h", 86_400), ("48h", 172_800)])
async def test_a_window_is_a_number_of_hours(window: str, seconds: int) -> None:
    async with rig(BatchLimits(max_completion_window_s=172_800)) as it:
        body = {"input_file_id": it.input_file_id, "endpoint": "/v1/completions", "completion_window": window}
        answer = await it.plain.post("/v1/batches", json=body)
        (batch,) = it.batches.kept.values()
    assert (batch.completion_window_s, answer.json()["completion_window"]) == (seconds, window)


TOO_MANY = {str(number): "" for number in range(17)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"completion_window": "49h"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "1d"}, "completion_window"),
        ({"completion_window": "24"}, "completion_window"),
        ({"completion_window": "٢٤h"}, "completion_window"),
        ({"completion_window": "9" * 5000 + "h"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": 5}, "endpoint"),
        ({"metadata": TOO_MANY}, "metadata"),
        ({"metadata": {"": "x"}}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata"),
        ({"metadata": {"k": 5}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 2592001}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after"),
    ],
)
async def test_a_field_at_fault_is_named(fields: dict[str, object], param: str) -> None:
    async with rig(BatchLimits(max_completion_window_s=172_800)) as it:
        body = {"input_file_id": it.input_file_id, "endpoint": CHAT, "completion_window": "24h", **fields}
        refused = await it.plain.post("/v1/batches", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert it.batches.kept == {}


@pytest.mark.parametrize(("most_s", "said"), [(172_800, "'48h'"), (7200, "'2h'")])
async def test_a_window_that_is_refused_names_those_that_are_not(most_s: int, said: str) -> None:
    async with rig(BatchLimits(max_completion_window_s=most_s)) as it:
        body = {"input_file_id": it.input_file_id, "endpoint": CHAT, "completion_window": "49h"}
        message = (await it.plain.post("/v1/batches", json=body)).json()["error"]["message"]
    assert said in message
    assert "24h" not in message


async def test_results_may_have_an_end_of_their_own() -> None:
    async with rig() as it:
        made = await it.client.batches.create(
            input_file_id=it.input_file_id,
            endpoint=CHAT,
            completion_window="24h",
            output_expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert it.batches.kept[made.id].output_lifetime_s == 3600
        assert it.batches.kept[(await it.create()).id].output_lifetime_s is None


async def test_metadata_at_its_limits_is_kept() -> None:
    metadata = {f"{number:02}" + "k" * 62: "v" * 512 for number in range(16)}
    async with rig() as it:
        assert (await it.create(**metadata)).metadata == metadata


async def test_a_method_that_is_not_allowed_says_which_are() -> None:
    async with rig() as it:
        refused = await it.plain.delete("/v1/batches")
    assert (refused.status_code, set(refused.headers["allow"].split(", "))) == (405, {"GET", "HEAD", "POST"})
