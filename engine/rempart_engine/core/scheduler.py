"""Who computes what in the next step, and what the outcome of a step means.

There are no phases. Every sequence has tokens, of which some are computed; each step lets it catch up by some more.
A prompt is many tokens behind, a decoding sequence one, a resumed one all that it lost, and all share the same steps.

       add ─► PARKED ─► WAITING ─► RUNNING ─► ENDED
      (choices from 1)      ▲ preempt │
                            └─────────┘

`schedule()` may be called again before the plan before it was committed: sequences then go on from placeholders for
tokens that are still being sampled. Plans are executed and committed in the order in which they were made.

A decoding sequence may have drafts verified beside its last token, and a step then brings it several tokens. Drafts are
an extra: they are planned with budget and blocks that nobody else lacks, and dropped otherwise.
"""

from collections import Counter, deque
from dataclasses import dataclass

from rempart_engine.core.allotment import allot_tokens
from rempart_engine.core.integrity import IntegrityError
from rempart_engine.core.load import Load, Tally
from rempart_engine.core.open_requests import OpenRequests
from rempart_engine.core.plan_draft import PlanDraft
from rempart_engine.core.request import FinishReason, InvalidRequestError, Request, RequestId
from rempart_engine.core.running_set import RunningSet
from rempart_engine.core.scheduler_config import SchedulerConfig
from rempart_engine.core.sequence import Sequence, SequenceState
from rempart_engine.core.speculation import drafts_per_row, num_useful_drafts
from rempart_engine.core.step import (
    ErrorCode,
    EventError,
    RowResult,
    ScheduledRow,
    StepPlan,
    StepResult,
    TokenEvent,
)
from rempart_engine.core.step_budget import StepBudget
from rempart_engine.core.validation import check_request
from rempart_engine.core.waiting_queue import WaitingQueue

__all__ = ["Scheduler", "SchedulerConfig"]


