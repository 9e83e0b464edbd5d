"""A model small enough to know by heart, a runner that computes it through KV blocks, and builders for tests."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from rempart_engine.core.pipeline import Pipeline
from rempart_engine.core.request import FinishReason, Request, RequestId, SamplingParams
from rempart_engine.core.runner import DoneStep
from rempart_engine.core.scheduler import Scheduler
from rempart_engine.core.scheduler_config import SchedulerConfig
from rempart_engine.core.step import RowResult, ScheduledRow, StepPlan, StepResult, TokenEvent, TokenLogprob

EOS_TOKEN_ID = 0
VOCAB_SIZE = 32


@dataclass(frozen=True, slots=True)
class HashModel:
    """Deterministic stand-in for a language model: the next token is a hash of everything before it.

    As in a transformer, a token's KV depends on all tokens up to it, and the next token on the KV of all of them.
    """

    vocab_size: int = VOCAB_SIZE

    def kv(self, context: Sequence[int], token_id: int) -> int:
        """What is stored for a token, given what is stored for those before it."""
        return _hash(token_id, *context)

    def next_token(self, context: Sequence[int], sampling: SamplingParams, choice: int) -> int:
        """Sample after a context, given by what is stored for it."""
        return _hash(sampling.seed or 0, choice, *context) % self.vocab_size

    def stream(self, request: Request, choice: int, config: SchedulerConfig) -> tuple[tuple[int, ...], FinishReason]:
        """Output of one choice, computed alone and from the definition: what any schedule must bring."""
        sampling = request.sampling
        num_prompt_tokens = len(request.prompt_token_ids) - request.num_emitted_tokens
        stop_token_ids = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else config.eos_token_ids)}
        context: list[int] = []
        for token_id in request.prompt_token_ids:
            context.append(self.kv(context, token_id))
        output: list[int] = []
        while True:
            token_id = self.next_token(context, sampling, choice)
            context.append(self.kv(context, token_id))
            output.append(token_id)
            num_output_tokens = len(context) - num_prompt_tokens
            if token_id in stop_token_ids and num_output_tokens > sampling.min_tokens:
                return tuple(output), FinishReason.STOP
            if num_output_tokens == sampling.max_tokens or len(context) == config.max_sequence_tokens:
                return tuple(output), FinishReason.LENGTH


@dataclass(slots=True)
class _Row:
    token_ids: list[int]
    sampling: SamplingParams
    choice: int
    num_prompt_tokens: int
    block_ids: list[int]
    drafts: list[int] = field(default_factory=list)


@dataclass(slots=True)
class SimulatedRunner:
    """Runs `HashModel` with its KV in numbered slots, so that a wrong or stolen block changes the tokens.

    It keeps the contract of `Runner` and insists that the scheduler keeps its side of it. Drafts are right or wrong by
    a hash; the KV of rejected ones, and what proposing them writes, stays in the slots until it is written over.
    """

    config: SchedulerConfig
    model: HashModel = field(default_factory=HashModel)
    failing_rows: set[int] = field(default_factory=set)
    """Rows whose next result is an error."""
    draft_percent: int = 70
    """How many of 100 drafts are right."""
    num_steps_to_lose: int = 0
    """For so many steps to come memory does not suffice."""
    most_tokens: int | None = None
    """Memory does not suffice for steps of more tokens."""
    computes_elsewhere: bool = False
    """Steps are not done when they are launched."""
    num_computed_tokens: int = 0
    _slots: dict[int, int] = field(default_factory=dict)
    _rows: dict[int, _Row] = field(default_factory=dict)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan."""
        assert plan.num_tokens <= self.config.max_step_tokens, "over the token budget"
        assert len({scheduled.row for scheduled in plan.rows}) == len(plan.rows), "a row is planned twice"
        self._enter(plan)
        return StepResult(plan.step, tuple(self._execute_row(scheduled) for scheduled in plan.rows))

    def launch(self, plan: StepPlan) -> DoneStep:
        """Compute the plan now, unless memory does not suffice for it."""
        if self.num_steps_to_lose or (self.most_tokens is not None and plan.num_tokens > self.most_tokens):
            self.num_steps_to_lose = max(0, self.num_steps_to_lose - 1)
            self._enter(plan)
            return DoneStep(StepResult.lost(plan))
        return DoneStep(self.execute(plan), is_done=not self.computes_elsewhere)

    def release_rows(self, rows: Sequence[int]) -> None:
        """Forget rows."""
        for row in rows:
            del self._rows[row]

    def _enter(self, plan: StepPlan) -> None:
        for new_row in plan.new_rows:
            assert new_row.row not in self._rows, "a row is used again before it was released"
            assert new_row.row < self.config.max_num_rows, "no such row"
            self._rows[new_row.row] = _Row(
                list(new_row.token_ids),
                new_row.sampling,
                new_row.choice,
                new_row.num_prompt_tokens,
                list(new_row.block_ids),
            )

    def _execute_row(self, scheduled: ScheduledRow) -> RowResult:
        row = self._rows[scheduled.row]
        row.block_ids += scheduled.new_block_ids
        drafts, row.drafts = row.drafts[: scheduled.num_draft_tokens], []
        assert len(drafts) == scheduled.num_draft_tokens, "more drafts than the row has"
        end = scheduled.start + scheduled.num_new_tokens - len(drafts)
        context = [self._slots[self._slot(row, position)] for position in range(scheduled.start)]
        known = [*row.token_ids[scheduled.start : end], *drafts]
        for position, token_id in enumerate(known, start=scheduled.start):
            context.append(self.model.kv(context, token_id))
            self._slots[self._slot(row, position)] = context[-1]
        self.num_computed_tokens += scheduled.num_new_tokens
        assert scheduled.samples == (end == len(row.token_ids)), "samples exactly after the last token"
        assert scheduled.samples or not (drafts or scheduled.max_drafts), "drafts where nothing is sampled"
        if scheduled.row in self.failing_rows:
            self.failing_rows.remove(scheduled.row)
            if scheduled.samples:
                row.token_ids.append(0)  # plans that are made already go on from it
            return RowResult(scheduled.row, error="not a number in the logits")
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        if scheduled.wants_prompt_logprobs:
            stop = min(end, row.num_prompt_tokens - 1)
            prompt_logprobs = tuple(TokenLogprob(-float(position + 1)) for position in range(scheduled.start, stop))
        if not scheduled.samples:
            return RowResult(scheduled.row, prompt_logprobs=prompt_logprobs)
        token_ids = self._verify(row, context[:end], drafts)
        row.token_ids += token_ids
        self._propose(row, scheduled)
        logprobs = () if row.sampling.logprobs is None else (TokenLogprob(-1.0),) * len(token_ids)
        return RowResult(scheduled.row, token_ids, logprobs, prompt_logprobs, num_proposed_drafts=len(row.drafts))

    def _verify(self, row: _Row, context: list[int], drafts: list[int]) -> tuple[int, ...]:
        """The model's tokens after the context, as long as the drafts before them are right.

        Now and then the last of several is left to the next step.
        """
        token_ids = [self.model.next_token(context, row.sampling, row.choice)]
        for draft in drafts:
            if draft != token_ids[-1]:
                break
            context.append(self.model.kv(context, draft))
            token_ids.append(self.model.next_token(context, row.sampling, row.choice))
        if len(token_ids) > 1 and _hash(4, *context) % 5 == 0:
            token_ids.pop()
        return tuple(token_ids)

    def _propose(self, row: _Row, scheduled: ScheduledRow) -> None:
        """Guess what follows the row's tokens; how many guesses, and which are right, is a matter of hashes."""
        assert scheduled.max_drafts <= self.config.num_speculative_tokens, "more drafts than the limit"
        assert not (scheduled.max_drafts and row.sampling.has_penalties), "drafts where penalties go token by token"
        num_output_tokens = len(row.token_ids) - row.num_prompt_tokens
        assert not scheduled.max_drafts or num_output_tokens >= row.sampling.min_tokens, "drafts before min_tokens"
        end = scheduled.start + scheduled.num_new_tokens
        for position in range(end, end + scheduled.max_drafts - 1):
            self._slots[self._slot(row, position)] = _hash(position)
        context: list[int] = []
        for token_id in row.token_ids:
            context.append(self.model.kv(context, token_id))
        num_drafts = scheduled.max_drafts if _hash(1, *context) % 4 else _hash(2, *context) % (scheduled.max_drafts + 1)
        for _ in range(num_drafts):
            is_right = _hash(3, *context) % 100 < self.draft_percent
            right = self.model.next_token(context, row.sampling, row.choice)
            row.drafts.append(right if is_right else (right + 1) % self.model.vocab_size)
            context.append(self.model.kv(context, row.drafts[-1]))

    def _slot(self, row: _Row, position: int) -> int:
        block, offset = divmod(position, self.config.block_size)
        return row.block_ids[block] * self.config.block_size + offset


