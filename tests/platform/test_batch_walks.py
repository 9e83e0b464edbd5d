"""Random acts of workers that steal each other's tasks: only the last to have claimed a task may write of it."""

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.input_check import check_input
from rempart_platform.batch.result_lines import ResultLine, Tally, join_results
from rempart_platform.batch.storage import plan_path, shard_path
from rempart_platform.batch.testing import (
    ENDPOINT,
    MODEL,
    BatchRig,
    as_input,
    in_pieces,
    request_line,
    right_texts,
)
from rempart_platform.batch.values import Batch, BatchStatus, LineAnswer, LineCounts
from rempart_platform.batch.work_queue import FINALIZE, VALIDATE, Claim, WorkQueue
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_platform.tenancy.testing import own_redis

NUM_LINES, LINES_PER_SHARD, NUM_STEPS = 20, 4, 120
CONFIG = BatchConfig(lines_per_shard=LINES_PER_SHARD, poll_s=0.02, max_deliveries=10**6)
NO_LEASE = replace(CONFIG, lease_s=0.001)  # whoever comes next has the task


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as redis:
        yield redis


@dataclass
class Walk:
    """What was done, and what must be true of it."""

    rig: BatchRig
    batch: Batch
    chance: random.Random
    workers: list[WorkQueue]
    claims: list[tuple[WorkQueue, Claim]] = field(default_factory=list)
    holder: dict[str, Claim] = field(default_factory=dict)
    """By task: who claimed it last and has not left it."""
    answered: set[int] = field(default_factory=set)

    async def step(self) -> None:
        act = self.chance.choice((self.claim, self.answer, self.answer, self.finish, self.release, self.renew))
        await act()

    async def claim(self) -> None:
        worker = self.chance.choice(self.workers)
        claim = await worker.claim(())
        if claim is not None:
            self.claims.append((worker, claim))
            self.holder[claim.task] = claim

    def pick(self) -> tuple[WorkQueue, Claim, bool] | None:
        """Any claim, also one that was lost long ago; whether it still holds."""
        if not self.claims:
            return None
        worker, claim = self.chance.choice(self.claims)
        return worker, claim, self.holder.get(claim.task) is claim

    async def answer(self) -> None:
        picked = self.pick()
        if picked is None or not picked[1].task.isdecimal():
            return
        worker, claim, holds = picked
        number = int(claim.task) * LINES_PER_SHARD + self.chance.randrange(LINES_PER_SHARD)
        assert await worker.answer(claim, number + 1, answer_of(number)) is holds
        if holds:
            self.answered.add(number)

    async def finish(self) -> None:
        picked = self.pick()
        if picked is None:
            return
        worker, claim, holds = picked
        if claim.task == VALIDATE:
            content = as_input([request_line(number) for number in range(NUM_LINES)])
            plan = await check_input(in_pieces(content), ENDPOINT, CONFIG, lambda model: model == MODEL)
            await self.rig.storage.put_first(plan_path("acme", self.batch.batch_id), plan.encoded())
            assert await worker.start(claim, plan) is holds
        elif claim.task == FINALIZE:
            return  # left to the worker at the end
        else:
            stored = await self.store(int(claim.task))
            assert await worker.finish_shard(claim, Tally.of(stored)) is holds
        if holds:
            del self.holder[claim.task]

    async def store(self, shard: int) -> bytes:
        """Every worker that comes so far stores; the first counts, whether it still holds the shard or not."""
        path = shard_path("acme", self.batch.batch_id, shard)
        numbers = range(shard * LINES_PER_SHARD, (shard + 1) * LINES_PER_SHARD)
        await self.rig.storage.put_first(path, join_results([answer_of(number) for number in numbers]))
        return await self.rig.storage.get(path)

    async def release(self) -> None:
        picked = self.pick()
        if picked is None:
            return
        worker, claim, holds = picked
        assert await worker.release(claim) is holds
        if holds:
            del self.holder[claim.task]

    async def renew(self) -> None:
        picked = self.pick()
        if picked is None:
            return
        worker, claim, holds = picked
        assert (await worker.renew(claim) is not None) is holds


def answer_of(number: int) -> ResultLine:
    return ResultLine.answered(f"line-{number}", LineAnswer(200, "id", b'{"text":"answer to %d"}' % number))


@pytest.mark.parametrize("seed", range(6))
async def test_only_the_last_to_claim_a_task_may_write_of_it(redis: RedisClient, tmp_path: Path, seed: int) -> None:
    rig = BatchRig(redis, tmp_path, CONFIG)
    batch = await rig.submit([request_line(number) for number in range(NUM_LINES)])
    workers = [WorkQueue(redis, NO_LEASE, f"worker-{number}", rig.clock) for number in range(3)]
    walk = Walk(rig, batch, random.Random(seed), workers)
    for _ in range(NUM_STEPS):
        await walk.step()
        if walk.chance.random() < 0.05:
            await rig.janitor().clean()
    assert rig.metric("repaired_tasks_total") == 0  # nothing was lost, and nothing is there twice
    honest = BatchRig(redis, tmp_path, replace(CONFIG, lease_s=3600.0))
    await honest.end_leases(batch)
    async with honest.working():
        batch = await honest.ended(batch)
    assert (batch.status, batch.counts) == (BatchStatus.COMPLETED, LineCounts(NUM_LINES, NUM_LINES, 0))
    assert await honest.texts(batch) == right_texts(range(NUM_LINES))
    asked = {int(prompt) for prompt in honest.runner.attempts}
    assert not asked & walk.answered
