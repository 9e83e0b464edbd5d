"""Which cached tokens each new token's attention sees: the lightning indexer's scores and their top-k."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.cpu_scalars import as_array
from rempart_engine.kernels.cpu_tiles import TILE_COLUMNS, has_bfloat16_dot
from rempart_engine.kernels.index_cache import fp8_pages, quantize_heads
from rempart_engine.kernels.packing import columns_of_heads
from rempart_engine.kernels.select_tokens.cpu import positions_from, scores_kernel, thresholds_of
from rempart_engine.kernels.target import runs_triton

Tokens = np.ndarray[tuple[int], np.dtype[np.integer[Any]]]


@dataclass(frozen=True, slots=True)
class Selection:
    """The tokens that attention sees. A token whose count is its position + 1 sees all; its positions are void."""

    positions: torch.Tensor  # [T, K] int32, ascending up to the count
    counts: torch.Tensor  # [T] int32, at least 1

    @classmethod
    def of_everything(cls, step: StepInputs) -> "Selection":
        """Plain causal attention."""
        return cls(step.positions.new_empty(len(step.positions), 0), step.positions + 1)


def select_tokens(
    queries: torch.Tensor,  # [T, Hi, D] of the computing type, rotated
    weights: torch.Tensor,  # [T, Hi] float32, with all scale factors in them
    pool: torch.Tensor,  # [N, 64, D] of a float type, or [N, 64 * (D + 4)] uint8
    step: StepInputs,
    top_k: int,
    score_bytes: int,
) -> Selection:
    """Positions of the `top_k` largest scores of each token, exactly; of equal scores the earliest.

    A token that has no more than `top_k` to see takes them all, without scores. Scores of the others are computed for
    as many tokens at a time as `score_bytes` has room for, one at least.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    _check(queries, weights, pool)
    if runs_triton(queries):
        from rempart_engine.kernels.select_tokens.kernel import select_on_gpu

        return select_on_gpu(queries, weights, pool, step, top_k, score_bytes)
    lengths = step.positions.numpy() + 1
    selection = Selection(
        torch.empty(len(lengths), top_k if lengths.max() > top_k else 0, dtype=torch.int32),
        step.positions.clamp(max=top_k - 1) + 1,
    )
    needing = np.flatnonzero(lengths > top_k)
    if not len(needing):
        return selection
    longest = int(lengths.max())
    num_at_once = max(1, score_bytes // (4 * longest))
    scores = torch.empty(min(num_at_once, len(needing)), longest)
    for start in range(0, len(needing), num_at_once):
        tokens = needing[start : start + num_at_once]
        part = scores[: len(tokens)]
        _scores(queries[tokens], weights[tokens], pool, step, tokens, part)
        _choose(part, lengths[tokens], selection, tokens)
    return selection


def _scores(
    queries: torch.Tensor,  # [C, Hi, D]
    weights: torch.Tensor,  # [C, Hi]
    pool: torch.Tensor,
    step: StepInputs,
    tokens: Tokens,  # [C], which tokens of the step these are
    out: torch.Tensor,  # [C, S]
) -> None:
    dim = queries.shape[2]
    is_fp8 = pool.dtype == torch.uint8
    if is_fp8:
        values, scales = quantize_heads(queries)
        queries, weights = values.view(torch.float8_e4m3fn).bfloat16(), weights * scales
    in_bfloat16 = has_bfloat16_dot() and dim % 2 == 0 and queries.dtype == torch.bfloat16
    num_heads = -(-queries.shape[1] // TILE_COLUMNS) * TILE_COLUMNS
    scores_kernel(dim, is_fp8=is_fp8, in_bfloat16=in_bfloat16)(
        columns_of_heads(queries, num_heads, in_pairs=in_bfloat16)[:, 0],
        torch.nn.functional.pad(weights, (0, num_heads - queries.shape[1])).numpy(),
        as_array(pool).view(np.uint32) if in_bfloat16 and not is_fp8 else as_array(pool),
        (pool if is_fp8 else pool.new_empty(1, 4, dtype=torch.uint8)).view(torch.float32).numpy(),
        step.block_tables.numpy(),
        step.token_rows.numpy()[tokens],
        step.positions.numpy()[tokens] + 1,
        torch.get_num_threads(),
        out.numpy(),
    )


def _choose(scores: torch.Tensor, lengths: Tokens, selection: Selection, tokens: Tokens) -> None:
    """Writes the selection of tokens [C] whose scores [C, S] are those before their lengths [C]."""
    num_chosen = selection.positions.shape[1]
    rows, num_workers = scores.numpy(), torch.get_num_threads()
    thresholds = np.empty(len(tokens), np.float32)
    thresholds_of(rows.view(np.uint32), lengths, num_chosen, num_workers, thresholds.view(np.uint32))
    chosen = np.empty((len(tokens), num_chosen), np.int32)
    counts = np.empty(len(tokens), np.int32)
    positions_from(rows, lengths, thresholds, num_workers, chosen, counts)
    selection.positions.numpy()[tokens] = chosen
    selection.counts.numpy()[tokens] = counts


def _check(queries: torch.Tensor, weights: torch.Tensor, pool: torch.Tensor) -> None:
    num_tokens, num_heads, dim = queries.shape
    if weights.shape != (num_tokens, num_heads) or weights.dtype != torch.float32:
        raise ValueError(f"weights {tuple(weights.shape)} do not fit queries {tuple(queries.shape)}")
    if pool.dtype == torch.uint8:
        fp8_pages(pool, dim)
    elif pool.shape[1:] != (BLOCK_SIZE, dim) or pool.dtype != queries.dtype:
        raise ValueError(f"pool {tuple(pool.shape)} of {pool.dtype} does not fit queries {tuple(queries.shape)}")