def make_config(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_rows: int = 8,
    max_step_tokens: int = 32,
    max_model_len: int = 200,
    max_num_waiting: int = 100,
    watermark: float = 0.0,
    enable_prefix_cache: bool = True,
) -> SchedulerConfig:
    """A small scheduler of small blocks."""
    return SchedulerConfig(
        num_blocks=num_blocks,
        max_num_rows=max_num_rows,
        max_step_tokens=max_step_tokens,
        max_model_len=max_model_len,
        max_num_waiting=max_num_waiting,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS_TOKEN_ID,),
        block_size=block_size,
        watermark=watermark,
        enable_prefix_cache=enable_prefix_cache,
    )


def with_drafts(
    config: SchedulerConfig, num_speculative_tokens: int, *, max_speculative_rows: int = 8
) -> SchedulerConfig:
    """The same with speculation."""
    return replace(config, num_speculative_tokens=num_speculative_tokens, max_speculative_rows=max_speculative_rows)


def make_request(
    request_id: str = "r",
    prompt: int | Sequence[int] = 5,
    *,
    sampling: SamplingParams | None = None,
    priority: int = 0,
    deadline: float | None = None,
    cache_salt: bytes = b"",
    num_emitted_tokens: int = 0,
) -> Request:
    """A request; a prompt given as a number is that many tokens that depend on `request_id`."""
    if isinstance(prompt, int):
        prompt = [1 + _hash(position, *request_id.encode()) % (VOCAB_SIZE - 1) for position in range(prompt)]
    return Request(
        request_id=RequestId(request_id),
        prompt_token_ids=tuple(prompt),
        sampling=sampling or SamplingParams(max_tokens=4, ignore_eos=True),
        priority=priority,
        deadline=deadline,
        cache_salt=cache_salt,
        num_emitted_tokens=num_emitted_tokens,
    )


