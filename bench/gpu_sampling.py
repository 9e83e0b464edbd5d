"""The choice of tokens from logits."""

from collections.abc import Iterator

import numpy as np
import torch
from bench import gpu_work
from bench.dsa_check import WrongAnswerError
from bench.gpu_points import Point, Sizes

from rempart_engine.kernels.sample import Chosen, Draws, choose
from rempart_engine.kernels.sample.reference import kept_weights
from rempart_engine.philox import uniforms

_NEAR = 1e-5
"""How near to a token's edge, as a fraction of all, a random number may lie for the neighbour to be right too."""


def sampling_points(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """Greedy, drawn from everything, and drawn from what top-k and top-p leave."""
    for batch in (sizes.batches[-1], 1):
        logits = 3.0 * torch.randn(
            batch, sizes.model.vocab_size, generator=torch.Generator(device).manual_seed(8), device=device
        )
        for name, draws in (
            ("greedy", _draws(batch, is_greedy=True)),
            ("temperature", _draws(batch)),
            ("top-k 50, top-p 0.9", _draws(batch, top_k=50, top_p=0.9)),
            ("top-p 0.9", _draws(batch, top_p=0.9)),
        ):
            yield _point(name, logits, draws)


def _draws(batch: int, *, is_greedy: bool = False, top_k: int = 0, top_p: float = 1.0) -> Draws:
    return Draws(
        is_greedy=np.full(batch, is_greedy),
        temperature=np.full(batch, 0.8, np.float32),
        top_k=np.full(batch, top_k, np.int64),
        top_p=np.full(batch, top_p),
        min_p=np.zeros(batch),
        seed=np.arange(batch, dtype=np.uint64),
        choice=np.zeros(batch, np.int64),
        positions=np.arange(batch, dtype=np.int64),
    )


def _point(name: str, logits: torch.Tensor, draws: Draws) -> Point:
    batch, vocab_size = logits.shape

    def run() -> Chosen:
        return choose(logits, draws)

    def check(found: Chosen) -> None:
        for row in {0, batch - 1}:
            check_token(int(found.token_ids[row]), logits[row], draws, row)
        if found.is_bad.any():
            raise WrongAnswerError(f"{name}: finite logits are called bad")

    return Point("sample", f"{name} x {batch}", (gpu_work.sampling(batch, vocab_size),), run, check)


def check_token(token_id: int, logits: torch.Tensor, draws: Draws, row: int) -> None:
    """The token is the row's: the likeliest, or the one in whose share of the kept weights the random number lies.

    Raises:
        WrongAnswerError: it is not.
    """
    if draws.is_greedy[row]:
        if logits[token_id] != logits.max():
            raise WrongAnswerError(f"row {row}: token {token_id} is not the likeliest")
        return
    weights = kept_weights(
        logits, float(draws.temperature[row]), int(draws.top_k[row]), float(draws.top_p[row]), float(draws.min_p[row])
    )
    until = (weights.cumsum(0) / weights.sum())[token_id].item()
    share = (weights / weights.sum())[token_id].item()
    number = float(uniforms(draws.seed, draws.positions, draws.choice)[row])
    if not until - share - _NEAR <= number <= until + _NEAR:
        raise WrongAnswerError(f"row {row}: {number:.6f} does not lie in the share of token {token_id}")
