"""From logits to token ids, for all rows of a step at once.

    raw log-probabilities → bias, allowed ids, min_tokens → penalties → temperature → top-k → top-p → min-p → draw

A row's token is a function of its logits, its parameters and (seed, choice, position): neither the other rows nor
their number change a bit of it. Nor do drafts: one is accepted exactly if it is the token that this function gives in
its place (docs/adr/0006).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rempart_engine.candidates import Filters, at_least, count_thresholds, draw
from rempart_engine.host_copies import to_device
from rempart_engine.logprobs import RowLogprobs, row_logprobs
from rempart_engine.nucleus import first_exceeding, keep_nucleus
from rempart_engine.philox import uniforms
from rempart_engine.places import Places
from rempart_engine.sampling_rows import Rows, SamplingRows

_FIRST_CANDIDATES = 128
"""How many candidates a row that filters by top-p alone looks at first; most rows end among them."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Outcome for R rows, on the device of the logits."""

    token_ids: torch.Tensor  # [R] int64
    is_bad: torch.Tensor  # [R] bool: no token can be chosen (logits not finite, or every token forbidden); id is void
    logprobs: RowLogprobs | None
    """Of those rows that asked for them; None when none did."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Outcome for P places of R rows, on the device of the logits."""

    sampled: Sampled  # of the places
    is_kept: torch.Tensor  # [P] bool: the token goes on the row's sequence
    is_bad: torch.Tensor  # [R] bool: nothing of the row is kept, for not even its first token can be chosen


def sample(
    logits: torch.Tensor,  # [R, V] float32 (used as scratch: its contents are lost) or of a smaller type
    rows: Rows,  # [R]; a row may come several times, for several positions, if `state.may_repeat` it
    positions: NDArray[np.int64],  # [R], of the token to be sampled, in its sequence
    state: SamplingRows,
) -> Sampled:
    """Choose the next token of each row. `state` is read only: `state.append` is told what became of it."""
    logits = logits.float()
    wants = np.flatnonzero(state.wants_logprobs[rows])
    raw_logprobs = torch.log_softmax(_selected(logits, wants), dim=1) if len(wants) else None
    token_ids, is_bad = _edit_and_choose(logits, rows, positions, state)
    logprobs = None
    if raw_logprobs is not None:
        num_top = state.num_top_logprobs[rows[wants]]
        logprobs = row_logprobs(wants, raw_logprobs, token_ids[torch.from_numpy(wants).to(token_ids.device)], num_top)
    return Sampled(token_ids, is_bad, logprobs)


def verify(
    logits: torch.Tensor,  # [P, V], as for `sample`
    places: Places,  # P places of R rows
    draft_token_ids: torch.Tensor,  # [P] int64, the draft in each place; of a row's last place it is void
    state: SamplingRows,
) -> Verified:
    """Choose the token of each place, and keep of each row those up to the first that differs from its draft.

    These are the tokens that as many steps without drafts would have chosen, for each was computed after the ones
    before it. A place after the first where no token can be chosen is left to the next step, as its first.
    """
    assert state.may_repeat(places.rows[~places.is_only]), "drafts for rows that sample one token at a time"
    sampled = sample(logits, places.rows, places.positions, state)
    is_kept, is_bad = accepted(sampled.token_ids, sampled.is_bad, places, draft_token_ids)
    return Verified(sampled, is_kept, is_bad)


def accepted(
    token_ids: torch.Tensor,  # [P] int64, chosen
    is_bad: torch.Tensor,  # [P] bool: no token can be chosen
    places: Places,
    draft_token_ids: torch.Tensor,  # [P] int64
) -> tuple[torch.Tensor, torch.Tensor]:  # [P] bool, [R] bool
    """Which tokens are kept, and which rows keep none because not even their first can be chosen."""
    columns = (places.row_numbers, np.flatnonzero(places.is_first), places.is_last)
    row_of_place, first_places, is_last = (to_device(column, token_ids.device) for column in columns)
    ends = (token_ids != draft_token_ids) | is_bad | is_last
    num_ends_before = ends.cumsum(0) - ends.long()  # among the places of all rows, each of which ends once at least
    is_reached = num_ends_before == num_ends_before[first_places][row_of_place]
    return is_reached & ~is_bad, is_bad[first_places]


def draft(
    logits: torch.Tensor,  # [R, V] of whatever model drafts, as for `sample`
    rows: Rows,  # [R]
    positions: NDArray[np.int64],  # [R], of the tokens to be drafted
    state: SamplingRows,
) -> torch.Tensor:  # [R] int64
    """Guess tokens: choose as `sample` does, with the same random numbers, so that like logits give like tokens.

    Where no token can be chosen, the guess is any token.
    """
    return _edit_and_choose(logits.float(), rows, positions, state)[0]


