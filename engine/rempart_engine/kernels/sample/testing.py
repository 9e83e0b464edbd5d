"""Judging choices in tests: float32 may fall on either side of a border that float64 draws."""

import itertools

import torch

from rempart_engine.kernels.sample.draws import Draws
from rempart_engine.kernels.sample.reference import kept_weights
from rempart_engine.philox import uniforms

_ROUNDING = 1e-5


def is_choice(token_id: int, logits: torch.Tensor, draws: Draws, place: int) -> bool:
    """Whether the reference chooses this token of logits [V], or would if a number were within rounding of its value.

    These numbers are the random one, top-p and min-p.
    """
    logits = logits.cpu()
    if draws.is_greedy[place]:
        return token_id == int(logits.argmax())
    number = float(uniforms(draws.seed, draws.positions, draws.choice)[place])
    top_p, min_p = float(draws.top_p[place]), float(draws.min_p[place])
    top_ps = {top_p, top_p * (1 - _ROUNDING), min(1.0, top_p * (1 + _ROUNDING))} if top_p < 1.0 else {1.0}
    min_ps = {min_p, min_p * (1 - _ROUNDING), min(1.0, min_p * (1 + _ROUNDING))}
    for near_top_p, near_min_p in itertools.product(sorted(top_ps), sorted(min_ps)):
        weights = kept_weights(logits, float(draws.temperature[place]), int(draws.top_k[place]), near_top_p, near_min_p)
        end = float(weights[: token_id + 1].sum() / weights.sum())
        begin = float(weights[:token_id].sum() / weights.sum())
        if weights[token_id] > 0 and begin - _ROUNDING <= number <= end + _ROUNDING:
            return True
    return False
