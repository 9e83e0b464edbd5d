"""Batch jobs from the upload to the result file, over a real Redis, with lines whose answers are scripted."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.lanes import Lanes
from rempart_platform.batch.metrics import BatchMetrics
from rempart_platform.batch.testing import (
    CALLER,
    ENDPOINT,
    BatchRig,
    ScriptedRunner,
    in_pieces,
    request_line,
    right_texts,
)
from rempart_platform.batch.values import BatchLimits, BatchStatus, LineCounts
from rempart_platform.batch.work_queue import WorkQueue
from rempart_platform.errors import EngineLostError, ErrorKind, RempartError
from rempart_platform.generation import Caller
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.testing import own_redis

CONFIG = BatchConfig(
    lines_per_shard=4,
    lease_s=3600.0,
    poll_s=0.02,
    max_lines_in_flight=8,
    max_lines_in_flight_per_tenant=3,
    limits=BatchLimits(max_open_batches_per_tenant=2),
)


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
    assert batch.in_progress_s == batch.finalizing_s == batch.completed_s == 1_000_000
    assert list(await rig.texts(batch)) == [f"line-{number}" for number in range(10)]
    assert await rig.texts(batch) == right_texts(range(10))
    (first, *_) = await rig.results(batch, batch.output_file_id)
    assert first["id"].startswith("batch_req_")
    assert (first["response"]["status_code"], first["response"]["request_id"], first["error"]) == (200, "id-0", None)
    assert set(rig.runner.answered.values()) == {1}
    assert rig.runner.most_running <= 2 * CONFIG.max_lines_in_flight_per_tenant
    assert rig.metric("lines_total", outcome="completed") == 10
    assert rig.metric("tasks_total", kind="shard", outcome="done") == 3
    assert rig.metric("tasks_held") == rig.metric("lines_in_flight") == 0


async def test_a_bad_input_fails_the_batch_and_says_why(rig: BatchRig) -> None:
    async with rig.working():
        batch = await rig.ended(await rig.submit([request_line(1), request_line(1)]))
        other = await rig.ended(await rig.submit([request_line(1)]))  # the place is free again
    assert (batch.status, batch.failed_s) == (BatchStatus.FAILED, 1_000_000)
    ((code, line),) = [(error.code, error.line) for error in batch.errors]
    assert (code, line) == ("duplicate_custom_id", 2)
    assert (batch.counts, batch.output_file_id, batch.error_file_id) == (LineCounts(), "", "")
    assert other.status is BatchStatus.COMPLETED


async def test_lines_that_are_refused_go_to_the_error_file(rig: BatchRig) -> None:
    rig.runner.scripts["2"] = [RempartError(ErrorKind.CONTEXT_LENGTH_EXCEEDED, "too long")]
    rig.runner.scripts["4"] = [RempartError(ErrorKind.INVALID_API_KEY, "revoked")]
    async with rig.working():
        batch = await rig.ended(await rig.submit([request_line(number) for number in range(6)]))
    assert (batch.status, batch.counts) == (BatchStatus.COMPLETED, LineCounts(6, 4, 2))
    assert await rig.texts(batch) == right_texts([0, 1, 3, 5])
    assert await rig.errors(batch) == {"line-2": "400", "line-4": "401"}
    assert set(rig.runner.attempts.values()) == {1}


async def test_a_batch_without_any_success_has_no_output_file(rig: BatchRig) -> None:
    rig.runner.scripts["1"] = [RempartError(ErrorKind.INVALID_REQUEST, "no")]
    async with rig.working():
        batch = await rig.ended(await rig.submit([request_line(1)]))
    assert (batch.status, batch.output_file_id) == (BatchStatus.COMPLETED, "")
    assert await rig.errors(batch) == {"line-1": "400"}


async def test_quotas_and_missing_engines_are_waited_out_for_the_time_they_name(rig: BatchRig) -> None:
    full = RempartError(ErrorKind.RATE_LIMIT_EXCEEDED, "full", retry_after_s=0.02)
    away = RempartError(ErrorKind.UNAVAILABLE, "away", retry_after_s=0.01)
    rig.runner.scripts["0"] = [full] * 5 + [away] * 5
    async with rig.working():
        batch = await rig.ended(await rig.submit([request_line(number) for number in range(5)]))
    assert (batch.counts, rig.runner.attempts["0"]) == (LineCounts(5, 5, 0), 11)
    assert rig.metric("line_retries_total", code="rate_limit_exceeded") == 5
    assert rig.metric("line_retries_total", code="service_unavailable") == 5


async def test_a_line_that_fails_again_and_again_is_answered_with_its_error(rig: BatchRig) -> None:
    rig.runner.scripts["0"] = [RempartError(ErrorKind.INTERNAL, "broken", retry_after_s=0.0)] * 9
    rig.runner.scripts["1"] = [RempartError(ErrorKind.INTERNAL, "broken", retry_after_s=0.0)] * 2
    async with rig.working():
        batch = await rig.ended(await rig.submit([request_line(number) for number in range(2)]))
    assert await rig.errors(batch) == {"line-0": "500"}
    assert rig.runner.attempts == {"0": CONFIG.max_line_attempts, "1": CONFIG.max_line_attempts}


async def test_a_line_under_which_engines_are_lost_again_and_again_is_given_no_more_of_them(rig: BatchRig) -> None:
    lost = EngineLostError(ErrorKind.UNAVAILABLE, "lost", retry_after_s=0.0)
    rig.runner.scripts["0"] = [lost] * 99
    rig.runner.scripts["1"] = [lost] * (CONFIG.max_engine_losses - 1)
    async with rig.working():
        batch = await rig.ended(await rig.submit([request_line(number) for number in range(2)]))
    assert await rig.errors(batch) == {"line-0": "503"}
    assert await rig.texts(batch) == right_texts([1])
    assert rig.runner.attempts == {"0": CONFIG.max_engine_losses, "1": CONFIG.max_engine_losses}


async def test_a_cancelled_batch_keeps_what_was_answered(redis: RedisClient, tmp_path: Path) -> None:
    rig = BatchRig(redis, tmp_path, replace(CONFIG, lease_s=3.0))  # at every third of it, workers hear what is new
    rig.runner.held |= {"2", "3"}
    async with rig.working():
        batch = await rig.submit([request_line(number) for number in range(9)])
        await rig.answered(batch, 3)  # two of the first shard, and of the second what has the third place
        assert (await rig.batches.cancel("acme", batch.batch_id)).status is BatchStatus.CANCELLING
        batch = await rig.ended(batch)
    assert (batch.status, batch.cancelling_s, batch.cancelled_s) == (BatchStatus.CANCELLED, 1_000_000, 1_000_000)
    texts, errors = await rig.texts(batch), await rig.errors(batch)
    assert {"line-2", "line-3"} <= set(errors)
    assert set(errors.values()) == {"batch_cancelled"}
    assert len(texts) + len(errors) == 9
    assert texts == right_texts([int(name.removeprefix("line-")) for name in texts])
    assert {"line-0", "line-1"} <= set(texts)
    assert batch.counts == LineCounts(9, len(texts), len(errors))
    with pytest.raises(RempartError, match="it is cancelled"):
        await rig.batches.cancel("acme", batch.batch_id)


async def test_a_batch_that_is_cancelled_before_it_begins_has_no_files(rig: BatchRig) -> None:
    batch = await rig.submit([request_line(1)])
    await rig.batches.cancel("acme", batch.batch_id)
    async with rig.working():
        batch = await rig.ended(batch)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == (BatchStatus.CANCELLED, "", "")
    assert rig.runner.attempts.total() == 0


async def test_a_batch_whose_time_is_up_keeps_what_was_answered(rig: BatchRig) -> None:
    rig.runner.held |= {"1"}
    async with rig.working():
        batch = await rig.submit([request_line(number) for number in range(4)], window_s=3)
        batch = await rig.ended(batch)
    assert (batch.status, batch.counts) == (BatchStatus.EXPIRED, LineCounts(4, 3, 1))
    assert await rig.texts(batch) == right_texts([0, 2, 3])
    assert await rig.errors(batch) == {"line-1": "batch_expired"}
    assert rig.runner.num_running == 0


async def test_a_batch_that_nobody_had_time_for_expires(rig: BatchRig) -> None:
    batch = await rig.submit([request_line(number) for number in range(6)], window_s=60)
    rig.now_s += 61
    async with rig.working():
        batch = await rig.ended(batch)
    assert (batch.status, batch.counts) == (BatchStatus.EXPIRED, LineCounts(6, 0, 6))
    assert set((await rig.errors(batch)).values()) == {"batch_expired"}
    assert rig.runner.attempts.total() == 0


async def test_a_tenant_that_waits_for_its_quota_holds_up_no_other(redis: RedisClient, tmp_path: Path) -> None:
    rig = BatchRig(redis, tmp_path, replace(CONFIG, max_lines_in_flight=1))
    spent = RempartError(ErrorKind.RATE_LIMIT_EXCEEDED, "spent", retry_after_s=3600.0)
    for number in range(40):
        rig.runner.scripts[str(number)] = [spent]
    async with rig.working():
        waiting = await rig.submit([request_line(number) for number in range(40)])
        await rig.runner.wait_until(CONFIG.max_lines_in_flight_per_tenant)
        other = await rig.submit(
            [request_line(number) for number in range(100, 110)], caller=Caller("globex", CALLER.key_id)
        )
        other = await rig.ended(other)
        assert other.counts == LineCounts(10, 10, 0)
        assert rig.runner.most_running == 1
        # What its places do not hold is not even tried, and no further shard is taken.
        assert sum(rig.runner.attempts[str(number)] for number in range(40)) == CONFIG.max_lines_in_flight_per_tenant
        assert (await rig.reload(waiting)).counts.completed == 0
    assert rig.metric("tasks_total", kind="shard", outcome="released") == 1


async def test_tenants_take_turns(redis: RedisClient, tmp_path: Path) -> None:
    config = replace(CONFIG, lines_per_shard=1, max_lines_in_flight=1, max_lines_in_flight_per_tenant=1)
    rig = BatchRig(redis, tmp_path, config)
    many = await rig.submit([request_line(number) for number in range(30)])
    few = await rig.submit([request_line(100 + number) for number in range(3)], caller=Caller("globex", CALLER.key_id))
    async with rig.working():
        await rig.ended(few)
        await rig.ended(many)
    order = list(rig.runner.answered)
    assert max(order.index(str(100 + number)) for number in range(3)) < 15


async def test_work_is_found_however_many_tenants_have_none(rig: BatchRig) -> None:
    """One call of Redis looks at few tenants: those whose jobs are all in other hands must not hide the rest."""
    queue = WorkQueue(rig.redis, CONFIG, "another", rig.clock)
    for number in range(40):
        await rig.submit([request_line(1)], caller=Caller(f"busy-{number}", CALLER.key_id))
        assert await queue.claim(()) is not None
    batch = await rig.submit([request_line(1)])
    claim = await queue.claim(())
    assert claim is not None
    assert claim.job_id == batch.batch_id
    assert await queue.claim(()) is None
    await rig.submit([request_line(1)])
    assert await queue.claim(("acme ",)) is None  # a tenant of which the worker wants no more
    assert await queue.claim(("acme another-model",)) is not None


async def test_work_is_found_however_many_older_jobs_of_its_tenant_have_none(
    redis: RedisClient, tmp_path: Path
) -> None:
    rig = BatchRig(redis, tmp_path, replace(CONFIG, limits=BatchLimits()))
    queue = WorkQueue(redis, rig.config, "another", rig.clock)
    for _ in range(20):
        batch = await rig.submit([request_line(1)])
        claim = await queue.claim(())
        assert claim is not None
        assert claim.job_id == batch.batch_id
    assert await queue.claim(()) is None


async def test_a_router_takes_no_more_shards_than_it_may_hold(redis: RedisClient, tmp_path: Path) -> None:
    rig = BatchRig(redis, tmp_path, replace(CONFIG, lines_per_shard=1, max_shards=2))
    rig.runner.held |= {"0"}
    tenants = ("acme", "globex", "initech")
    async with rig.working():
        batches = [await rig.submit([request_line(0)], caller=Caller(name, CALLER.key_id)) for name in tenants]
        await rig.runner.wait_until(2)
        assert rig.metric("tasks_held") == 2
        rig.runner.released.set()
        for batch in batches:
            assert (await rig.ended(batch)).counts == LineCounts(1, 1, 0)
    assert rig.runner.most_running == 2


async def test_the_models_of_a_tenant_share_its_places_and_not_each_others_waits() -> None:
    metrics, room = BatchMetrics(CollectorRegistry()), asyncio.Event()
    lanes = Lanes(CONFIG, metrics, room.set)
    with lanes.task("acme", "one") as one, lanes.task("acme", "two") as two:
        assert lanes.full() == ["acme one", "acme two"]  # nobody knows yet how many lines they have
        one.opened(3)
        two.opened(2)
        assert lanes.full() == ["acme one"]
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(one.line())
                await stack.enter_async_context(one.in_flight())
            room.clear()
            async with two.line(), two.in_flight():
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01), one.in_flight():
                        pass
            assert room.is_set()
            async with one.in_flight():
                pass
        assert lanes.full() == []
    with lanes.task("globex", "one") as other:
        other.opened(1)
        assert lanes.full() == []


async def test_a_tenant_may_have_as_many_open_batches_and_no_more(rig: BatchRig) -> None:
    for _ in range(2):
        await rig.submit([request_line(1)])
    with pytest.raises(RempartError, match="max_open_batches_per_tenant") as caught:
        await rig.submit([request_line(1)])
    assert caught.value.kind is ErrorKind.RATE_LIMIT_EXCEEDED
    await rig.submit([request_line(1)], caller=Caller("globex", CALLER.key_id))


async def test_the_oldest_batches_are_forgotten_when_there_are_too_many(redis: RedisClient, tmp_path: Path) -> None:
    limits = replace(CONFIG.limits, max_open_batches_per_tenant=2, max_batches_per_tenant=3)
    rig = BatchRig(redis, tmp_path, replace(CONFIG, limits=limits))
    rig.runner.held = {"1"}
    running = await rig.submit([request_line(1)], window_s=3 * 3600)
    async with rig.working():
        ended = [await rig.ended(await rig.submit([request_line(2)])) for _ in range(2)]
    with pytest.raises(RempartError, match="max_batches_per_tenant") as caught:
        await rig.submit([request_line(1)])
    assert caught.value.kind is ErrorKind.RATE_LIMIT_EXCEEDED
    await rig.submit([request_line(1)], caller=Caller("globex", CALLER.key_id))
    rig.now_s += CONFIG.keep_parts_s + 1
    await rig.janitor().clean()
    last = await rig.submit([request_line(1)])
    kept, _ = await rig.batches.list("acme", limit=9)
    assert [each.batch_id for each in kept] == [each.batch_id for each in (last, ended[1], running)]
    assert await rig.texts(ended[0]) == right_texts([2]), "results stay"


async def test_batches_are_listed_newest_first_and_seen_by_their_tenant_alone(rig: BatchRig) -> None:
    first, second = [await rig.submit([request_line(1)]) for _ in range(2)]
    assert await rig.batches.list("acme", limit=2) == ((second, first), False)
    assert await rig.batches.list("acme", limit=1) == ((second,), True)
    assert await rig.batches.list("acme", limit=1, after=second.batch_id) == ((first,), False)
    with pytest.raises(RempartError, match="'after'"):
        await rig.batches.list("globex", limit=1, after=second.batch_id)
    assert await rig.batches.get("acme", first.batch_id) == first
    assert await rig.batches.list("globex", limit=2) == ((), False)
    for call in (rig.batches.get, rig.batches.cancel):
        with pytest.raises(RempartError, match="no such batch"):
            await call("globex", first.batch_id)


async def test_a_file_that_is_no_input_is_refused(rig: BatchRig) -> None:
    foreign = await rig.upload(b"x", "globex")
    expired = (await rig.files.create("acme", "x", "batch", in_pieces(b"x"), lifetime_s=lambda: 1)).file_id
    result = (await rig.files.create("acme", "x", "batch_output", in_pieces(b"x"))).file_id
    rig.now_s += 2
    for file_id, kind in (
        (foreign, ErrorKind.NOT_FOUND),
        (expired, ErrorKind.NOT_FOUND),
        ("file-none", ErrorKind.NOT_FOUND),
        (result, ErrorKind.INVALID_REQUEST),
    ):
        with pytest.raises(RempartError) as caught:
            await rig.batches.create(
                CALLER, input_file_id=file_id, endpoint=ENDPOINT, completion_window_s=60, metadata={}
            )
        assert (caught.value.kind, caught.value.param) == (kind, "input_file_id")


async def test_a_window_that_is_too_long_is_refused(rig: BatchRig) -> None:
    with pytest.raises(RempartError, match="max_completion_window_s"):
        await rig.submit([request_line(1)], window_s=CONFIG.limits.max_completion_window_s + 1)


async def test_an_input_that_is_gone_fails_the_batch(rig: BatchRig) -> None:
    batch = await rig.submit([request_line(1)])
    await rig.storage.delete(f"files/acme/{batch.input_file_id}")
    async with rig.working():
        batch = await rig.ended(batch)
    assert (batch.status, [error.code for error in batch.errors]) == (BatchStatus.FAILED, ["input_file_missing"])


async def test_a_worker_that_stops_gives_its_shard_back_at_once(redis: RedisClient, tmp_path: Path) -> None:
    rig = BatchRig(redis, tmp_path, CONFIG)
    rig.runner.held |= {"3"}
    async with rig.working():
        batch = await rig.submit([request_line(number) for number in range(4)])
        await rig.answered(batch, 3)
    second = ScriptedRunner()
    async with rig.working(second):
        batch = await rig.ended(batch)
    assert (batch.counts, await rig.texts(batch)) == (LineCounts(4, 4, 0), right_texts(range(4)))
    assert second.attempts == {"3": 1}  # what was answered is not asked again
