"""Batch jobs from the upload to the result file, over a real Redis, with lines whose answers are scripted."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.testing import BatchRig, request_line, right_texts
from rempart_platform.batch.values import BatchStatus, LineCounts
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.testing import own_redis

CONFIG = BatchConfig(lines_per_shard=4, lease_s=30.0, poll_s=0.02, max_lines_in_flight_per_tenant=3)


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as redis:
        yield redis


@pytest.fixture
def rig(redis: RedisClient, tmp_path: Path) -> BatchRig:
    return BatchRig(redis, tmp_path, CONFIG)


async def test_every_line_is_answered_once_and_in_order(rig: BatchRig) -> None:
    async with rig.working(), rig.working():
        batch = await rig.ended(await rig.submit([request_line(number) for number in range(10)]))
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.model, batch.counts) == ("fake", LineCounts(10, 10, 0))
    assert (batch.metadata, batch.errors, batch.error_file_id) == ({"for": "a test"}, (), "")
    assert await rig.texts(batch) == right_texts(range(10))
    assert list(await rig.texts(batch)) == [f"line-{number}" for number in range(10)]
    (first, *_) = await rig.results(batch, batch.output_file_id)
    assert first["id"].startswith("batch_req_")
    assert (first["response"]["status_code"], first["response"]["request_id"], first["error"]) == (200, "id-0", None)
    assert set(rig.runner.answered.values()) == {1}
    assert rig.runner.most_running <= 2 * CONFIG.max_lines_in_flight_per_tenant
    assert rig.metric("lines_total", outcome="completed") == 10
    assert rig.metric("tasks_held") == rig.metric("lines_in_flight") == 0
