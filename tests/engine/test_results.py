"""What the scheduler is told of each row of a step."""

import torch

from rempart_engine.core.request import SamplingParams
from rempart_engine.core.step import NewRow, RowResult, ScheduledRow, StepPlan, TokenLogprob
from rempart_engine.places import sampling_places
from rempart_engine.results import NOT_FINITE, row_results
from rempart_engine.sampler import verify
from rempart_engine.sampling_rows import SamplingRows


def test_each_row_is_told_its_own_tokens_logprobs_drafts_and_failure() -> None:
    plan = StepPlan(
        step=1,
        new_rows=(),
        rows=(
            ScheduledRow(3, 9, 3, (), samples=True, num_draft_tokens=2),
            ScheduledRow(1, 0, 8, (), samples=False, wants_prompt_logprobs=True),
            ScheduledRow(0, 5, 1, (), samples=True),
            ScheduledRow(2, 7, 2, (), samples=True, num_draft_tokens=1),
        ),
    )
    state = SamplingRows(4, 5)
    for row in range(4):
        sampling = SamplingParams(temperature=0.0, logprobs=0 if row == 3 else None)
        state.add(row, NewRow(row, (0,), 1, sampling, 0, ()), ())
    logits = torch.nn.functional.one_hot(torch.tensor([4, 2, 1, 0, 3, 3]), 5).float()
    logits[3] = torch.nan
    drafts = torch.tensor([4, 1, -1, -1, 3, -1])
    places = sampling_places(plan.rows)
    verified = verify(logits.clone(), places, drafts, state)
    prompt_logprobs = (TokenLogprob(-1.5),)
    expected = torch.log_softmax(logits, dim=1)
    assert row_results(plan, places, verified, {1: prompt_logprobs}, {3: 2, 0: 1}) == (
        RowResult(
            3, (4, 2), (TokenLogprob(float(expected[0, 4])), TokenLogprob(float(expected[1, 2]))), num_proposed_drafts=2
        ),
        RowResult(1, prompt_logprobs=prompt_logprobs),
        RowResult(0, error=NOT_FINITE),
        RowResult(2, (3, 3)),
    )
