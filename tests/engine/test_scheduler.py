import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from rempart_engine.core.request import FinishReason, Request, RequestId, SamplingParams
from rempart_engine.core.runner import Runner
from rempart_engine.core.scheduler import Scheduler, SchedulerConfig
from rempart_engine.core.step import ErrorCode, RowResult, StepPlan, StepResult, TokenEvent, TokenLogprob
from rempart_engine.core.testing import (
    VOCAB_SIZE,
    HashModel,
    SimulatedRunner,
    make_config,
    make_request,
    run_a_step_ahead,
    run_step,
    run_until_idle,
)


def sampling(max_tokens: int | None = 4, *, ignore_eos: bool = True, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, n=n)


def start(config: SchedulerConfig, *requests: Request) -> tuple[Scheduler, SimulatedRunner]:
    scheduler = Scheduler(config)
    for request in requests:
        assert scheduler.add(request) == []
    return scheduler, SimulatedRunner(config)


def schedule(scheduler: Scheduler, runner: SimulatedRunner) -> StepPlan:
    runner.release_rows(scheduler.take_released_rows())
    plan = scheduler.schedule()
    runner.release_rows(scheduler.take_released_rows())
    assert plan is not None
    return plan


def work(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(row, start, number of new tokens) of each row."""
    return [(scheduled.row, scheduled.start, scheduled.num_new_tokens) for scheduled in plan.rows]


def output(events: Sequence[TokenEvent], request_id: str = "r", choice: int = 0) -> tuple[int, ...]:
    """Tokens of one choice, after a look at its indices and endings."""
    mine = [event for event in events if (event.request_id, event.choice) == (request_id, choice)]
    tokens: tuple[int, ...] = ()
    for event in mine:
        assert event.index == mine[0].index + len(tokens)
        tokens += event.token_ids
    assert [event.finish_reason is not None for event in mine] == [False] * (len(mine) - 1) + [True]
    return tokens


def expect_streams(events: Sequence[TokenEvent], config: SchedulerConfig, *requests: Request) -> None:
    for request in requests:
        for choice in range(request.sampling.n):
            expected, _ = HashModel().stream(request, choice, config)
            assert output(events, request.request_id, choice) == expected


# The way of one request.


def test_the_simulated_runner_is_a_runner() -> None:
    runner: Runner = SimulatedRunner(make_config())
    runner.release_rows([])


def test_a_prompt_is_computed_and_then_a_token_a_step() -> None:
    config = make_config()
    request = make_request(prompt=5, sampling=sampling(3))
    scheduler, runner = start(config, request)
    plan = schedule(scheduler, runner)
    assert work(plan) == [(0, 0, 5)]
    [new_row] = plan.new_rows
    assert (new_row.token_ids, new_row.num_prompt_tokens) == (request.prompt_token_ids, 5)
    assert len(new_row.block_ids) == 2
    events = scheduler.commit(runner.execute(plan))
    plan = schedule(scheduler, runner)
    assert work(plan) == [(0, 5, 1)]
    assert plan.new_rows == ()
    events += scheduler.commit(runner.execute(plan))
    events += run_until_idle(scheduler, runner)
    assert [event.index for event in events] == [0, 1, 2]
    assert [event.finish_reason for event in events] == [None, None, FinishReason.LENGTH]
    expect_streams(events, config, request)


def test_a_block_is_added_exactly_when_the_last_one_is_full() -> None:
    scheduler, runner = start(make_config(), make_request(prompt=6, sampling=sampling(5)))
    new_blocks = []
    while scheduler.has_work:
        plan = schedule(scheduler, runner)
        new_blocks.append([len(scheduled.new_block_ids) for scheduled in plan.rows])
        scheduler.commit(runner.execute(plan))
    assert new_blocks == [[0], [0], [0], [1], [0]]


def test_a_long_prompt_is_computed_in_chunks_and_samples_after_the_last() -> None:
    config = make_config(max_step_tokens=4)
    request = make_request(prompt=10)
    scheduler, runner = start(config, request)
    plans = []
    events = []
    for _ in range(3):
        plans.append(schedule(scheduler, runner))
        events += scheduler.commit(runner.execute(plans[-1]))
    assert [work(plan) for plan in plans] == [[(0, 0, 4)], [(0, 4, 4)], [(0, 8, 2)]]
    assert [plan.rows[0].samples for plan in plans] == [False, False, True]
    assert [event.index for event in events] == [0]
    expect_streams(events + run_until_idle(scheduler, runner), config, request)


def test_an_end_of_sequence_token_stops_it_unless_ignored() -> None:
    config = make_config()
    stopped = make_request("a", 3, sampling=sampling(150, ignore_eos=False))
    ignoring = make_request("a", 3, sampling=sampling(150))
    scheduler, runner = start(config, stopped)
    events = run_until_idle(scheduler, runner)
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].token_ids == (0,)
    assert len(output(events, "a")) < 150
    scheduler, runner = start(config, ignoring)
    events = run_until_idle(scheduler, runner)
    assert len(output(events, "a")) == 150
    assert 0 in output(events, "a")


def test_without_max_tokens_it_ends_at_the_models_length_or_that_of_the_pool() -> None:
    for config in (make_config(max_model_len=20), make_config(num_blocks=5)):
        scheduler, runner = start(config, make_request(prompt=5, sampling=sampling(None)))
        events = run_until_idle(scheduler, runner)
        assert events[-1].finish_reason is FinishReason.LENGTH
        assert len(output(events)) == 15


def test_logprobs_travel_with_their_tokens_and_prompt_logprobs_with_the_first_event() -> None:
    params = SamplingParams(max_tokens=2, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    scheduler, runner = start(make_config(max_step_tokens=3), make_request(prompt=8, sampling=params))
    first, second = run_until_idle(scheduler, runner)
    assert [logprob.logprob for logprob in first.prompt_logprobs] == [-1, -2, -3, -4, -5, -6, -7]
    assert first.logprobs == second.logprobs == (TokenLogprob(-1.0),)
    assert second.prompt_logprobs == ()


def test_preemption_before_the_first_event_does_not_double_prompt_logprobs() -> None:
    config = make_config(num_blocks=5, max_step_tokens=4, enable_prefix_cache=True)
    old = make_request("old", 7, sampling=sampling(6))
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    scheduler, runner = start(config, old)
    run_step(scheduler, runner)
    run_step(scheduler, runner)
    scheduler.add(make_request("new", 12, sampling=params))
    events = run_until_idle(scheduler, runner)
    assert scheduler.load().counters.num_preemptions == 1
    [only] = [event for event in events if event.request_id == "new"]
    assert [logprob.logprob for logprob in only.prompt_logprobs] == [-float(number) for number in range(1, 12)]


def test_replayed_output_counts_as_output_and_indices_go_on() -> None:
    config = make_config()
    whole = make_request(prompt=5, sampling=sampling(8))
    expected, _ = HashModel().stream(whole, 0, config)
    replay = make_request(prompt=(*whole.prompt_token_ids, *expected[:3]), sampling=sampling(8), num_emitted_tokens=3)
    scheduler, runner = start(config, replay)
    plan = schedule(scheduler, runner)
    assert plan.new_rows[0].num_prompt_tokens == 5
    events = scheduler.commit(runner.execute(plan)) + run_until_idle(scheduler, runner)
    assert events[0].index == 3
    assert output(events) == expected[3:]


@pytest.mark.parametrize(
    ("emitted", "max_tokens", "reason"),
    [((7, 0), 9, FinishReason.STOP), ((7, 7), 2, FinishReason.LENGTH), ((7, 7, 7), 2, FinishReason.LENGTH)],
)
def test_a_replay_that_is_over_already_is_answered_at_once(
    emitted: tuple[int, ...], max_tokens: int, reason: FinishReason
) -> None:
    scheduler = Scheduler(make_config())
    request = make_request(
        prompt=(5, 6, *emitted), sampling=sampling(max_tokens, ignore_eos=False), num_emitted_tokens=len(emitted)
    )
    [event] = scheduler.add(request)
    assert (event.index, event.token_ids, event.finish_reason) == (len(emitted), (), reason)
    assert not scheduler.has_work


# Sharing a step.


def test_decoding_sequences_get_their_token_beside_a_long_prefill() -> None:
    config = make_config(max_step_tokens=8)
    long = make_request("long", 60)
    short = make_request("short", 3, sampling=sampling(20), priority=-1)
    scheduler, runner = start(config, short)
    run_step(scheduler, runner)
    scheduler.add(long)
    plan = schedule(scheduler, runner)
    assert work(plan) == [(0, 3, 1), (1, 0, 7)]
    scheduler.commit(runner.execute(plan))
    assert work(schedule(scheduler, runner)) == [(1, 7, 7), (0, 4, 1)]


def test_prefill_goes_on_when_more_sequences_decode_than_a_step_has_tokens() -> None:
    config = make_config(max_step_tokens=4, max_num_rows=8)
    requests = [make_request(f"r{number}", 1, sampling=sampling(40)) for number in range(6)]
    scheduler, runner = start(config, *requests)
    for _ in range(4):
        run_step(scheduler, runner)
    assert scheduler.load().num_running == 6
    scheduler.add(make_request("long", 6, sampling=sampling(1)))
    events = [event for _ in range(8) for event in run_step(scheduler, runner)]
    assert "long" in {event.request_id for event in events}


def test_decoding_sequences_take_turns_when_a_step_has_too_few_tokens() -> None:
    config = make_config(max_step_tokens=2, max_num_rows=5)
    requests = [make_request(f"r{number}", 1, sampling=sampling(50)) for number in range(5)]
    scheduler, runner = start(config, *requests)
    for _ in range(10):
        run_step(scheduler, runner)
    for _ in range(10):
        served = {event.request_id for _ in range(3) for event in run_step(scheduler, runner)}
        assert len(served) == 5


def test_requests_are_admitted_by_priority_then_arrival() -> None:
    config = make_config(max_num_rows=1)
    requests = [
        make_request(name, priority=priority, sampling=sampling(1))
        for name, priority in (("a", 0), ("b", 1), ("c", 0), ("d", 1))
    ]
    scheduler, runner = start(config, *requests)
    events = run_until_idle(scheduler, runner)
    assert [event.request_id for event in events] == ["b", "d", "a", "c"]


def test_a_waiting_request_of_higher_priority_passes_a_running_prefill() -> None:
    config = make_config(max_step_tokens=8)
    scheduler, runner = start(config, make_request("long", 60, priority=0))
    run_step(scheduler, runner)
    scheduler.add(make_request("urgent", 6, priority=1))
    scheduler.add(make_request("equal", 6, priority=0))
    assert work(schedule(scheduler, runner)) == [(1, 0, 6), (2, 0, 2)]


def test_rows_bound_the_running_set() -> None:
    config = make_config(max_num_rows=2)
    requests = [make_request(f"r{number}", 3) for number in range(5)]
    scheduler, runner = start(config, *requests)
    schedule(scheduler, runner)
    assert (scheduler.load().num_running, scheduler.load().num_waiting) == (2, 3)


def test_admission_leaves_the_watermark_free_but_not_for_a_lone_sequence() -> None:
    config = make_config(num_blocks=10, watermark=0.3)
    scheduler, runner = start(config, make_request("a", 12), make_request("b", 12), make_request("c", 12))
    schedule(scheduler, runner)
    assert (scheduler.load().num_running, scheduler.load().num_free_blocks) == (2, 4)
    scheduler, runner = start(config, make_request("big", 36))
    schedule(scheduler, runner)
    assert scheduler.load().num_free_blocks == 1


def test_a_big_request_at_the_head_is_not_starved_by_small_ones() -> None:
    config = make_config(num_blocks=8)
    scheduler, runner = start(config, make_request("a", 8), make_request("big", 28), make_request("small", 2))
    run_step(scheduler, runner)
    assert scheduler.load().num_running == 1
    events = run_until_idle(scheduler, runner)
    assert [event.request_id for event in events if event.index == 0] == ["big", "small"]


# Prefix cache and siblings.


def test_a_second_request_takes_the_cached_blocks_and_gives_the_same_tokens() -> None:
    config = make_config()
    first = make_request("first", [7] * 13)
    second = make_request("second", [7] * 13)
    scheduler, runner = start(config, first)
    run_until_idle(scheduler, runner)
    scheduler.add(second)
    plan = schedule(scheduler, runner)
    assert work(plan) == [(0, 12, 1)]
    events = scheduler.commit(runner.execute(plan)) + run_until_idle(scheduler, runner)
    assert [event.num_cached_tokens for event in events] == [12, 0, 0, 0]
    expect_streams(events, config, second)
    counters = scheduler.load().counters
    assert (counters.num_prefix_cache_query_tokens, counters.num_prefix_cache_hit_tokens) == (26, 12)


def test_a_block_in_flight_is_not_found_by_others() -> None:
    config = make_config()
    scheduler, runner = start(config, make_request("first", [7] * 9), make_request("second", [7] * 9))
    assert work(schedule(scheduler, runner)) == [(0, 0, 9), (1, 0, 9)]


def test_siblings_wait_for_the_prompt_of_choice_0_and_find_it_cached() -> None:
    config = make_config(max_step_tokens=5)
    request = make_request(prompt=9, sampling=sampling(6, n=3))
    scheduler, runner = start(config, request)
    assert work(schedule(scheduler, runner)) == [(0, 0, 5)]
    assert scheduler.load().num_waiting == 2
    scheduler, runner = start(config, request)
    events = run_until_idle(scheduler, runner)
    cached = {event.choice: event.num_cached_tokens for event in events if event.index == 0}
    assert cached == {0: 0, 1: 8, 2: 8}
    expect_streams(events, config, request)
    assert len({output(events, choice=choice) for choice in range(3)}) == 3


def test_siblings_go_on_when_choice_0_fails() -> None:
    config = make_config()
    request = make_request(sampling=sampling(n=2))
    scheduler, runner = start(config, request)
    runner.failing_rows = {0}
    [failed] = run_step(scheduler, runner)
    assert (failed.choice, failed.finish_reason) == (0, FinishReason.ERROR)
    events = run_until_idle(scheduler, runner)
    assert output(events, choice=1) == HashModel().stream(request, 1, config)[0]


# Preemption.


def test_the_lowest_and_latest_is_preempted_and_its_stream_goes_on_unchanged() -> None:
    config = make_config(num_blocks=6, enable_prefix_cache=False)
    requests = [
        make_request("low", 7, priority=-1, sampling=sampling(10)),
        make_request("early", 7, sampling=sampling(10)),
        make_request("late", 7, sampling=sampling(10)),
    ]
    scheduler, runner = start(config, *requests)
    events = run_step(scheduler, runner) + run_step(scheduler, runner)
    assert scheduler.load().num_running == 3
    preempted: list[tuple[int, str]] = []
    while scheduler.has_work:
        before = {event.request_id for event in events if event.finish_reason is None}
        load = scheduler.load()
        new_events = run_step(scheduler, runner)
        if scheduler.load().counters.num_preemptions > load.counters.num_preemptions:
            preempted += [
                (len(preempted), name) for name in sorted(before - {event.request_id for event in new_events})
            ]
        events += new_events
        scheduler.check_integrity()
    assert preempted[0] == (0, "low")
    expect_streams(events, config, *requests)


def test_a_preempted_sequence_starts_again_with_its_output_in_a_new_row() -> None:
    config = make_config(num_blocks=5, enable_prefix_cache=False)
    first, second = make_request("a", 8, sampling=sampling(8)), make_request("b", 7, sampling=sampling(4))
    scheduler, runner = start(config, first, second)
    events = run_step(scheduler, runner) + run_step(scheduler, runner)
    assert scheduler.load().num_free_blocks == 0
    events += run_step(scheduler, runner)
    assert scheduler.load().counters.num_preemptions == 1
    again = None
    while again is None:
        plan = schedule(scheduler, runner)
        again = next(iter(plan.new_rows), None)
        events += scheduler.commit(runner.execute(plan))
    expected, _ = HashModel().stream(second, 0, config)
    assert again.token_ids == (*second.prompt_token_ids, *expected[: len(again.token_ids) - 7])
    assert len(again.token_ids) > 7
    assert again.num_prompt_tokens == 7
    expect_streams(events + run_until_idle(scheduler, runner), config, first, second)


def test_many_requests_in_a_tiny_pool_all_finish_with_their_own_tokens() -> None:
    config = make_config(num_blocks=7, max_step_tokens=6)
    requests = [make_request(f"r{n}", 3 + n, sampling=sampling(12), priority=n % 2) for n in range(9)]
    scheduler, runner = start(config, *requests)
    events = run_until_idle(scheduler, runner)
    assert scheduler.load().counters.num_preemptions > 0
    expect_streams(events, config, *requests)


# Refusals.


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request(prompt=[]), "prompt_token_ids must hold at least one token"),
        (make_request(prompt=[1, VOCAB_SIZE]), f"prompt_token_ids .* vocab_size = {VOCAB_SIZE}"),
        (make_request(prompt=[-1]), f"prompt_token_ids .* vocab_size = {VOCAB_SIZE}"),
        (make_request(prompt=17), "17 prompt tokens and 4 output tokens exceed max_model_len = 20"),
        (make_request(prompt=20, sampling=sampling(None)), "20 prompt tokens and 1 output tokens exceed max_model_len"),
        (make_request(prompt=[1] * 5, num_emitted_tokens=5), "at least one token beside the emitted"),
        (make_request(prompt=[1] * 5, num_emitted_tokens=-1), "num_emitted_tokens must be at least 0"),
        (make_request(prompt=[1] * 5, num_emitted_tokens=1, sampling=sampling(n=2)), "num_emitted_tokens needs n = 1"),
        (make_request(sampling=sampling(n=5)), "n is 5, the limit is max_num_waiting = 4"),
        (make_request(sampling=SamplingParams(max_tokens=2, min_tokens=3)), "min_tokens is 3, .* max_tokens = 2"),
        (make_request(sampling=SamplingParams(max_tokens=2, logit_bias={99: 1.0})), "logit_bias .* vocab_size"),
        (
            make_request(sampling=SamplingParams(max_tokens=2, allowed_token_ids=(99,))),
            "allowed_token_ids .* vocab_size",
        ),
        (make_request(sampling=SamplingParams(max_tokens=2, stop_token_ids=(99,))), "stop_token_ids .* vocab_size"),
        (make_request(sampling=SamplingParams(max_tokens=2, logprobs=99)), "logprobs is 99, .* vocab_size"),
        (make_request(deadline=float("nan")), "deadline must be a number"),
    ],
)
def test_a_request_that_can_never_succeed_is_answered_with_the_limit(request_: Request, message: str) -> None:
    scheduler = Scheduler(make_config(max_model_len=20, max_num_waiting=4))
    [event] = scheduler.add(request_)
    assert event.finish_reason is FinishReason.ERROR
    assert event.error is not None
    assert event.error.code is ErrorCode.INVALID_ARGUMENT
    with pytest.raises(ValueError, match=message):
        raise ValueError(event.error.message)
    assert not scheduler.has_work
    assert scheduler.load().counters.num_finished[FinishReason.ERROR] == 1


def test_a_request_that_the_whole_pool_cannot_hold_is_refused() -> None:
    [event] = Scheduler(make_config(num_blocks=3)).add(make_request(prompt=9))
    assert event.error is not None
    assert "exceed the KV pool: 3 blocks of 4 tokens" in event.error.message


def test_a_request_that_just_fits_the_pool_finishes() -> None:
    config = make_config(num_blocks=3)
    request = make_request(prompt=8)
    scheduler, runner = start(config, request)
    expect_streams(run_until_idle(scheduler, runner), config, request)


def test_a_request_id_that_runs_is_refused_and_free_again_afterwards() -> None:
    scheduler, runner = start(make_config(), make_request("r"))
    [event] = scheduler.add(make_request("r"))
    assert event.error is not None
    assert "'r' is running already" in event.error.message
    run_until_idle(scheduler, runner)
    assert scheduler.add(make_request("r")) == []


def test_a_full_waiting_queue_refuses_and_counts_choices() -> None:
    scheduler, runner = start(make_config(max_num_waiting=3, max_num_rows=1), make_request("a", sampling=sampling(n=2)))
    [event] = scheduler.add(make_request("b", sampling=sampling(n=2)))
    assert event.error is not None
    assert event.error.code is ErrorCode.RESOURCE_EXHAUSTED
    assert "max_num_waiting = 3" in event.error.message
    run_step(scheduler, runner)
    assert scheduler.add(make_request("b", sampling=sampling(n=2))) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_blocks", 0),
        ("max_num_rows", 0),
        ("max_step_tokens", 1),
        ("watermark", 1.0),
        ("max_num_waiting", 0),
    ],
)
def test_a_config_out_of_range_names_its_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        make_config(**{field: value})  # type: ignore[arg-type]  # one field, of whichever type


# Endings from outside.


def test_abort_ends_every_live_choice_and_frees_everything() -> None:
    scheduler, runner = start(make_config(), make_request(sampling=sampling(n=3)), make_request("other"))
    run_step(scheduler, runner)
    events = scheduler.abort(RequestId("r"))
    assert [(event.choice, event.index, event.finish_reason) for event in events] == [
        (0, 1, FinishReason.ABORT),
        (1, 0, FinishReason.ABORT),
        (2, 0, FinishReason.ABORT),
    ]
    assert {event.error.code for event in events if event.error} == {ErrorCode.CANCELLED}
    assert scheduler.abort(RequestId("r")) == []
    assert {event.request_id for event in run_until_idle(scheduler, runner)} == {"other"}
    assert scheduler.load().num_free_blocks == scheduler.load().num_blocks


def test_abort_of_a_parked_request_leaves_nothing_waiting() -> None:
    scheduler = Scheduler(make_config())
    scheduler.add(make_request(sampling=sampling(n=3)))
    assert len(scheduler.abort(RequestId("r"))) == 3
    assert not scheduler.has_work
    scheduler.check_integrity()


def test_blocks_and_row_of_an_aborted_sequence_come_back_only_after_its_step() -> None:
    config = make_config(num_blocks=4, max_num_rows=2)
    scheduler, runner = start(config, make_request("a", 8))
    plan = schedule(scheduler, runner)
    result = runner.execute(plan)
    [event] = scheduler.abort(RequestId("a"))
    assert event.finish_reason is FinishReason.ABORT
    assert scheduler.load().num_free_blocks == 2
    assert scheduler.take_released_rows() == []
    assert scheduler.has_work
    scheduler.check_integrity()
    assert scheduler.add(make_request("a", 3)) == []
    assert scheduler.commit(result) == []
    assert scheduler.load().num_free_blocks == 4
    assert scheduler.take_released_rows() == [0]
    scheduler.check_integrity()


def test_a_row_is_not_used_again_before_it_was_reported() -> None:
    config = make_config(max_num_rows=1)
    scheduler, runner = start(config, make_request("a", sampling=sampling(1)), make_request("b"))
    plan = schedule(scheduler, runner)
    scheduler.commit(runner.execute(plan))
    assert scheduler.schedule() is None
    assert scheduler.take_released_rows() == [0]
    plan_b = scheduler.schedule()
    assert plan_b is not None
    assert plan_b.new_rows[0].row == 0


def test_deadlines_end_requests_at_their_time_wherever_they_are() -> None:
    config = make_config(max_num_rows=1)
    scheduler, runner = start(
        config,
        make_request("runs", deadline=10.0, sampling=sampling(50)),
        make_request("waits", deadline=5.0),
        make_request("unlimited"),
    )
    run_step(scheduler, runner)
    assert scheduler.expire(4.9) == []
    [event] = scheduler.expire(5.0)
    assert (event.request_id, event.finish_reason) == ("waits", FinishReason.ABORT)
    assert event.error is not None
    assert event.error.code is ErrorCode.DEADLINE_EXCEEDED
    assert [event.request_id for event in scheduler.expire(1e9)] == ["runs"]
    assert {event.request_id for event in run_until_idle(scheduler, runner)} == {"unlimited"}


def test_a_request_that_ended_in_time_does_not_expire() -> None:
    scheduler, runner = start(make_config(), make_request(deadline=5.0))
    run_until_idle(scheduler, runner)
    assert scheduler.expire(6.0) == []


def test_a_failed_row_ends_its_sequence_alone() -> None:
    config = make_config()
    good, bad = make_request("good", 9), make_request("bad", 9)
    scheduler, runner = start(config, good, bad)
    runner.failing_rows = {1}
    events = run_step(scheduler, runner)
    [failure] = [event for event in events if event.request_id == "bad"]
    assert failure.finish_reason is FinishReason.ERROR
    assert failure.error is not None
    assert (failure.error.code, failure.error.message) == (ErrorCode.INTERNAL, "not a number in the logits")
    expect_streams(events + run_until_idle(scheduler, runner), config, good)


def test_what_a_sequence_computed_before_it_failed_is_not_found_by_the_next() -> None:
    scheduler, runner = start(make_config(max_step_tokens=8), make_request("bad", [9] * 12))
    run_step(scheduler, runner)
    runner.failing_rows = {0}
    [failure] = run_step(scheduler, runner)
    assert failure.finish_reason is FinishReason.ERROR
    scheduler.add(make_request("again", [9] * 12))
    assert work(schedule(scheduler, runner)) == [(0, 0, 8)]


# The door to a step ahead.


def test_two_plans_in_flight_bring_the_same_tokens() -> None:
    config = make_config(num_blocks=8, max_step_tokens=6)
    requests = [make_request(f"r{n}", 4 + n, sampling=sampling(9, ignore_eos=False, n=1 + n % 2)) for n in range(5)]
    scheduler, runner = start(config, *requests)
    events = run_a_step_ahead(scheduler, runner)
    assert scheduler.load().counters.num_preemptions > 0
    expect_streams(events, config, *requests)


def test_the_next_plan_goes_on_from_a_token_that_is_not_known_yet() -> None:
    scheduler, runner = start(make_config(), make_request(prompt=5, sampling=sampling(3)))
    first, second, third = (schedule(scheduler, runner) for _ in range(3))
    assert [work(plan) for plan in (first, second, third)] == [[(0, 0, 5)], [(0, 5, 1)], [(0, 6, 1)]]
    assert scheduler.schedule() is None
    events = [event for plan in (first, second, third) for event in scheduler.commit(runner.execute(plan))]
    assert len(output(events)) == 3


def test_what_was_computed_beyond_the_end_is_dropped() -> None:
    config = make_config()
    stop = HashModel().stream(make_request(), 0, config)[0][0]
    request = make_request(sampling=SamplingParams(max_tokens=9, stop_token_ids=(stop,)))
    scheduler, runner = start(config, request)
    first, second = runner.execute(schedule(scheduler, runner)), runner.execute(schedule(scheduler, runner))
    [event] = scheduler.commit(first)
    assert (event.token_ids, event.finish_reason) == ((stop,), FinishReason.STOP)
    assert scheduler.load().num_free_blocks < config.num_blocks
    assert scheduler.commit(second) == []
    assert scheduler.load().num_free_blocks == config.num_blocks
    assert not scheduler.has_work


def start_short_of_blocks(max_tokens: int) -> tuple[Scheduler, SimulatedRunner, StepResult]:
    """Two sequences, no block left, one plan in flight; the first one lacks a block for the next."""
    requests = make_request("first", 7, sampling=sampling(9)), make_request("last", 6, sampling=sampling(max_tokens))
    scheduler, runner = start(make_config(num_blocks=4, enable_prefix_cache=False), *requests)
    run_step(scheduler, runner)
    return scheduler, runner, runner.execute(schedule(scheduler, runner))


def test_one_in_flight_gives_way_when_its_step_is_committed() -> None:
    scheduler, runner, result = start_short_of_blocks(max_tokens=9)
    assert scheduler.schedule() is None
    assert scheduler.load().num_running == 2
    assert {event.request_id for event in scheduler.commit(result)} == {"first", "last"}
    assert scheduler.load().num_running == 1
    assert work(schedule(scheduler, runner)) == [(0, 8, 1)]
    scheduler.check_integrity()


def test_nobody_gives_way_while_blocks_of_an_ended_one_are_on_their_way_back() -> None:
    scheduler, runner, result = start_short_of_blocks(max_tokens=9)
    scheduler.abort(RequestId("last"))
    assert scheduler.schedule() is None
    scheduler.commit(result)
    assert scheduler.load().counters.num_preemptions == 0
    assert work(schedule(scheduler, runner)) == [(0, 8, 1)]


def test_one_that_ends_while_it_was_to_give_way_just_ends() -> None:
    scheduler, runner, result = start_short_of_blocks(max_tokens=2)
    assert scheduler.schedule() is None
    events = scheduler.commit(result)
    assert [event.finish_reason for event in events] == [None, FinishReason.LENGTH]
    scheduler.check_integrity()
    assert scheduler.load().counters.num_preemptions == 0
    assert work(schedule(scheduler, runner)) == [(0, 8, 1)]


def test_plans_are_committed_in_order_row_for_row() -> None:
    scheduler, runner = start(make_config(), make_request())
    first, second = schedule(scheduler, runner), schedule(scheduler, runner)
    results = [runner.execute(first), runner.execute(second)]
    with pytest.raises(ValueError, match="result of step 2 does not match plan 1"):
        scheduler.commit(results[1])
    with pytest.raises(ValueError, match="row for row"):
        scheduler.commit(StepResult(1, (RowResult(5, (1,)),)))
    scheduler.commit(results[0])
    scheduler.commit(results[1])
    with pytest.raises(ValueError, match="no step is in flight"):
        scheduler.commit(results[1])


def test_a_row_that_should_have_sampled_but_did_not_is_an_error_of_that_row() -> None:
    scheduler = Scheduler(make_config())
    scheduler.add(make_request())
    plan = scheduler.schedule()
    assert plan is not None
    [event] = scheduler.commit(StepResult(plan.step, (RowResult(0),)))
    assert event.finish_reason is FinishReason.ERROR
    assert event.error is not None
    assert "sampled 0 tokens where 1 to 1 were due" in event.error.message


# Load and cost.


def test_load_tells_what_waits_runs_and_was_done() -> None:
    config = make_config(max_num_rows=1, max_step_tokens=4)
    scheduler, runner = start(config, make_request("a", 6, sampling=sampling(2)), make_request("b", 3))
    run_step(scheduler, runner)
    load = scheduler.load()
    assert (load.num_waiting, load.num_running, load.num_waiting_tokens) == (1, 1, 5)
    assert (load.num_free_blocks, load.num_blocks, load.num_steps) == (62, 64, 1)
    run_until_idle(scheduler, runner)
    counters = scheduler.load().counters
    assert (counters.num_scheduled_tokens, counters.num_output_tokens) == (6 + 1 + 3 + 3, 2 + 4)
    assert counters.num_finished[FinishReason.LENGTH] == 2
    assert counters.num_scheduled_tokens == runner.num_computed_tokens


@dataclass(frozen=True)
class StepCost:
    """The least of some steps."""

    num_calls: int
    """Of functions, Python's and others: half a millisecond on an ordinary core is worth 5,000."""
    cpu_s: float
    """Unlike a clock's, not lengthened by what else the machine does."""


def cost_of_a_step(num_requests: int) -> StepCost:
    """Of a scheduler with 64 rows; the other requests wait."""
    config = SchedulerConfig(
        num_blocks=2000, max_num_rows=64, max_step_tokens=512, max_model_len=4096, max_num_waiting=20_000, vocab_size=8
    )
    scheduler = Scheduler(config)
    for number in range(num_requests):
        scheduler.add(make_request(f"r{number}", [number % 8] * 8, sampling=sampling(200)))

    def step(measured: Callable[[Callable[[], object]], float]) -> float:
        plans: list[StepPlan | None] = []
        planning = measured(lambda: plans.append(scheduler.schedule()))
        (plan,) = plans
        assert plan is not None
        result = StepResult(plan.step, tuple(RowResult(row.row, (1,) if row.samples else ()) for row in plan.rows))
        return planning + measured(lambda: scheduler.commit(result))

    for _ in range(5):
        step(_num_calls)
    cost = StepCost(int(min(step(_num_calls) for _ in range(5))), min(step(_cpu_s) for _ in range(30)))
    assert scheduler.load().num_running == 64
    return cost


def _num_calls(act: Callable[[], object]) -> float:
    num_calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(before)
    return num_calls


def _cpu_s(act: Callable[[], object]) -> float:
    began_s = time.thread_time()
    act()
    return time.thread_time() - began_s


def test_a_step_of_64_sequences_costs_far_less_than_a_millisecond_whoever_waits() -> None:
    alone, beside_a_crowd = cost_of_a_step(64), cost_of_a_step(10_064)
    assert beside_a_crowd.num_calls < 5_000
    assert beside_a_crowd.num_calls < 1.1 * alone.num_calls
    assert beside_a_crowd.cpu_s < 2 * alone.cpu_s
