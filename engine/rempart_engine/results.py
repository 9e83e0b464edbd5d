"""From what a step sampled to what the scheduler is told of each row."""

from collections.abc import Mapping

import numpy as np

from rempart_engine.core.step import RowResult, StepPlan, TokenLogprob
from rempart_engine.places import Places
from rempart_engine.sampler import Verified

NOT_FINITE = "the model's logits for this request were not finite, or no token was allowed"


def row_results(
    plan: StepPlan,
    places: Places,
    verified: Verified,
    prompt_logprobs_of_row: Mapping[int, tuple[TokenLogprob, ...]],
    num_proposed_drafts_of_row: Mapping[int, int],
) -> tuple[RowResult, ...]:
    """One result for each row of the plan, in its order.

    Args:
        places: those of the plan's rows that sample.
        prompt_logprobs_of_row: by row, of those that have some.
        num_proposed_drafts_of_row: by row, of those that have some.
    """
    is_bad = verified.is_bad.tolist()
    kept = np.flatnonzero(verified.is_kept.cpu().numpy())
    token_ids = verified.sampled.token_ids.tolist()
    logprobs = verified.sampled.logprobs
    logprobs_of_place = [()] * len(token_ids) if logprobs is None else logprobs.token_logprobs(len(token_ids))
    kept_of_row: list[list[int]] = [[] for _ in is_bad]
    for place, number in zip(kept.tolist(), places.row_numbers[kept].tolist(), strict=True):
        kept_of_row[number].append(place)
    results, number = [], 0
    for scheduled in plan.rows:
        row = scheduled.row
        prompt_logprobs = prompt_logprobs_of_row.get(row, ())
        if not scheduled.samples:
            results.append(RowResult(row, prompt_logprobs=prompt_logprobs))
            continue
        if is_bad[number]:
            results.append(RowResult(row, error=NOT_FINITE))
        else:
            mine = kept_of_row[number]
            results.append(
                RowResult(
                    row,
                    token_ids=tuple(token_ids[place] for place in mine),
                    logprobs=tuple(logprob for place in mine for logprob in logprobs_of_place[place]),
                    prompt_logprobs=prompt_logprobs,
                    num_proposed_drafts=num_proposed_drafts_of_row.get(row, 0),
                )
            )
        number += 1
    return tuple(results)
