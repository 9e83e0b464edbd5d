"""Log-probabilities of chosen tokens and of the likeliest alternatives, without the host."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rempart_engine.kernels.sample import MAX_VOCAB_SIZE
from rempart_engine.kernels.target import runs_triton
from rempart_engine.kernels.top_logprobs import reference


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """Outcome for W rows, on the device of the logits; void for a row that has NaN or +inf, or nothing but -inf."""

    chosen: torch.Tensor  # [W] float32
    ids: torch.Tensor  # [W, M] int64: most likely first, among equals the smaller id; of a value of -inf the id is void
    logprobs: torch.Tensor  # [W, M] float32


def top_logprobs(
    logits: torch.Tensor,  # [P, V] float32; rows may lie apart, numbers of a row may not
    rows: NDArray[np.int64],  # [W], which of them
    token_ids: torch.Tensor,  # [W] int64, chosen
    num_top: int,  # M, at most V
) -> TopLogprobs:
    """Natural log-probabilities.

    Raises:
        ValueError: shapes, types or strides do not fit.
    """
    if logits.dim() != 2 or not 0 < logits.shape[1] <= MAX_VOCAB_SIZE:
        raise ValueError(f"logits must be [P, V] with V up to {MAX_VOCAB_SIZE}, got {tuple(logits.shape)}")
    if logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"numbers of a row must lie side by side, got strides {logits.stride()}")
    if token_ids.shape != rows.shape or token_ids.dtype != torch.int64 or not token_ids.is_contiguous():
        raise ValueError(f"token ids must be contiguous int64 [{len(rows)}], got {token_ids.dtype} {token_ids.shape}")
    if not 0 <= num_top <= logits.shape[1]:
        raise ValueError(f"num_top must be 0 to {logits.shape[1]}, got {num_top}")
    if runs_triton(logits):
        from rempart_engine.kernels.top_logprobs.kernel import top_logprobs_on_gpu

        return TopLogprobs(*top_logprobs_on_gpu(logits, rows, token_ids, num_top))
    return TopLogprobs(*reference.top_logprobs(logits, rows, token_ids, num_top))
