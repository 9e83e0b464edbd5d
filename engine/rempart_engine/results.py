"""From what a step computed to what its plan asked for, on the host."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rempart_engine.core.step import RowResult, ScheduledRow, StepPlan, TokenLogprob
from rempart_engine.host_copies import to_device
from rempart_engine.inputs import num_outputs
from rempart_engine.kept import Kept
from rempart_engine.places import Places

NOT_FINITE = "the model's logits for this request were not finite, or no token was allowed"


def first_outputs(rows: Sequence[ScheduledRow]) -> NDArray[np.int64]:
    """Where each row's logits begin."""
    counts = np.array([num_outputs(row) for row in rows], np.int64)
    return np.cumsum(counts) - counts


def sampled_logits(plan: StepPlan, logits: torch.Tensor) -> torch.Tensor:
    """Logits of the places where the plan samples, [P, V]."""
    if not any(row.wants_prompt_logprobs for row in plan.rows):
        return logits
    wanted = [
        np.arange(first + num_outputs(row) - row.num_draft_tokens - 1, first + num_outputs(row))
        for row, first in zip(plan.rows, first_outputs(plan.rows), strict=True)
        if row.samples
    ]
    index = np.concatenate(wanted) if wanted else np.zeros(0, np.int64)
    return logits[to_device(index, logits.device)]


def row_results(
    plan: StepPlan,
    places: Places,
    kept: Kept | None,
    prompt_logprobs_of_row: Mapping[int, tuple[TokenLogprob, ...]],
    num_drafts: Mapping[int, int],
) -> tuple[RowResult, ...]:
    """One entry per row of the plan, in its order."""
    samples = iter(()) if kept is None else kept.by_row(places)
    results = []
    for row in plan.rows:
        prompt = prompt_logprobs_of_row.get(row.row, ())
        if not row.samples:
            results.append(RowResult(row.row, prompt_logprobs=prompt))
            continue
        is_bad, token_ids, logprobs = next(samples)
        if is_bad:
            results.append(RowResult(row.row, error=NOT_FINITE))
        else:
            drafts = num_drafts.get(row.row, 0)
            results.append(RowResult(row.row, token_ids, logprobs, prompt, num_proposed_drafts=drafts))
    return tuple(results)
