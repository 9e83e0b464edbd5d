"""What the scheduler does with drafts: several tokens a step, the same tokens, at nobody else's cost."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from rempart_engine.core.request import FinishReason, Request, RequestId, SamplingParams
from rempart_engine.core.scheduler import Scheduler, SchedulerConfig
from rempart_engine.core.step import RowResult, ScheduledRow, StepPlan, StepResult, TokenEvent, TokenLogprob
from rempart_engine.core.testing import (
    HashModel,
    SimulatedRunner,
    make_config,
    make_request,
    run_a_step_ahead,
    run_step,
    run_until_idle,
    with_drafts,
)


def sampling(max_tokens: int = 30, *, ignore_eos: bool = True, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, n=n)


def start(config: SchedulerConfig, *requests: Request, draft_percent: int = 100) -> tuple[Scheduler, SimulatedRunner]:
    scheduler = Scheduler(config)
    for request in requests:
        assert scheduler.add(request) == []
    return scheduler, SimulatedRunner(config, draft_percent=draft_percent)


def started(config: SchedulerConfig, *requests: Request) -> Scheduler:
    """A scheduler whose results the test writes itself."""
    return start(config, *requests)[0]


def next_plan(scheduler: Scheduler) -> StepPlan:
    scheduler.take_released_rows()
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def only_row(scheduler: Scheduler) -> ScheduledRow:
    [scheduled] = next_plan(scheduler).rows
    return scheduled


def bring(scheduler: Scheduler, plan: StepPlan, *results: RowResult) -> list[TokenEvent]:
    events = scheduler.commit(StepResult(plan.step, results))
    scheduler.check_integrity()
    return events


def decode(scheduler: Scheduler, num_drafts: int, *token_ids: int) -> tuple[ScheduledRow, list[TokenEvent]]:
    """One step of the only sequence, whose runner then holds so many drafts."""
    plan = next_plan(scheduler)
    events = bring(scheduler, plan, RowResult(0, token_ids, num_proposed_drafts=num_drafts))
    return plan.rows[0], events


def tokens(events: Sequence[TokenEvent], request_id: str, choice: int = 0) -> tuple[int, ...]:
    mine = [event for event in events if (event.request_id, event.choice) == (request_id, choice)]
    return tuple(token_id for event in mine for token_id in event.token_ids)


def expect_streams(events: Sequence[TokenEvent], config: SchedulerConfig, *requests: Request) -> None:
    for request in requests:
        for choice in range(request.sampling.n):
            assert tokens(events, request.request_id, choice) == HashModel().stream(request, choice, config)[0]


# Several tokens a step.


def test_drafts_are_verified_beside_the_last_token_and_accepted_ones_count_as_computed() -> None:
    scheduler = started(with_drafts(make_config(), 3), make_request(prompt=5, sampling=sampling(9)))
    first, _ = decode(scheduler, 3, 1)
    assert (first.start, first.num_new_tokens, first.num_draft_tokens, first.max_drafts) == (0, 5, 0, 3)
    second, [event] = decode(scheduler, 1, 2, 3)
    assert (second.start, second.num_new_tokens, second.num_draft_tokens) == (5, 4, 3)
    assert (event.index, event.token_ids) == (1, (2, 3))
    third, [event] = decode(scheduler, 0, 4, 5)
    assert (third.start, third.num_new_tokens, third.num_draft_tokens) == (7, 2, 1)
    fourth, [event] = decode(scheduler, 0, 6)
    assert (fourth.start, fourth.num_new_tokens, fourth.num_draft_tokens) == (9, 1, 0)
    assert (event.index, event.token_ids) == (5, (6,))


def test_the_token_after_accepted_drafts_may_be_left_to_the_next_step() -> None:
    scheduler = started(with_drafts(make_config(), 2), make_request(prompt=5, sampling=sampling(9)))
    decode(scheduler, 2, 1)
    decode(scheduler, 0, 2, 3)
    assert only_row(scheduler).start == 7


@pytest.mark.parametrize("draft_percent", [0, 50, 100])
@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 3])
def test_streams_are_those_without_drafts_and_take_fewer_steps(num_speculative_tokens: int, draft_percent: int) -> None:
    config = with_drafts(make_config(num_blocks=200), num_speculative_tokens)
    requests = [
        make_request(f"r{n}", 4 + n, sampling=sampling(30, ignore_eos=n % 2 == 0, n=1 + n % 3)) for n in range(6)
    ]
    scheduler, runner = start(config, *requests, draft_percent=draft_percent)
    expect_streams(run_until_idle(scheduler, runner), config, *requests)
    counters = scheduler.load().counters
    assert counters.num_draft_tokens > 0
    assert (counters.num_accepted_draft_tokens > 0) == (draft_percent > 0)
    without = make_config(num_blocks=200)
    plain, plain_runner = start(without, *requests)
    run_until_idle(plain, plain_runner)
    assert counters.num_output_tokens == plain.load().counters.num_output_tokens
    assert (scheduler.load().num_steps < plain.load().num_steps) == (draft_percent > 0)


def test_speculation_that_is_off_plans_and_proposes_nothing() -> None:
    scheduler = started(make_config(), make_request())
    plan = next_plan(scheduler)
    assert plan.rows[0].max_drafts == 0
    [event] = bring(scheduler, plan, RowResult(0, (1,), num_proposed_drafts=1))
    assert event.error is not None
    assert event.error.message == "the runner proposed 1 drafts, the limit is 0"


@pytest.mark.parametrize("token_ids", [(), (1, 2, 3)])
def test_more_tokens_than_drafts_allow_are_an_error_of_that_row(token_ids: tuple[int, ...]) -> None:
    scheduler = started(with_drafts(make_config(), 1), make_request())
    decode(scheduler, 1, 1)
    _, [event] = decode(scheduler, 0, *token_ids)
    assert event.finish_reason is FinishReason.ERROR
    assert event.error is not None
    assert event.error.message == f"the runner sampled {len(token_ids)} tokens where 1 to 2 were due"


def test_each_token_of_a_step_has_its_logprob() -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True, logprobs=0)
    scheduler, runner = start(with_drafts(make_config(), 3), make_request(sampling=params))
    events = run_until_idle(scheduler, runner)
    assert max(len(event.token_ids) for event in events) > 1
    assert all(event.logprobs == (TokenLogprob(-1.0),) * len(event.token_ids) for event in events)


# Endings.


def test_a_stop_token_among_accepted_drafts_ends_it_there() -> None:
    request = make_request(prompt=5, sampling=SamplingParams(max_tokens=20, stop_token_ids=(7,), ignore_eos=True))
    scheduler = started(with_drafts(make_config(), 3), request)
    decode(scheduler, 3, 1)
    _, [event] = decode(scheduler, 3, 2, 7, 4, 5)
    assert (event.token_ids, event.finish_reason) == ((2, 7), FinishReason.STOP)
    assert not scheduler.has_work
    counters = scheduler.load().counters
    assert (counters.num_draft_tokens, counters.num_accepted_draft_tokens, counters.num_output_tokens) == (3, 1, 3)


def test_no_draft_is_proposed_or_verified_that_max_tokens_would_cut_off() -> None:
    scheduler = started(with_drafts(make_config(), 3), make_request(prompt=5, sampling=sampling(4)))
    first, _ = decode(scheduler, 2, 1)
    assert first.max_drafts == 2
    second, [event] = decode(scheduler, 0, 2, 3, 4)
    assert (second.num_draft_tokens, second.max_drafts) == (2, 1)
    assert event.finish_reason is FinishReason.LENGTH
    scheduler = started(with_drafts(make_config(), 3), make_request(prompt=5, sampling=sampling(5)))
    decode(scheduler, 3, 1)
    decode(scheduler, 2, 2, 3)
    third, _ = decode(scheduler, 0, 4)
    assert (third.num_draft_tokens, third.max_drafts) == (1, 0)


def test_the_models_length_bounds_drafts_like_max_tokens() -> None:
    config = with_drafts(make_config(max_model_len=12), 3)
    request = make_request(prompt=5, sampling=SamplingParams(ignore_eos=True))
    scheduler, runner = start(config, request)
    events = run_until_idle(scheduler, runner)
    assert events[-1].finish_reason is FinishReason.LENGTH
    expect_streams(events, config, request)


# Who gets none.


@pytest.mark.parametrize(
    ("num_speculative_tokens", "max_rows", "named"),
    [(-1, 8, "num_speculative_tokens"), (4, 8, "num_speculative_tokens"), (1, 0, "max_speculative_rows")],
)
def test_a_limit_out_of_range_is_named(num_speculative_tokens: int, max_rows: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        with_drafts(make_config(), num_speculative_tokens, max_speculative_rows=max_rows)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=20, repetition_penalty=1.1),
        SamplingParams(max_tokens=20, presence_penalty=0.1),
        SamplingParams(max_tokens=20, frequency_penalty=-0.1),
    ],
)
def test_penalties_are_counted_token_by_token(params: SamplingParams) -> None:
    scheduler = started(with_drafts(make_config(), 3), make_request(sampling=params))
    assert only_row(scheduler).max_drafts == 0


def test_drafts_begin_when_min_tokens_are_reached() -> None:
    params = SamplingParams(max_tokens=20, min_tokens=3)
    scheduler = started(with_drafts(make_config(), 2), make_request(sampling=params))
    assert [decode(scheduler, 0, token_id)[0].max_drafts for token_id in (1, 2, 3)] == [0, 0, 2]


def test_a_chunk_that_does_not_sample_proposes_nothing() -> None:
    scheduler = started(with_drafts(make_config(max_step_tokens=4), 2), make_request(prompt=6))
    plan = next_plan(scheduler)
    assert plan.rows[0].max_drafts == 0
    bring(scheduler, plan, RowResult(0))
    assert only_row(scheduler).max_drafts == 2


def test_a_large_batch_verifies_and_proposes_none() -> None:
    config = with_drafts(make_config(), 2, max_speculative_rows=1)
    scheduler = started(config, make_request("a", sampling=sampling()))
    decode(scheduler, 2, 1)
    scheduler.add(make_request("b", sampling=sampling()))
    plan = next_plan(scheduler)  # its size counts before b comes in
    assert [(row.num_draft_tokens, row.max_drafts) for row in plan.rows] == [(2, 2), (0, 0)]
    bring(scheduler, plan, RowResult(0, (2, 3, 4), num_proposed_drafts=2), RowResult(1, (1,)))
    plan = next_plan(scheduler)
    assert [(row.start, row.num_new_tokens, row.max_drafts) for row in plan.rows] == [(8, 1, 0), (5, 1, 0)]
    bring(scheduler, plan, RowResult(0, (5,)), RowResult(1, (2,)))
    scheduler.abort(RequestId("b"))
    again = only_row(scheduler)
    assert (again.num_draft_tokens, again.max_drafts) == (0, 2)


# At nobody else's cost.


def test_drafts_take_what_decoding_leaves_of_its_part_of_the_budget() -> None:
    config = with_drafts(make_config(max_step_tokens=8), 3)
    requests = [make_request(f"r{number}", 1, sampling=sampling()) for number in range(3)]
    scheduler = started(config, *requests)
    bring(scheduler, next_plan(scheduler), *(RowResult(row, (1,), num_proposed_drafts=3) for row in range(3)))
    plan = next_plan(scheduler)
    assert [row.num_draft_tokens for row in plan.rows] == [3, 2, 0]
    bring(scheduler, plan, *(RowResult(row, (1,), num_proposed_drafts=3) for row in range(3)))
    scheduler.add(make_request("long", 20))
    plan = next_plan(scheduler)
    assert [row.num_draft_tokens for row in plan.rows] == [3, 0, 0, 0]
    assert [row.num_new_tokens for row in plan.rows] == [4, 1, 1, 2]


def test_room_for_proposing_is_part_of_the_block_table() -> None:
    """Computing 4 tokens fills the only block; a second and third draft write KV into the next."""
    for config, num_blocks, max_drafts in (
        (with_drafts(make_config(), 1), 1, 1),
        (with_drafts(make_config(), 3), 2, 3),
        (with_drafts(make_config(num_blocks=2), 3), 1, 1),
    ):
        scheduler = started(config, make_request(prompt=4, sampling=SamplingParams(ignore_eos=True)))
        plan = next_plan(scheduler)
        assert len(plan.new_rows[0].block_ids) == num_blocks
        assert (plan.rows[0].new_block_ids, plan.rows[0].max_drafts) == ((), max_drafts)


def test_blocks_for_drafts_are_appended_and_stay() -> None:
    scheduler = started(with_drafts(make_config(), 3), make_request(prompt=2, sampling=sampling()))
    first, _ = decode(scheduler, 3, 1)
    assert first.max_drafts == 3
    second, _ = decode(scheduler, 0, 2)
    assert (second.start, second.num_new_tokens, len(second.new_block_ids)) == (2, 4, 1)
    assert second.max_drafts == 3
    assert [len(decode(scheduler, 0, 3)[0].new_block_ids) for _ in range(2)] == [0, 0]


def test_drafts_without_a_block_to_spare_are_dropped_and_nobody_is_preempted() -> None:
    config = with_drafts(make_config(num_blocks=4, enable_prefix_cache=False), 3)
    requests = make_request("a", 3, sampling=sampling(4)), make_request("b", 7, sampling=sampling(4))
    scheduler = started(config, *requests)
    plan = next_plan(scheduler)
    assert scheduler.load().num_free_blocks == 1
    assert [row.max_drafts for row in plan.rows] == [2, 2]
    bring(scheduler, plan, RowResult(0, (1,), num_proposed_drafts=2), RowResult(1, (1,), num_proposed_drafts=2))
    plan = next_plan(scheduler)
    assert [(row.num_new_tokens, row.num_draft_tokens, row.new_block_ids) for row in plan.rows] == [(1, 0, ())] * 2
    assert scheduler.load().counters.num_preemptions == 0
    assert scheduler.load().num_free_blocks == 1


def test_a_preempted_sequence_begins_again_without_drafts() -> None:
    config = with_drafts(make_config(num_blocks=5, enable_prefix_cache=False), 3)
    requests = make_request("a", 8, sampling=sampling(8)), make_request("b", 7, sampling=sampling(8))
    scheduler, runner = start(config, *requests)
    events = run_until_idle(scheduler, runner)
    assert scheduler.load().counters.num_preemptions > 0
    expect_streams(events, config, *requests)


def test_only_computed_tokens_are_found_by_others() -> None:
    config = with_drafts(make_config(), 3)
    scheduler = started(config, make_request("a", (1, 2, 3), sampling=sampling()))
    decode(scheduler, 3, 4)
    decode(scheduler, 0, 5, 6)  # computed: 1 2 3 4 5; the slots after them hold rejected drafts
    scheduler.add(make_request("b", (1, 2, 3, 4, 5, 6, 7, 8, 9)))
    plan = next_plan(scheduler)
    assert [row.start for row in plan.rows] == [5, 4]


def test_blocks_that_accepted_drafts_fill_are_found_by_others() -> None:
    config = with_drafts(make_config(), 3)
    scheduler = started(config, make_request("a", (1, 2, 3, 4), sampling=sampling(5)))
    decode(scheduler, 3, 5)
    _, [event] = decode(scheduler, 0, 6, 7, 8, 9)
    assert event.finish_reason is FinishReason.LENGTH
    scheduler.add(make_request("b", (1, 2, 3, 4, 5, 6, 7, 8, 9)))
    assert only_row(scheduler).start == 8


# A step ahead.


def test_with_drafts_in_flight_a_sequence_waits_for_its_commit() -> None:
    scheduler = started(with_drafts(make_config(), 2), make_request(prompt=5, sampling=sampling(9)))
    decode(scheduler, 2, 1)
    plan = next_plan(scheduler)
    assert plan.rows[0].num_draft_tokens == 2
    assert scheduler.schedule() is None
    scheduler.check_integrity()
    bring(scheduler, plan, RowResult(0, (2,)))
    assert only_row(scheduler).start == 6


def test_a_sequence_waits_for_the_drafts_that_a_step_in_flight_may_propose() -> None:
    scheduler = started(with_drafts(make_config(max_step_tokens=4), 2), make_request(prompt=6, sampling=sampling(9)))
    part, rest = next_plan(scheduler), next_plan(scheduler)
    assert (part.rows[0].max_drafts, rest.rows[0].max_drafts) == (0, 2), "a prompt in parts waits for nothing"
    assert scheduler.schedule() is None
    bring(scheduler, part, RowResult(0))
    assert scheduler.schedule() is None
    bring(scheduler, rest, RowResult(0, (1,), num_proposed_drafts=2))
    row = only_row(scheduler)
    assert (row.start, row.num_new_tokens, row.num_draft_tokens) == (6, 3, 2)


def test_a_sequence_that_can_have_no_drafts_goes_on_from_a_placeholder() -> None:
    penalised = replace(sampling(9), presence_penalty=1.0)
    scheduler = started(with_drafts(make_config(), 2), make_request(prompt=5, sampling=penalised))
    next_plan(scheduler)
    assert only_row(scheduler).start == 5


def test_an_abort_with_drafts_in_flight_gives_everything_back_when_they_land() -> None:
    config = with_drafts(make_config(), 3)
    scheduler = started(config, make_request(prompt=5, sampling=sampling(9)))
    decode(scheduler, 3, 1)
    plan = next_plan(scheduler)
    scheduler.abort(RequestId("r"))
    scheduler.check_integrity()
    assert bring(scheduler, plan, RowResult(0, (2, 3, 4, 5), num_proposed_drafts=3)) == []
    assert scheduler.load().num_free_blocks == config.num_blocks
    assert not scheduler.has_work


def test_two_plans_in_flight_bring_the_same_tokens() -> None:
    config = with_drafts(make_config(num_blocks=10, max_step_tokens=8), 2)
    requests = [make_request(f"r{n}", 4 + n, sampling=sampling(9, ignore_eos=False, n=1 + n % 2)) for n in range(5)]
    scheduler, runner = start(config, *requests)
    events = run_a_step_ahead(scheduler, runner)
    assert scheduler.load().counters.num_accepted_draft_tokens > 0
    expect_streams(events, config, *requests)


def test_a_row_that_fails_with_drafts_in_flight_ends_its_sequence_alone() -> None:
    config = with_drafts(make_config(), 3)
    good, bad = make_request("good", 9), make_request("bad", 9)
    scheduler, runner = start(config, good, bad)
    events = run_step(scheduler, runner)
    runner.failing_rows = {1}
    events += run_until_idle(scheduler, runner)
    [failure] = [event for event in events if event.request_id == "bad" and event.finish_reason]
    assert failure.finish_reason is FinishReason.ERROR
    expect_streams(events, config, good)