@dataclass(frozen=True, slots=True)
class _InFlightStep:
    """A plan whose result is not committed; `sequences` are those of its rows."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]


class Scheduler:
    """Owner of all sequences, KV blocks and rows. One thread, no clock, no chance: the same calls, the same plans."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._requests = OpenRequests()
        self._waiting = WaitingQueue()
        self._running = RunningSet(config, self._waiting)
        self._budget = StepBudget(config.max_step_tokens)
        self._in_flight: deque[_InFlightStep] = deque()
        self._num_arrivals = 0
        self._num_plans = 0
        self._num_steps = 0
        self._tally = Tally()

    @property
    def has_work(self) -> bool:
        """Something waits, runs, or is in flight."""
        return bool(self._requests or self._in_flight)

    def load(self) -> Load:
        """How busy it is at this moment."""
        remaining = [sequence.num_remaining_tokens for sequence in self._running.sequences]
        return Load(
            num_waiting=len(self._waiting),
            num_running=len(remaining),
            num_waiting_tokens=self._waiting.num_tokens + sum(count for count in remaining if count > 1),
            num_free_blocks=self._running.tables.num_free,
            num_blocks=self._config.num_blocks,
            num_steps=self._num_steps,
            counters=self._tally.snapshot(self._running.num_preemptions),
        )

    def take_released_rows(self) -> list[int]:
        """Rows that sequences gave back since the last call; the runner must hear of them before its next plan.

        A row is used again only after it was reported here: call it before `schedule()` as well as before executing.
        """
        return self._running.rows.take_released()

    def add(self, request: Request) -> list[TokenEvent]:
        """Accept a request: no events. Or refuse it: one event, of choice 0, that says why.

        A replayed request that its emitted tokens end already is answered with its last event at once.
        """
        error = self._refusal(request)
        if error is not None:
            self._tally.num_finished[FinishReason.ERROR] += 1
            index = max(0, request.num_emitted_tokens)
            return [TokenEvent(request.request_id, 0, index, finish_reason=FinishReason.ERROR, error=error)]
        sequences = self._new_sequences(request)
        self._requests.open(sequences)
        self._waiting.push(sequences[0])
        self._waiting.park(sequences[1:])
        reason = sequences[0].finish_reason() if request.num_emitted_tokens else None
        return [] if reason is None else [self._end(sequences[0], reason)]

    def abort(self, request_id: RequestId) -> list[TokenEvent]:
        """End all live choices of a request; an unknown id brings no events."""
        error = EventError(ErrorCode.CANCELLED, "aborted by the caller")
        return [self._end(sequence, FinishReason.ABORT, error) for sequence in self._requests.live(request_id)]

    def expire(self, now: float) -> list[TokenEvent]:
        """End the requests whose deadline is at or before `now`."""
        error = EventError(ErrorCode.DEADLINE_EXCEEDED, "the request's deadline has passed")
        events: list[TokenEvent] = []
        while (request_id := self._requests.first_expired(now)) is not None:
            events += [self._end(sequence, FinishReason.ABORT, error) for sequence in self._requests.live(request_id)]
        return events

    def schedule(self) -> StepPlan | None:
        """The next step; None when nothing can be computed, or not before a step in flight is committed."""
        draft = PlanDraft(self._num_plans + 1)
        admission = self._running.next_admission()
        next_waiting = None if admission is None else admission[0]
        max_drafts = drafts_per_row(self._config, len(self._running.sequences))
        allotted, left = allot_tokens(self._running.sequences, self._budget.num_tokens, next_waiting, max_drafts)
        for sequence, num_new_tokens, num_drafts in allotted:
            if sequence.state is not SequenceState.RUNNING or sequence.is_preempting:
                continue  # it gives way to one before it, in this plan or since an earlier one
            new_block_ids = self._running.grow(sequence, num_new_tokens)
            if new_block_ids is not None:
                num_useful = num_useful_drafts(sequence, num_new_tokens, max_drafts)
                room = self._running.room_for_drafts(sequence, num_new_tokens, num_drafts, num_useful)
                new_block_ids += room.new_block_ids
                draft.plan(sequence, num_new_tokens, new_block_ids, room.num_drafts, room.max_drafts)
        self._admit(draft, left)
        return self._launch(draft)

    def commit(self, result: StepResult) -> list[TokenEvent]:
        """Apply the result of the oldest plan in flight.

        The sequences of a lost step are preempted, and steps are smaller after it; when they cannot be, they fail.

        Raises:
            ValueError: the result is not one of that plan; nothing was changed.
        """
        if not self._in_flight:
            raise ValueError(f"result of step {result.step}, but no step is in flight")
        in_flight = self._in_flight[0]
        plan = in_flight.plan
        if result.step != plan.step or [row.row for row in result.rows] != [row.row for row in plan.rows]:
            raise ValueError(f"result of step {result.step} does not match plan {plan.step} row for row")
        self._in_flight.popleft()
        self._num_steps += 1
        events: list[TokenEvent] = []
        if result.is_lost:
            events += self._lose(in_flight)
        else:
            self._budget.note_good_step()
        for sequence, scheduled, outcome in zip(in_flight.sequences, plan.rows, result.rows, strict=True):
            if not result.is_lost:
                sequence.land(scheduled.num_new_tokens - scheduled.num_draft_tokens, samples=scheduled.samples)
                if sequence.state is not SequenceState.ENDED and not sequence.is_lost:
                    events += self._commit_row(sequence, scheduled, outcome)
            self._running.land(sequence)
        return events

    def check_integrity(self) -> None:
        """Raises IntegrityError when the books do not balance. Meant for tests, and for idle moments."""
        live = self._requests.sequences()
        waits = (SequenceState.WAITING, SequenceState.PARKED)
        self._waiting.check_integrity([sequence for sequence in live if sequence.state in waits])
        self._running.check_integrity([sequence for sequence in live if sequence.state is SequenceState.RUNNING])
        in_flight: Counter[Sequence] = Counter()
        drafts: Counter[Sequence] = Counter()
        for step in self._in_flight:
            for sequence, scheduled in zip(step.sequences, step.plan.rows, strict=True):
                in_flight[sequence] += scheduled.num_new_tokens - scheduled.num_draft_tokens
                drafts[sequence] += scheduled.num_draft_tokens
        for sequence in {*live, *in_flight}:
            sequence.check_integrity(self._config.block_size, in_flight[sequence], drafts[sequence])
        if not self.has_work and self._running.tables.num_free != self._config.num_blocks:
            raise IntegrityError(f"idle, but only {self._running.tables.num_free} blocks are free")

    def _refusal(self, request: Request) -> EventError | None:
        if request.request_id in self._requests:
            return EventError(ErrorCode.INVALID_ARGUMENT, f"request_id {request.request_id!r} is running already")
        try:
            check_request(request, self._config)
        except InvalidRequestError as error:
            return EventError(ErrorCode.INVALID_ARGUMENT, str(error))
        num_waiting, limit = len(self._waiting), self._config.max_num_waiting
        if num_waiting + request.sampling.n > limit:
            message = f"{num_waiting} choices wait already; {request.sampling.n} more exceed max_num_waiting = {limit}"
            return EventError(ErrorCode.RESOURCE_EXHAUSTED, message)
        return None

    def _new_sequences(self, request: Request) -> list[Sequence]:
        arrival = self._num_arrivals
        self._num_arrivals += 1
        eos_token_ids = () if request.sampling.ignore_eos else self._config.eos_token_ids
        stop_token_ids = frozenset((*request.sampling.stop_token_ids, *eos_token_ids))
        most = self._config.max_sequence_tokens
        return [Sequence(request, choice, arrival, stop_token_ids, most) for choice in range(request.sampling.n)]

    def _admit(self, draft: PlanDraft, left: int) -> None:
        while left > 0 and (admission := self._running.next_admission()) is not None:
            sequence, matched = admission
            row = self._running.admit(sequence, matched)
            if not sequence.has_run:
                sequence.has_run = True
                sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
                self._tally.num_prefix_cache_query_tokens += sequence.num_tokens
                self._tally.num_prefix_cache_hit_tokens += sequence.num_computed_tokens
            num_new_tokens = min(sequence.num_remaining_tokens, left)
            left -= num_new_tokens
            max_drafts = drafts_per_row(self._config, len(self._running.sequences))
            num_useful = num_useful_drafts(sequence, num_new_tokens, max_drafts)
            room = self._running.room_for_drafts(sequence, num_new_tokens, 0, num_useful)
            draft.introduce(sequence, row)
            draft.plan(sequence, num_new_tokens, max_drafts=room.max_drafts)

    def _launch(self, draft: PlanDraft) -> StepPlan | None:
        plan = draft.finish()
        if plan is None:
            return None
        self._in_flight.append(_InFlightStep(plan, tuple(draft.sequences)))
        self._num_plans = plan.step
        self._tally.num_scheduled_tokens += plan.num_tokens
        return plan

    def _lose(self, in_flight: _InFlightStep) -> list[TokenEvent]:
        """Take back a step that was not computed; the events of sequences that end with it."""
        for sequence, scheduled in zip(in_flight.sequences, in_flight.plan.rows, strict=True):
            sequence.lose(scheduled.num_new_tokens - scheduled.num_draft_tokens, samples=scheduled.samples)
        if not self._budget.is_least:
            self._budget.shrink()
            return []
        message = f"memory does not suffice for a step of {in_flight.plan.num_tokens} tokens (max_step_tokens)"
        error = EventError(ErrorCode.RESOURCE_EXHAUSTED, message)
        live = [sequence for sequence in in_flight.sequences if sequence.state is SequenceState.RUNNING]
        return [self._end(sequence, FinishReason.ERROR, error) for sequence in live]

    def _commit_row(self, sequence: Sequence, scheduled: ScheduledRow, outcome: RowResult) -> list[TokenEvent]:
        failure = _failure(scheduled, outcome)
        if failure is not None:
            sequence.is_distrusted = True
            return [self._end(sequence, FinishReason.ERROR, EventError(ErrorCode.INTERNAL, failure))]
        sequence.prompt_logprobs += outcome.prompt_logprobs
        index = sequence.num_output_tokens
        count, reason = sequence.append(outcome.token_ids)
        self._running.tables.publish(sequence)
        if not scheduled.samples:
            return []
        sequence.num_ready_drafts = outcome.num_proposed_drafts
        self._tally.num_output_tokens += count
        self._tally.num_draft_tokens += scheduled.num_draft_tokens
        self._tally.num_accepted_draft_tokens += count - 1
        event = TokenEvent(
            sequence.request.request_id,
            sequence.choice,
            index,
            outcome.token_ids[:count],
            outcome.logprobs[:count],
            reason,
            num_cached_tokens=0 if sequence.has_emitted else sequence.num_cached_tokens,
            prompt_logprobs=tuple(sequence.prompt_logprobs),
        )
        sequence.mark_emitted()
        if reason is not None:
            self._leave(sequence, reason)
        elif sequence.choice == 0:
            self._waiting.unpark(sequence.request.request_id)
        return [event]

    def _end(self, sequence: Sequence, reason: FinishReason, error: EventError | None = None) -> TokenEvent:
        """End it without further tokens."""
        self._leave(sequence, reason)
        return TokenEvent(
            sequence.request.request_id,
            sequence.choice,
            sequence.num_output_tokens,
            finish_reason=reason,
            num_cached_tokens=0 if sequence.has_emitted else sequence.num_cached_tokens,
            error=error,
        )

    def _leave(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.state is SequenceState.RUNNING:
            self._running.end(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.state = SequenceState.ENDED
        self._requests.end(sequence)
        self._tally.num_finished[reason] += 1
        if sequence.choice == 0:
            self._waiting.unpark(sequence.request.request_id)


def _failure(scheduled: ScheduledRow, outcome: RowResult) -> str | None:
    """What is wrong with the outcome of one row, if anything is."""
    if outcome.error is not None:
        return outcome.error
    least = int(scheduled.samples)
    most = least + scheduled.num_draft_tokens
    if not least <= len(outcome.token_ids) <= most:
        return f"the runner sampled {len(outcome.token_ids)} tokens where {least} to {most} were due"
    if not 0 <= outcome.num_proposed_drafts <= scheduled.max_drafts:
        return f"the runner proposed {outcome.num_proposed_drafts} drafts, the limit is {scheduled.max_drafts}"
    return None
