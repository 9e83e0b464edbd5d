"""Steps launched ahead, and steps for which memory does not suffice."""

import pytest

from rempart_engine.core.pipeline import Pipeline
from rempart_engine.core.request import FinishReason
from rempart_engine.core.scheduler import Scheduler
from rempart_engine.core.step import ErrorCode, StepPlan, TokenEvent
from rempart_engine.core.step_budget import StepBudget
from rempart_engine.core.testing import HashModel, SimulatedRunner, make_config, make_request, with_drafts


def run(scheduler: Scheduler, runner: SimulatedRunner) -> tuple[list[StepPlan], list[TokenEvent]]:
    """All plans and events until nothing is left to do."""
    pipeline = Pipeline(scheduler, runner)
    plans: list[StepPlan] = []
    events: list[TokenEvent] = []
    while scheduler.has_work:
        plan, brought = pipeline.advance()
        plans += [] if plan is None else [plan]
        events += brought
        scheduler.check_integrity()
    assert pipeline.is_empty
    return plans, events


def outputs(events: list[TokenEvent]) -> dict[str, tuple[int, ...]]:
    said: dict[str, tuple[int, ...]] = {}
    for event in events:
        said[event.request_id] = said.get(event.request_id, ()) + event.token_ids
    return said


def test_a_runner_that_computes_at_once_has_nothing_in_flight() -> None:
    config = make_config()
    scheduler, pipeline_runner = Scheduler(config), SimulatedRunner(config)
    pipeline = Pipeline(scheduler, pipeline_runner)
    scheduler.add(make_request("a"))
    while scheduler.has_work:
        plan, _ = pipeline.advance()
        assert plan is not None
        assert pipeline.is_empty


def test_a_step_is_planned_while_the_one_before_it_is_computed() -> None:
    config = make_config()
    scheduler, runner = Scheduler(config), SimulatedRunner(config, computes_elsewhere=True)
    scheduler.add(make_request("a"))
    pipeline = Pipeline(scheduler, runner)
    first, events = pipeline.advance()
    assert (first is not None, events, pipeline.is_empty) == (True, [], False)
    second, events = pipeline.advance()
    assert second is not None
    assert len(events) == 1, "the first step's token, after the second was launched"


@pytest.mark.parametrize("computes_elsewhere", [False, True])
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_lost_steps_change_no_stream(num_drafts: int, computes_elsewhere: bool) -> None:
    config = with_drafts(make_config(max_step_tokens=64), num_drafts)
    scheduler = Scheduler(config)
    runner = SimulatedRunner(config, computes_elsewhere=computes_elsewhere, most_tokens=17)
    requests = [make_request(f"r{number}", 9 + number) for number in range(6)]
    for request in requests:
        assert scheduler.add(request) == []
    plans, events = run(scheduler, runner)
    assert outputs(events) == {request.request_id: HashModel().stream(request, 0, config)[0] for request in requests}
    assert scheduler.load().counters.num_preemptions > 0
    assert any(plan.num_tokens > 17 for plan in plans), "the first were lost"
    assert plans[-1].num_tokens <= 17


def test_when_steps_cannot_be_smaller_their_requests_fail_and_others_go_on() -> None:
    config = make_config(max_step_tokens=32)
    scheduler, runner = Scheduler(config), SimulatedRunner(config, num_steps_to_lose=2)
    scheduler.add(make_request("a", 40))
    pipeline = Pipeline(scheduler, runner)
    assert pipeline.advance()[1] == [], "the budget is halved"
    plan, [event] = pipeline.advance()
    assert plan is not None
    assert plan.num_tokens == 16
    assert event.finish_reason is FinishReason.ERROR
    assert event.error is not None
    assert event.error.code is ErrorCode.RESOURCE_EXHAUSTED
    assert "max_step_tokens" in event.error.message
    scheduler.add(make_request("b"))
    _, events = run(scheduler, runner)
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_the_budget_grows_back_after_a_run_of_good_steps() -> None:
    budget = StepBudget(100)
    budget.shrink()
    budget.shrink()
    assert budget.num_tokens == 25
    for _ in range(64):
        budget.note_good_step()
    assert budget.num_tokens == 50
    for _ in range(64):
        budget.note_good_step()
    assert budget.num_tokens == 100
    for _ in range(8):
        budget.shrink()
    assert (budget.num_tokens, budget.is_least) == (16, True)
    assert StepBudget(3).is_least
