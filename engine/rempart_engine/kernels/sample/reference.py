"""What a choice means, in float64 and a row at a time."""

import numpy as np
import torch

from rempart_engine.kernels.sample.draws import Draws
from rempart_engine.philox import uniforms


def kept_weights(
    logits: torch.Tensor,  # [V] float32, finite or -inf, one of them finite
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> torch.Tensor:  # [V] float64
    """Probabilities, not normalised, of the tokens that pass top-k, then top-p, then min-p; 0 elsewhere.

    Likelier tokens come first, and among equals the smaller id. Top-p keeps a token if those before it have less than
    that fraction of what top-k left.
    """
    weights = torch.exp((logits.double() - logits.max().double()) / temperature)
    order = torch.sort(logits, descending=True, stable=True).indices
    ranked = weights[order]
    if top_k:
        ranked[top_k:] = 0.0
    before = ranked.cumsum(0) - ranked
    ranked = torch.where((before < top_p * ranked.sum()) & (ranked >= min_p), ranked, 0.0)
    return torch.zeros_like(weights).index_put_((order,), ranked)


def choose(logits: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and whether they are void, both [P], for logits [P, V].

    A draw goes through the kept tokens by id: it is the first at which the running total of weights exceeds the row's
    random number, a fraction of the whole.
    """
    numbers = uniforms(draws.seed, draws.positions, draws.choice)
    is_bad = ~logits.amax(dim=1).isfinite()
    token_ids = torch.zeros(len(draws), dtype=torch.int64)
    for place in np.flatnonzero(~is_bad.numpy()):
        row = logits[place]
        if draws.is_greedy[place]:
            token_ids[place] = row.argmax()
            continue
        columns = (draws.temperature, draws.top_k, draws.top_p, draws.min_p)
        temperature, top_k, top_p, min_p = (column[place].item() for column in columns)
        running = kept_weights(row, temperature, top_k, top_p, min_p).cumsum(0)
        token_ids[place] = int((running <= numbers[place] * running[-1]).sum())
    return token_ids, is_bad
