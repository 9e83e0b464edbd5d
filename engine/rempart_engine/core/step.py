"""One pass of the loop, as data: schedule -> StepPlan -> execute -> StepResult -> commit -> token events.

    scheduler.schedule() ── StepPlan ──► runner.launch() ── StepResult ──► scheduler.commit() ──► TokenEvents

A plan is compact and serialisable: it is all that a runner (or one of several ranks) needs, beside the rows it keeps
from earlier plans. A row is a runner's persistent slot for one sequence: its tokens, its block table, its sampling
parameters. Rows are written when a sequence starts (or starts again after preemption) and appended to after that.
"""

from dataclasses import dataclass
from enum import Enum

from rempart_engine.core.request import FinishReason, RequestId, SamplingParams


@dataclass(frozen=True, slots=True)
class NewRow:
    """A sequence enters the running set: everything the runner must know about it."""

    row: int
    token_ids: tuple[int, ...]
    """All tokens so far: prompt, and output if it was preempted or replayed."""
    num_prompt_tokens: int
    """How many of them are prompt; the others count as output for penalties."""
    sampling: SamplingParams
    choice: int
    """Which of the request's n choices; part of the key of its random draws."""
    block_ids: tuple[int, ...]
    """Block table at the start: cached blocks, then fresh ones."""


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Work of one row in one step: compute tokens [start, start + num_new_tokens) of its sequence.

    The last `num_draft_tokens` of them are drafts: guesses which the runner keeps for the row since the end of the
    row's previous step (the first so many of those; the others are void, and all are when the number is 0). The runner
    samples after the last token that is not a draft and after each draft, and keeps the tokens up to the first that
    differs from the draft in its place: these are what it would have sampled one step at a time.
    """

    row: int
    start: int
    num_new_tokens: int
    new_block_ids: tuple[int, ...]
    """To be appended to the row's block table before computing (empty for a row in `new_rows`)."""
    samples: bool
    """The work reaches the sequence's last token, so a token is sampled after it."""
    wants_prompt_logprobs: bool = False
    num_draft_tokens: int = 0
    max_drafts: int = 0
    """How many drafts the runner may propose, after sampling, for the row's next step. The block table has room for the
    KV that proposing them writes, which reaches up to `max_drafts - 1` tokens beyond the new tokens. If all drafts of
    this step are accepted, the last of the next ones may lie up to `MAX_SPECULATIVE_TOKENS - 1` places beyond the
    longest sequence; they are never scheduled."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. `rows` hold no row twice; `new_rows` is a subset of them by row number."""

    step: int
    new_rows: tuple[NewRow, ...]
    rows: tuple[ScheduledRow, ...]

    @property
    def num_tokens(self) -> int:
        return sum(scheduled.num_new_tokens for scheduled in self.rows)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token and the most likely alternatives, before any sampling parameter."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a step brought for one row of the plan.

    `token_ids` are the sampled tokens in order: none when the row did not sample; else one more than drafts that were
    accepted (or as many, when the token after the last of them cannot be had now and is left to the next step).
    `error` is set when this row alone failed (for example NaN logits); its sequence ends, the others go on.
    """

    row: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For the new tokens of this step that are prompt tokens: the log-probability of the token *after* each of them,
    as far as that is a prompt token too. Concatenated over the steps they cover prompt tokens 1, 2, ..."""
    error: str | None = None
    num_proposed_drafts: int = 0
    """Drafts that the runner keeps for the row's next step, at most `max_drafts`."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of a plan, one entry per row of the plan, in its order."""

    step: int
    rows: tuple[RowResult, ...]
    is_lost: bool = False
    """Memory did not suffice: nothing was computed, and no row is where the plan would have brought it."""

    @classmethod
    def lost(cls, plan: StepPlan) -> "StepResult":
        """Of a plan for which memory did not suffice."""
        return cls(plan.step, tuple(RowResult(scheduled.row) for scheduled in plan.rows), is_lost=True)


class ErrorCode(Enum):
    """Kinds of failure; the names are those of `rempart.v1.EngineError.Code` without their prefix."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class EventError:
    """Why a request failed. The message is for a person and names the limit that was broken."""

    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one choice of one request, or its end, or both. `index` counts output tokens from 0."""

    request_id: RequestId
    choice: int
    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: EventError | None = None