def run_step(scheduler: Scheduler, runner: SimulatedRunner) -> list[TokenEvent]:
    """One pass of the loop, as the engine makes it."""
    runner.release_rows(scheduler.take_released_rows())
    plan = scheduler.schedule()
    runner.release_rows(scheduler.take_released_rows())
    return [] if plan is None else scheduler.commit(runner.execute(plan))


def run_until_idle(scheduler: Scheduler, runner: SimulatedRunner, max_steps: int = 1000) -> list[TokenEvent]:
    """All events until nothing is left to do; fails if that takes more steps than it should."""
    events: list[TokenEvent] = []
    for _ in range(max_steps):
        if not scheduler.has_work:
            return events
        events += run_step(scheduler, runner)
        scheduler.check_integrity()
    raise AssertionError(f"still at work after {max_steps} steps: {scheduler.load()}")


def run_a_step_ahead(scheduler: Scheduler, runner: SimulatedRunner) -> list[TokenEvent]:
    """All events until nothing is left to do, where each step is planned before the one before it is committed."""
    runner.computes_elsewhere = True
    pipeline = Pipeline(scheduler, runner)
    events: list[TokenEvent] = []
    while scheduler.has_work:
        events += pipeline.advance()[1]
        scheduler.check_integrity()
    return events


def _hash(*numbers: int) -> int:
    data = b"".join(number.to_bytes(8, "little", signed=False) for number in numbers)
    return int.from_bytes(blake2b(data, digest_size=7).digest(), "little")
