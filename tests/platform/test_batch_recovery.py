"""What becomes of batch jobs when workers stall or die, when Redis forgets, and when a line kills whoever runs it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.input_check import check_input
from rempart_platform.batch.jobs import Job, load_job
from rempart_platform.batch.plan import Plan
from rempart_platform.batch.result_lines import Outcome, ResultLine, Tally, join_results, split_results
from rempart_platform.batch.storage import (
    BatchStorage,
    MissingObjectError,
    answer_path,
    file_path,
    job_prefix,
    plan_path,
    shard_path,
)
from rempart_platform.batch.testing import (
    ENDPOINT,
    BatchRig,
    ScriptedRunner,
    as_input,
    in_pieces,
    request_line,
    right_texts,
)
from rempart_platform.batch.values import Batch, BatchStatus, LineAnswer, LineCounts
from rempart_platform.batch.work_queue import FINALIZE, VALIDATE, Claim, Interruption, WorkQueue
from rempart_platform.batch.workers import open_worker
from rempart_platform.object_store import open_object_store
from rempart_platform.tenancy.batch_keys import DEAD_TASKS, OPEN_JOBS, UPLOADS, lines_of, work_of
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.testing import own_redis

CONFIG = BatchConfig(lines_per_shard=4, lease_s=3600.0, poll_s=0.02, max_deliveries=3, keep_parts_s=100.0)
"""A lease ends when a test says so."""


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as redis:
        yield redis


@pytest.fixture
def rig(redis: RedisClient, tmp_path: Path) -> BatchRig:
    return BatchRig(redis, tmp_path, CONFIG)


def queue_of(rig: BatchRig, worker: str) -> WorkQueue:
    return WorkQueue(rig.redis, rig.config, worker, rig.clock)


async def claimed(queue: WorkQueue) -> Claim:
    """As a worker that has heard of it."""
    claim = await given_out(queue)
    assert await queue.begin(claim)
    return claim


async def given_out(queue: WorkQueue) -> Claim:
    claim = await queue.claim(())
    assert claim is not None
    return claim


async def ended_in_spite_of_deaths(rig: BatchRig, batch: Batch) -> Batch:
    ending_leases = asyncio.create_task(rig.end_leases_of_the_dead(batch))
    try:
        return await rig.ended(batch)
    finally:
        ending_leases.cancel()
        await asyncio.wait([ending_leases])


async def started(rig: BatchRig, num_lines: int) -> Batch:
    """A batch whose input is valid."""
    lines = [request_line(number) for number in range(num_lines)]
    batch = await rig.submit(lines)
    queue = queue_of(rig, "validator")
    claim = await claimed(queue)
    plan = await check_input(in_pieces(as_input(lines)), ENDPOINT, rig.config, lambda model: True)
    await rig.storage.put_first(plan_path("acme", batch.batch_id), plan.encoded())
    assert await queue.start(claim, plan)
    return await rig.reload(batch)


def answer(number: int, text: str) -> ResultLine:
    return ResultLine.answered(f"line-{number}", LineAnswer(200, "id", b'{"text":"%s"}' % text.encode()))


async def entries_of(rig: BatchRig, key: str) -> dict[str, dict[str, str]]:
    """Of a stream."""
    entries: Any = await rig.redis.call(lambda redis: redis.xrange(key))
    return dict(entries)


async def test_a_stalled_worker_may_write_nothing_once_another_has_its_shard(rig: BatchRig) -> None:
    batch = await started(rig, 4)
    stalled, other = queue_of(rig, "stalled"), queue_of(rig, "other")
    old = await claimed(stalled)
    assert await stalled.answer(old, 1, answer(0, "old"))
    await rig.end_leases(batch)
    new = await claimed(other)
    assert (new.task, new.deliveries) == (old.task, 1)
    assert not await stalled.answer(old, 2, answer(1, "late"))
    assert await stalled.renew(old) is None
    assert not await stalled.release(old)
    assert not await stalled.finish_shard(old, Tally.of(b""))
    assert not await stalled.fail(old, [])
    assert set(await other.answers(new)) == {1}
    assert await other.answer(new, 1, answer(0, "new"))  # what was answered first stays
    assert b"old" in (await other.answers(new))[1].json
    assert (await rig.reload(batch)).counts == LineCounts(4, 1, 0)


async def test_a_worker_that_renews_keeps_its_task_and_learns_of_the_end(rig: BatchRig) -> None:
    batch = await started(rig, 4)
    queue, other = queue_of(rig, "one"), queue_of(rig, "other")
    claim = await claimed(queue)
    for _ in range(3):
        await rig.end_leases(batch)
        assert await queue.renew(claim) is BatchStatus.IN_PROGRESS
        assert await other.claim(()) is None
    await rig.batches.cancel("acme", batch.batch_id)
    assert await queue.renew(claim) is BatchStatus.CANCELLING


async def test_a_shard_is_resumed_in_its_middle(rig: BatchRig) -> None:
    batch = await started(rig, 4)
    dead = queue_of(rig, "dead")
    claim = await claimed(dead)
    for number in (0, 2):
        assert await dead.answer(claim, number + 1, answer(number, f"answer to {number}"))
    await rig.end_leases(batch)
    async with rig.working():
        batch = await rig.ended(batch)
    assert rig.runner.attempts == {"1": 1, "3": 1}
    assert (await rig.texts(batch), batch.counts) == (right_texts(range(4)), LineCounts(4, 4, 0))


async def test_an_answer_that_is_large_is_kept_out_of_redis(redis: RedisClient, tmp_path: Path) -> None:
    rig = BatchRig(redis, tmp_path, replace(CONFIG, max_kept_answer_bytes=10))
    rig.runner.held |= {"3"}
    async with rig.working():
        batch = await rig.submit([request_line(number) for number in range(4)])
        await rig.answered(batch, 3)
    kept = await rig.redis.read_hash(lines_of(batch.batch_id, "0"))
    assert kept == {"1": "C", "2": "C", "3": "C"}
    await rig.storage.delete(answer_path("acme", batch.batch_id, 1))  # what is lost there is asked again
    rig.runner.released.set()
    async with rig.working():
        batch = await rig.ended(batch)
    assert (await rig.texts(batch), batch.counts) == (right_texts(range(4)), LineCounts(4, 4, 0))
    assert rig.runner.answered == {"0": 2, "1": 1, "2": 1, "3": 1}


async def test_a_shard_that_is_stored_is_not_run_again(rig: BatchRig) -> None:
    """Its worker died, or Redis forgot, between storing it and saying so."""
    batch = await started(rig, 4)
    dead = queue_of(rig, "dead")
    claim = await claimed(dead)
    assert await dead.answer(claim, 1, answer(0, "answer to 0"))
    results = [answer(number, f"answer to {number}") for number in range(3)]
    results.append(ResultLine.answered("line-3", LineAnswer(200, "id", b'{"text":"answer to 3"}')))
    await rig.storage.put_first(shard_path("acme", batch.batch_id, 0), join_results(results))
    await rig.end_leases(batch)
    async with rig.working():
        batch = await rig.ended(batch)
    assert rig.runner.attempts.total() == 0
    assert (await rig.texts(batch), batch.counts) == (right_texts(range(4)), LineCounts(4, 4, 0))


async def test_of_two_workers_that_store_a_shard_the_first_counts(rig: BatchRig) -> None:
    rig.runner.held |= {"0"}
    batch = await rig.submit([request_line(0)])
    async with rig.working():
        await rig.runner.wait_until(1)
        faster = [answer(0, "faster")]
        await rig.storage.put_first(shard_path("acme", batch.batch_id, 0), join_results(faster))
        rig.runner.released.set()
        batch = await rig.ended(batch)
    assert await rig.texts(batch) == {"line-0": "faster"}


async def test_a_line_that_ends_its_worker_is_given_up_and_no_other_is(rig: BatchRig) -> None:
    for number, times in ((1, 99), (6, 2)):
        rig.runner.scripts[str(number)] = [OSError("this ends the task as a crash ends a router")] * times
    async with rig.working():
        batch = await ended_in_spite_of_deaths(rig, await rig.submit([request_line(number) for number in range(8)]))
    assert await rig.errors(batch) == {"line-1": "dead_letter"}
    assert await rig.texts(batch) == right_texts([0, 2, 3, 4, 5, 6, 7])
    assert (batch.status, batch.counts) == (BatchStatus.COMPLETED, LineCounts(8, 7, 1))
    assert list((await entries_of(rig, DEAD_TASKS)).values()) == [
        {"job": batch.batch_id, "task": "0", "tenant": "acme"}
    ]
    assert rig.metric("dead_letters_total") == 1
    assert rig.metric("lines_total", outcome="dead_letter") == 1


@pytest.mark.parametrize("poisoned", [0, 9, 15])
async def test_a_line_that_ends_its_worker_takes_no_other_with_it(
    redis: RedisClient, tmp_path: Path, poisoned: int
) -> None:
    """They are in flight together, and all of them are lost each time."""
    rig = BatchRig(redis, tmp_path, replace(CONFIG, lines_per_shard=16))
    rig.runner.scripts[str(poisoned)] = [OSError("this ends the task as a crash ends a router")] * 99
    async with rig.working():
        batch = await ended_in_spite_of_deaths(rig, await rig.submit([request_line(number) for number in range(16)]))
    assert await rig.errors(batch) == {f"line-{poisoned}": "dead_letter"}
    assert await rig.texts(batch) == right_texts([number for number in range(16) if number != poisoned])


async def test_deliveries_count_from_the_last_answered_line(rig: BatchRig) -> None:
    batch = await started(rig, 4)
    queue = queue_of(rig, "one")
    for deliveries in (1, 2, 3):
        claim = await claimed(queue)
        assert claim.deliveries == deliveries
        await rig.end_leases(batch)
    assert await queue.answer(claim, 1, answer(0, "x"))
    assert (await claimed(queue)).deliveries == 1
    await rig.end_leases(batch)
    claim = await claimed(queue)
    assert claim.deliveries == 2
    assert await queue.release(claim)  # given back counts as never delivered
    assert (await claimed(queue)).deliveries == 2


async def test_a_task_that_redis_gave_out_and_nobody_heard_of_was_not_delivered(rig: BatchRig) -> None:
    """Redis is too slow for a while: it does what workers ask, and they hear nothing."""
    batch = await started(rig, 4)
    for _ in range(CONFIG.max_deliveries + 1):
        await given_out(queue_of(rig, "deaf"))
        await rig.end_leases(batch)
    async with rig.working():
        batch = await rig.ended(batch)
    assert batch.counts == LineCounts(4, 4, 0)
    assert rig.metric("dead_letters_total") == 0


async def test_a_delivery_counts_once_however_often_it_is_begun(rig: BatchRig) -> None:
    batch = await started(rig, 4)
    queue = queue_of(rig, "one")
    claim = await given_out(queue)
    for _ in range(2):
        assert await queue.begin(claim)
        assert claim.deliveries == 1
    await rig.end_leases(batch)
    other = await given_out(queue)
    assert not await queue.begin(claim)
    assert await queue.release(other)
    assert (await claimed(queue)).deliveries == 2  # what was not begun takes nothing back


async def test_a_worker_that_is_stopped_while_it_takes_a_task_gives_it_back(
    redis: RedisClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = BatchRig(redis, tmp_path, CONFIG)
    loads, may_load, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()
    worker = rig.worker()

    async def slow_load(redis: RedisClient, job_id: str) -> Job | None:
        loads.set()
        await may_load.wait()
        return await load_job(redis, job_id)

    async def work() -> None:
        async with open_worker(worker):
            await stop.wait()

    monkeypatch.setattr("rempart_platform.batch.workers.load_job", slow_load)
    batch = await rig.submit([request_line(0)])
    working = asyncio.create_task(work())
    await loads.wait()
    stop.set()
    await worker._closing.wait()
    may_load.set()
    await working
    assert rig.metric("tasks_held") == 0
    async with rig.working():
        assert (await rig.ended(batch)).counts == LineCounts(1, 1, 0)


async def test_answers_of_lines_go_with_a_batch_whose_input_is_gone(rig: BatchRig) -> None:
    batch = await started(rig, 12)
    queue = queue_of(rig, "one")
    first, second = await claimed(queue), await claimed(queue)
    assert await queue.answer(first, 1, answer(0, "x"))
    await rig.storage.delete(file_path("acme", batch.input_file_id))
    assert await queue.fail(second, [])
    assert not await queue.answer(first, 2, answer(1, "x"))
    assert await rig.redis.call(lambda redis: redis.keys(f"rempart:{{batch}}:lines:{batch.batch_id}:*")) == []


async def test_an_upload_that_never_ended_goes_and_a_file_that_is_listed_stays(rig: BatchRig) -> None:
    """A worker that lost its task may die while it writes again what another has listed."""
    async with rig.working():
        batch = await rig.ended(await rig.submit([request_line(0)]))
    names = {f"acme {batch.output_file_id}": rig.now_s, "acme file-lost": rig.now_s}
    await rig.storage.put_first(file_path("acme", "file-lost"), b"x")
    await rig.redis.call(lambda redis: redis.zadd(UPLOADS, names))
    await rig.janitor().clean()
    assert await rig.texts(batch) == right_texts([0])
    with pytest.raises(MissingObjectError):
        await rig.storage.get(file_path("acme", "file-lost"))
    assert await rig.redis.call(lambda redis: redis.zcard(UPLOADS)) == 0


async def test_an_input_that_ends_its_reader_is_given_up(rig: BatchRig) -> None:
    batch = await rig.submit([request_line(0)])
    for _ in range(CONFIG.max_deliveries):
        assert (await claimed(queue_of(rig, "dying"))).task == VALIDATE
        await rig.end_leases(batch)
    async with rig.working():
        batch = await rig.ended(batch)
    assert (batch.status, [error.code for error in batch.errors]) == (BatchStatus.FAILED, ["dead_letter"])


async def test_tasks_that_redis_lost_are_added_again(rig: BatchRig) -> None:
    batch = await started(rig, 12)
    queue = queue_of(rig, "one")
    first = await claimed(queue)
    work = work_of(batch.batch_id)
    _, *lost = await entries_of(rig, work)
    await rig.redis.call(lambda redis: redis.xdel(work, *lost))
    await asyncio.gather(*(rig.janitor().clean() for _ in range(3)))
    assert sorted(fields["task"] for fields in (await entries_of(rig, work)).values()) == ["0", "1", "2"]
    assert rig.metric("repaired_tasks_total") == 2
    assert await queue.renew(first) is BatchStatus.IN_PROGRESS
    assert await queue.release(first)
    async with rig.working():
        batch = await rig.ended(batch)
    assert (await rig.texts(batch), batch.counts) == (right_texts(range(12)), LineCounts(12, 12, 0))


async def test_a_stream_that_redis_lost_is_made_again(rig: BatchRig) -> None:
    running, waiting = await started(rig, 4), await rig.submit([request_line(0)])
    await rig.redis.call(lambda redis: redis.delete(work_of(waiting.batch_id), work_of(running.batch_id)))
    assert await queue_of(rig, "one").claim(()) is None  # it makes the group and finds nothing
    await rig.janitor().clean()
    async with rig.working():
        assert (await rig.ended(waiting)).counts == LineCounts(1, 1, 0)
        assert (await rig.ended(running)).counts == LineCounts(4, 4, 0)


async def test_a_job_that_lost_its_place_among_the_open_ones_has_it_again(rig: BatchRig) -> None:
    batch = await started(rig, 4)
    await rig.redis.call(lambda redis: redis.delete(f"{OPEN_JOBS}:acme", "rempart:{batch}:turns"))
    await rig.janitor().clean()
    async with rig.working():
        assert (await rig.ended(batch)).counts == LineCounts(4, 4, 0)


async def test_finalizing_again_gives_the_same_files(rig: BatchRig) -> None:
    """Redis forgot that the job had ended: its record is as it was before."""
    rig.runner.scripts["1"] = []
    async with rig.working():
        batch = await rig.ended(await rig.submit([request_line(number) for number in range(6)]))
        content = await rig.results(batch, batch.output_file_id)
        record = f"rempart:{{batch}}:job:{batch.batch_id}"
        await rig.redis.call(lambda redis: redis.hset(record, "status", "finalizing"))
        await rig.redis.call(lambda redis: redis.hdel(record, "completed_s", "output_file_id"))
        await rig.redis.call(lambda redis: redis.zadd(OPEN_JOBS, {batch.batch_id: 1}))
        await rig.janitor().clean()
        again = await rig.ended(batch)
    assert again == batch
    assert await rig.results(again, again.output_file_id) == content
    assert len([file for file in await rig.files.list("acme") if file.purpose == "batch_output"]) == 1


async def test_an_input_is_cut_once_whatever_a_later_reader_would_do(rig: BatchRig) -> None:
    batch = await rig.submit([request_line(number) for number in range(4)])
    cut = await check_input(
        in_pieces(as_input([request_line(number) for number in range(4)])),
        ENDPOINT,
        replace(CONFIG, lines_per_shard=1),
        lambda model: True,
    )
    await rig.storage.put_first(plan_path("acme", batch.batch_id), cut.encoded())
    async with rig.working():
        batch = await rig.ended(batch)
    job = await load_job(rig.redis, batch.batch_id)
    assert job is not None
    assert job.num_shards == 4
    assert await rig.texts(batch) == right_texts(range(4))


async def test_parts_and_records_of_ended_jobs_go_when_their_time_has_come(rig: BatchRig) -> None:
    async with rig.working():
        batch = await rig.ended(await rig.submit([request_line(0)]))
    parts = rig.folder / "objects" / job_prefix("acme", batch.batch_id)
    await rig.janitor().clean()
    assert [path.name for path in parts.rglob("*") if path.is_file()] != []
    rig.now_s += CONFIG.keep_parts_s + 1
    await rig.janitor().clean()
    assert [path.name for path in parts.rglob("*") if path.is_file()] == []
    assert await rig.texts(batch) == right_texts([0])
    rig.now_s += CONFIG.record_lifetime_s + 1
    await rig.janitor().clean()
    assert await rig.batches.list("acme", limit=1) == ((), False)
    keys = [str(key) for key in await rig.redis.call(lambda redis: redis.keys("rempart:{batch}:*"))]
    assert sorted(key.removeprefix("rempart:{batch}:") for key in keys) == ["number", "turn"]


async def test_the_oldest_open_job_is_measured(rig: BatchRig) -> None:
    batch = await rig.submit([request_line(0)])
    rig.now_s += 7
    await rig.janitor().look()
    assert (rig.metric("open_jobs"), rig.metric("oldest_open_job_seconds")) == (1, 7)
    async with rig.working():
        await rig.ended(batch)
    await rig.janitor().look()
    assert (rig.metric("open_jobs"), rig.metric("oldest_open_job_seconds")) == (0, 0)


async def test_two_workers_of_which_one_stalls_answer_each_line_once(rig: BatchRig) -> None:
    """The stalled one is cut off in the middle of its lines, and hears nothing of it until it wants to write."""
    stalled = ScriptedRunner(held={str(number) for number in range(8)})
    batch = await rig.submit([request_line(number) for number in range(8)])
    stalled_rig = BatchRig(rig.redis, rig.folder, replace(CONFIG, max_lines_in_flight_per_tenant=4))
    worker = stalled_rig.worker(stalled)
    claiming = asyncio.create_task(worker.keep_claiming())  # one shard, for which nobody renews its lease
    await stalled.wait_until(4)
    await rig.end_leases(batch)
    async with rig.working():
        batch = await rig.ended(batch)
    stalled.released.set()
    await worker.close()
    await claiming
    assert batch.counts == LineCounts(8, 8, 0)
    assert await rig.texts(batch) == right_texts(range(8))
    assert stalled.num_running == 0
    assert stalled_rig.metric("tasks_total", kind="shard", outcome="done") == 0


def test_the_first_reason_to_stop_counts_unless_the_task_is_over() -> None:
    claim = Claim("job", FINALIZE, "0-1", "w:1", 1)
    claim.interrupt(Interruption.CANCELLED)
    claim.interrupt(Interruption.EXPIRED)
    assert (claim.interruption, claim.is_over) == (Interruption.CANCELLED, False)
    claim.interrupt(Interruption.LOST)
    claim.interrupt(Interruption.DRAINING)
    assert (claim.interruption, claim.is_over) == (Interruption.LOST, True)


def test_kept_answers_are_read_as_they_were_written() -> None:
    results = [answer(1, "a"), ResultLine.unanswered("line-2", Outcome.EXPIRED), answer(3, "c")]
    assert list(split_results(join_results(results))) == results
    tally = Tally.of(join_results(results))
    assert (tally.num_completed, tally.num_failed, tally.counts[Outcome.EXPIRED]) == (2, 1, 1)


def test_a_plan_that_is_kept_names_its_model() -> None:
    assert Plan.decode(Plan("m", ()).encoded()) == Plan("m", ())


async def test_answers_that_are_gone_fail_the_batch(rig: BatchRig) -> None:
    batch = await started(rig, 1)
    queue = queue_of(rig, "one")
    claim = await claimed(queue)
    assert await queue.finish_shard(claim, Tally.of(join_results([answer(0, "x")])))
    async with rig.working():
        batch = await rig.ended(batch)
    assert (batch.status, [error.code for error in batch.errors]) == (BatchStatus.FAILED, ["answers_missing"])


async def test_a_worker_that_is_stopped_in_the_middle_of_a_long_input_gives_it_back(
    redis: RedisClient, tmp_path: Path
) -> None:
    rig = BatchRig(redis, tmp_path, replace(CONFIG, drain_s=0.01))
    reads, never = asyncio.Event(), asyncio.Event()

    class SlowStorage(BatchStorage):
        async def stream(self, path: str) -> AsyncIterator[bytes]:
            yield as_input([request_line(0)])
            reads.set()
            await never.wait()

    fast = rig.storage
    batch = await rig.submit([request_line(0)])
    rig.use(SlowStorage(open_object_store(f"file://{tmp_path}/objects")))
    async with rig.working():
        await reads.wait()
    rig.use(fast)
    async with rig.working():
        batch = await rig.ended(batch)
    assert batch.counts == LineCounts(1, 1, 0)