def _edit_and_choose(
    logits: torch.Tensor, rows: Rows, positions: NDArray[np.int64], state: SamplingRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and whether they are void, both [R], for raw float32 logits, which are scratch."""
    is_bad = ~logits.amax(dim=1).isfinite()
    if state.edits(rows):
        state.edit(logits, rows)
        is_bad |= ~logits.amax(dim=1).isfinite()
    return _choose(logits, is_bad, rows, positions, state), is_bad


def _choose(
    logits: torch.Tensor, is_bad: torch.Tensor, rows: Rows, positions: NDArray[np.int64], state: SamplingRows
) -> torch.Tensor:
    """Token ids [R] for edited logits."""
    is_greedy = state.is_greedy[rows]
    if is_greedy.all():
        return logits.argmax(dim=1)
    if is_bad.any():  # some probabilities to go on with; the result is void
        logits[is_bad] = -torch.inf
        logits[is_bad, 0] = 0.0
    groups = [(np.flatnonzero(is_greedy), False), (np.flatnonzero(~is_greedy), True)]
    token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for chosen, is_drawn in groups:
        if len(chosen):
            part = _selected(logits, chosen)
            ids = _drawn(part, rows[chosen], positions[chosen], state) if is_drawn else part.argmax(dim=1)
            token_ids[torch.from_numpy(chosen).to(logits.device)] = ids
    return token_ids


def _drawn(logits: torch.Tensor, rows: Rows, positions: NDArray[np.int64], state: SamplingRows) -> torch.Tensor:
    """Token ids [R] of random draws; logits are scratch."""
    device = logits.device
    logits.sub_(logits.amax(dim=1, keepdim=True))  # so that no temperature, however low, makes them overflow
    logits.div_(torch.from_numpy(state.temperature[rows]).to(device)[:, None])
    probabilities = torch.softmax(logits, dim=1)
    numbers = torch.from_numpy(uniforms(state.seed[rows], positions, state.choice[rows])).to(device)
    is_ranked = (state.top_k[rows] > 0) | (state.top_p[rows] < 1.0)
    token_ids = torch.empty(len(rows), dtype=torch.int64, device=device)
    for chosen, draw_part in ((np.flatnonzero(~is_ranked), _draw_from_all), (np.flatnonzero(is_ranked), _draw_ranked)):
        if len(chosen):
            index = torch.from_numpy(chosen).to(device)
            token_ids[index] = draw_part(_selected(probabilities, chosen), numbers[index], rows[chosen], state)
    return token_ids


def _draw_from_all(
    probabilities: torch.Tensor, numbers: torch.Tensor, rows: Rows, state: SamplingRows
) -> torch.Tensor:  # [R]
    """Draws from whole vocabularies, less what min-p drops."""
    min_p = state.min_p[rows]
    if min_p.any():
        factors = torch.from_numpy(min_p).float().to(probabilities.device)[:, None]
        least = probabilities.amax(dim=1, keepdim=True) * factors
        probabilities = torch.where(probabilities >= least, probabilities, 0.0)
    return first_exceeding(probabilities, numbers)


def _draw_ranked(
    probabilities: torch.Tensor, numbers: torch.Tensor, rows: Rows, state: SamplingRows
) -> torch.Tensor:  # [R]
    """Draws among a row's most likely tokens: top-k, top-p, then min-p."""
    vocab_size = probabilities.shape[1]
    has_top_k = state.top_k[rows] > 0
    top_k = np.where(has_top_k, state.top_k[rows], vocab_size)
    counts = np.where(has_top_k, top_k, min(_FIRST_CANDIDATES, vocab_size))
    device = probabilities.device
    columns = (torch.from_numpy(column).to(device) for column in (top_k, state.top_p[rows], state.min_p[rows]))
    filters = Filters(*columns)
    thresholds = count_thresholds(probabilities, torch.from_numpy(counts).to(device))
    holds_top_k = torch.from_numpy(counts >= top_k).to(device)
    token_ids, enough = draw(at_least(probabilities, thresholds, 0.0), filters, holds_top_k, numbers)
    rest = torch.nonzero(~enough)[:, 0]
    if len(rest):
        nucleus = keep_nucleus(probabilities[rest], filters.top_p[rest])
        token_ids[rest] = _draw_from_all(nucleus, numbers[rest], rows[rest.cpu().numpy()], state)
    return token_ids


def _selected(values: torch.Tensor, chosen: NDArray[np.int64]) -> torch.Tensor:
    """Rows `chosen` (ascending) of a tensor [R, ...], itself when these are all."""
    return values if len(chosen) == len(values) else values[torch.from_numpy(chosen).to(values.device)]
