"""The choice of a token for each row of logits, without the host: greedy, or a draw by a number of the row's own."""

from dataclasses import dataclass

import torch

from rempart_engine.kernels.sample import reference
from rempart_engine.kernels.sample.draws import MAX_VOCAB_SIZE, Draws
from rempart_engine.kernels.target import runs_triton

__all__ = ["MAX_VOCAB_SIZE", "Chosen", "Draws", "choose"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Outcome for P rows, on the device of the logits."""

    token_ids: torch.Tensor  # [P] int64
    is_bad: torch.Tensor  # [P] bool: no token can be chosen (NaN, +inf, or nothing but -inf); the id is void, and 0


def choose(
    logits: torch.Tensor,  # [P, V] float32; rows may lie apart, numbers of a row may not
    draws: Draws,
) -> Chosen:
    """Choose by temperature, top-k, top-p, min-p, then a draw through the kept tokens by id (docs/adr/0006).

    A row's token is a function of its logits and its draw alone. `sampler.sample` is the same function for CPUs, fast;
    on a CPU this is the meaning in float64, slow.

    Raises:
        ValueError: shapes, types or strides do not fit.
    """
    if logits.dim() != 2 or len(logits) != len(draws):
        raise ValueError(f"logits must be [{len(draws)}, V], got {tuple(logits.shape)}")
    if not 0 < logits.shape[1] <= MAX_VOCAB_SIZE:
        raise ValueError(f"a vocabulary has 1 to {MAX_VOCAB_SIZE} tokens, got {logits.shape[1]}")
    if logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"numbers of a row must lie side by side, got strides {logits.stride()}")
    if runs_triton(logits):
        from rempart_engine.kernels.sample.kernel import choose_on_gpu

        return Chosen(*choose_on_gpu(logits, draws))
    return Chosen(*reference.choose(logits, draws))
