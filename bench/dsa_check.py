"""No speed without a right answer: what is timed, held against float32 in plain torch."""

import torch
from bench.dsa_caches import SCALE, Caches, NewTokens, slots_of
from bench.dsa_contestants import TorchSketch, attend, choose, dense
from bench.dsa_points import V32, Case

from rempart_engine.kernels.index_cache import quantize_heads, read_index_keys
from rempart_engine.kernels.latent_cache import read_latents
from rempart_engine.kernels.select_tokens.reference import index_scores

_MOST_CHECKED_DENSE = 8192
_TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float32: 1e-4}
"""Of a result's difference, relative to its size: weights and results are rounded, to 2**-9 in bfloat16."""
_TIE = 1e-4
"""Relative to the largest score: nearer ones may change places when sums are made in another order."""
_SKETCH_TOLERANCE = 2.0**-5
"""Of the sketch, whose attention scores are rounded to bfloat16 before they are exponents."""
_LEAST_SHARED = 0.98
"""Of the tokens that the sketch chooses, whose scores are rounded to bfloat16."""


class WrongAnswerError(Exception):
    """Something computes wrong, so its speed means nothing."""


def check(case: Case, caches: Caches, new: NewTokens) -> None:
    """The last sequence of the case: what is chosen, and what sparse and dense attention make of it.

    Raises:
        WrongAnswerError: one is wrong.
    """
    token = case.batch - 1
    selection = choose(caches, new)
    positions = torch.arange(case.context)
    if case.num_chosen < case.context:
        positions = selection.positions[token, : int(selection.counts[token])].long()
        check_choice(positions, _scores(caches, new, token), V32.indexer.top_k, case.name)
    elif int(selection.counts[token]) != case.context:
        raise WrongAnswerError(f"{case.name}: sees {int(selection.counts[token])} of all tokens")
    sparse_expected = _attended(caches, new, token, positions)
    check_close(attend(caches, new, selection)[token], sparse_expected, f"{case.name}, sparse")
    if case.context <= _MOST_CHECKED_DENSE:
        expected = _attended(caches, new, token, torch.arange(case.context))
        check_close(dense(caches, new)[token], expected, f"{case.name}, dense")


def check_sketch(case: Case, caches: Caches, new: NewTokens, sketch: TorchSketch) -> None:
    """The sketch and the kernels agree: everywhere in dense attention, and nearly in what is chosen.

    Raises:
        WrongAnswerError: they do not.
    """
    name = f"{case.name}, plain torch"
    check_close(sketch.dense(), dense(caches, new)[0].float(), f"{name}, dense", _SKETCH_TOLERANCE)
    if case.num_chosen == case.context:
        return
    chosen, selection = sketch.choose(), choose(caches, new)
    attended = sketch.attend(selection.positions[0].long())
    check_close(attended, attend(caches, new, selection)[0].float(), f"{name}, sparse", _SKETCH_TOLERANCE)
    shared = torch.isin(chosen, selection.positions[0]).float().mean()
    if shared < _LEAST_SHARED:
        raise WrongAnswerError(f"{name}: shares {shared:.1%} of the chosen tokens")


def check_choice(positions: torch.Tensor, scores: torch.Tensor, top_k: int, what: str) -> None:
    """Positions [K] are those of the largest scores [S], whatever the order among ties.

    Raises:
        WrongAnswerError: they are not.
    """
    expected = scores.topk(top_k)
    near = _TIE * scores.abs().max()
    threshold = expected.values[-1]
    num_chosen = len(set(positions.tolist()))
    if num_chosen != top_k or positions.max() >= len(scores):
        raise WrongAnswerError(f"{what}: {num_chosen} tokens chosen of {len(scores)}, not {top_k}")
    strangers = positions[~torch.isin(positions, expected.indices)]
    missed = expected.indices[~torch.isin(expected.indices, positions)]
    if (scores[strangers] < threshold - near).any() or (scores[missed] > threshold + near).any():
        raise WrongAnswerError(f"{what}: {len(strangers)} of {top_k} chosen tokens are not among the best")


def check_close(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float | None = None) -> None:
    """Results [H, R] differ by no more than their format rounds, or than `tolerance` of their size.

    Raises:
        WrongAnswerError: they differ by more.
    """
    error = float((found.float() - expected).norm() / expected.norm())
    if not error <= (tolerance or _TOLERANCE[found.dtype]):
        raise WrongAnswerError(f"{what}: differs by {error:.1e} of its size")


def _scores(caches: Caches, new: NewTokens, token: int) -> torch.Tensor:  # [S]
    queries = new.index_queries[token]
    if caches.index_keys.dtype == torch.uint8:
        values, scales = quantize_heads(queries)
        queries = values.view(torch.float8_e4m3fn).float() * scales[:, None]
    keys = read_index_keys(caches.index_keys, slots_of(new.step, token), V32.indexer.head_dim)
    return index_scores(queries, new.index_weights[token], keys)


def _attended(caches: Caches, new: NewTokens, token: int, positions: torch.Tensor) -> torch.Tensor:  # [H, R]
    latents, rope_keys = read_latents(caches.latents, slots_of(new.step, token)[positions], V32.kv_lora_rank)
    scores = new.latent_queries[token].float() @ latents.T + new.rope_queries[token].float() @ rope_keys.T
    return (scores * SCALE).softmax(-1) @ latents
