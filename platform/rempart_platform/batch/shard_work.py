"""One shard: its open lines answered, its answers stored, the shard counted.

    stored already? ─yes──────────────────────────────────────────────┐
       └─ no ─► lines that were answered before ─► open lines run ─► stored, unless somebody was faster ─► counted

Again is harmless at each of these steps, so a failure of Redis or of the storage is met by beginning again.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.input_lines import RequestLine, split_lines
from rempart_platform.batch.jobs import Job
from rempart_platform.batch.lanes import LaneTask
from rempart_platform.batch.metrics import BatchMetrics
from rempart_platform.batch.plan import Plan, Shard
from rempart_platform.batch.result_lines import Outcome, ResultLine, Tally, join_results
from rempart_platform.batch.storage import (
    BatchStorage,
    MissingObjectError,
    answer_path,
    file_path,
    plan_path,
    shard_path,
)
from rempart_platform.batch.values import LineRunner
from rempart_platform.batch.work_queue import Claim, Interruption, WorkQueue
from rempart_platform.errors import EngineLostError, ErrorKind, RempartError

_MAX_PLANS = 64
_FIRST_RETRY = 2
_RETRY_S = 1.0
_MAX_WAIT_S = 60.0  # limits may be raised meanwhile
_JITTER, _MAX_JITTER_S = 0.5, 5.0  # of a wait, so that lines that were refused together do not come back together
_WAITED_OUT = (ErrorKind.UNAVAILABLE, ErrorKind.RATE_LIMIT_EXCEEDED)

_decoder = msgspec.json.Decoder(RequestLine)


class LeftTaskError(Exception):
    """The worker must leave the task as it is."""


@dataclass(frozen=True, slots=True)
class _OpenLine:
    number: int
    request: RequestLine


class ShardWork:
    """Does shards.

    Args:
        queue: where shards are counted and lines kept.
        storage: where inputs and answers are.
        runner: answers a line.
        config: how often a line is tried.
        metrics: told of lines.
        clock: seconds since the epoch.
        jitter: makes waits uneven.
    """

    def __init__(
        self,
        queue: WorkQueue,
        storage: BatchStorage,
        runner: LineRunner,
        config: BatchConfig,
        metrics: BatchMetrics,
        clock: Callable[[], float] = time.time,
        jitter: random.Random | None = None,
    ) -> None:
        self._queue = queue
        self._storage = storage
        self._runner = runner
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._jitter = jitter if jitter is not None else random.Random()
        self._plans: dict[str, Plan] = {}

    async def run(self, claim: Claim, job: Job, room: LaneTask) -> bool:
        """Does a shard to its end. False when another worker has it.

        Raises:
            RempartError: UNAVAILABLE; to be called again.
            MissingObjectError: the input is gone.
            LeftTaskError: interrupted for good.
        """
        tenant, number = job.batch.caller.tenant, int(claim.task)
        path = shard_path(tenant, claim.job_id, number)
        stored = await self._stored(path)
        if stored is None:
            shard = (await self._plan(job)).shards[number]
            stored = join_results(await self._answer(claim, job, shard, room))
            if not await self._storage.put_first(path, stored):
                stored = await self._storage.get(path)
        tally = Tally.of(stored)
        is_counted = await self._queue.finish_shard(claim, tally)
        if is_counted:
            self._metrics.lines_stored(tally)
        return is_counted

    async def _stored(self, path: str) -> bytes | None:
        try:
            return await self._storage.get(path)
        except MissingObjectError:
            return None

    async def _plan(self, job: Job) -> Plan:
        job_id = job.batch.batch_id
        plan = self._plans.get(job_id)
        if plan is None:
            plan = Plan.decode(await self._storage.get(plan_path(job.batch.caller.tenant, job_id)))
            while len(self._plans) >= _MAX_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[job_id] = plan
        return plan

    async def _answer(self, claim: Claim, job: Job, shard: Shard, room: LaneTask) -> list[ResultLine]:
        """The answers of all lines, in order."""
        path = file_path(job.batch.caller.tenant, job.batch.input_file_id)
        data = await self._storage.get_range(path, shard.start, shard.end)
        lines = [_OpenLine(line.number, _decoder.decode(line.data)) for line in split_lines(data, shard.first_line)]
        answers = await self._kept(claim, job)
        open_lines = [line for line in lines if line.number not in answers]
        room.opened(len(open_lines))
        if claim.deliveries > self._config.max_deliveries:
            rest = Outcome.DEAD_LETTER
        else:
            await self._run_lines(_Attempts(self, claim, job, room, answers), open_lines)
            if claim.is_over:
                raise LeftTaskError
            rest = Outcome.CANCELLED if claim.interruption is Interruption.CANCELLED else Outcome.EXPIRED
        return [answers.get(each.number) or ResultLine.unanswered(each.request.custom_id, rest) for each in lines]

    async def _kept(self, claim: Claim, job: Job) -> dict[int, ResultLine]:
        """What was answered before, by line number."""
        answers = await self._queue.answers(claim)
        for number in [number for number, result in answers.items() if not result.json]:
            path = answer_path(job.batch.caller.tenant, claim.job_id, number)
            try:
                answers[number] = ResultLine.parse(await self._storage.get(path))
            except MissingObjectError:
                del answers[number]
        return answers

    async def _run_lines(self, attempts: "_Attempts", open_lines: Sequence[_OpenLine]) -> None:
        """Runs lines until all are answered, the worker is interrupted, or the job's time is up."""
        claim = attempts.claim
        left_s = max(attempts.job.batch.expires_s - self._clock(), 0.0)
        running = asyncio.create_task(attempts.answer_all(open_lines))
        interrupted = asyncio.create_task(claim.interrupted.wait())
        try:
            if claim.interruption is None and left_s > 0:
                await asyncio.wait({running, interrupted}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            else:
                claim.interrupt(Interruption.EXPIRED)
        finally:
            running.cancel()
            interrupted.cancel()
            await asyncio.wait({running, interrupted})

    async def attempt(self, job: Job, request: RequestLine, room: LaneTask) -> ResultLine:
        """Answers one line, and waits out what passes."""
        num_failures = num_losses = 0
        while True:
            async with room.in_flight():
                timeout_s = max(job.batch.expires_s - self._clock(), 0.0)
                answer = await self._runner(job.batch.caller, job.batch.endpoint, bytes(request.body), timeout_s)
            error = answer.error
            is_waited_out = error is not None and error.kind in _WAITED_OUT
            num_failures += not is_waited_out
            num_losses += isinstance(error, EngineLostError)
            may_retry = num_losses < self._config.max_engine_losses and (
                is_waited_out or num_failures < self._config.max_line_attempts
            )
            if error is None or not error.answer.is_retryable or not may_retry:
                return ResultLine.answered(request.custom_id, answer)
            self._metrics.line_retried(error.answer.openai_code)
            await asyncio.sleep(self._wait_s(error))

    def _wait_s(self, error: RempartError) -> float:
        wait_s = min(error.retry_after_s if error.retry_after_s is not None else _RETRY_S, _MAX_WAIT_S)
        return wait_s + self._jitter.uniform(0.0, min(_JITTER * wait_s, _MAX_JITTER_S))

    async def keep(self, claim: Claim, job: Job, number: int, result: ResultLine) -> bool:
        """Keeps the answer of a line, however long Redis or the storage is away. False when the worker must leave."""
        while not claim.is_over:
            try:
                return await self._queue.answer(claim, number, await self._small(job, number, result))
            except RempartError as error:
                await asyncio.sleep(self._wait_s(error))
        return False

    async def _small(self, job: Job, number: int, result: ResultLine) -> ResultLine:
        """What Redis keeps of it: without its JSON, when that is large, which is in the storage then."""
        if len(result.json) <= self._config.max_kept_answer_bytes:
            return result
        await self._storage.put_first(answer_path(job.batch.caller.tenant, job.batch.batch_id, number), result.kept())
        return ResultLine(result.outcome, b"")


@dataclass(frozen=True, slots=True)
class _Attempts:
    """The open lines of one shard."""

    work: ShardWork
    claim: Claim
    job: Job
    room: LaneTask
    answers: dict[int, ResultLine]
    """What is known, by line number; grows."""

    async def answer_all(self, lines: Sequence[_OpenLine]) -> None:
        for together in _rounds(lines, self.claim.deliveries):
            async with asyncio.TaskGroup() as tasks:
                for line in together:
                    tasks.create_task(self._answer(line))

    async def _answer(self, line: _OpenLine) -> None:
        async with self.room.line():
            result = await self.work.attempt(self.job, line.request, self.room)
            if await self.work.keep(self.claim, self.job, line.number, result):
                self.answers[line.number] = result
            else:
                self.claim.interrupt(Interruption.LOST)


def _rounds(lines: Sequence[_OpenLine], deliveries: int) -> Iterator[Sequence[_OpenLine]]:
    """All at once; but when the last worker ended before any was answered: one, then two, four and so on.

    Each such time begins elsewhere. So a line that ends whoever runs it takes hardly any other with it.
    """
    if deliveries < _FIRST_RETRY:
        yield lines
        return
    first = (deliveries - _FIRST_RETRY) * (len(lines) // 2) % max(len(lines), 1)
    left, size = [*lines[first:], *lines[:first]], 1
    while left:
        yield left[:size]
        left, size = left[size:], 2 * size
