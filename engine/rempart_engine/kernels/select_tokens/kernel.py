"""Which tokens attention sees, on a GPU: scores of as many tokens as there is room for, then their top-k, and so on.

Nothing here waits for the GPU: everything is launched for all tokens, and programs whose tokens see no more than
`top_k` end at once.
"""

from collections.abc import Iterator

import torch

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.select_tokens import Selection, kernel_queries, kernel_scores, kernel_top_k
from rempart_engine.kernels.select_tokens.kernel_queries import Queries, quantize_queries
from rempart_engine.kernels.select_tokens.kernel_scores import launch_scores
from rempart_engine.kernels.select_tokens.kernel_top_k import launch_top_k
from rempart_engine.kernels.target import Target, target_of


def select_on_gpu(
    queries: torch.Tensor,  # [T, Hi, D]
    weights: torch.Tensor,  # [T, Hi] float32
    pool: torch.Tensor,  # [N, 64, D] of the queries' type, or [N, 64 * (D + 4)] uint8
    step: StepInputs,
    top_k: int,
    score_bytes: int,
    target: Target | None = None,
) -> Selection:
    """See `select_tokens`. Positions are [T, K] where any token could see more than K; -1 beyond the count.

    Raises:
        ValueError: the pool is not contiguous, or K is beyond what fits.
    """
    if not pool.is_contiguous():
        raise ValueError(f"the pool of index keys is not contiguous: {pool.stride()}")
    if step.max_context <= top_k:
        return Selection.of_everything(step)
    target = target or target_of(queries)
    inputs = Queries(queries.contiguous(), weights.contiguous())
    if pool.dtype == torch.uint8:
        inputs = quantize_queries(inputs.values, inputs.weights, step.positions, top_k, target)
    num_tokens = len(queries)
    selection = Selection(step.positions.new_empty(num_tokens, top_k), torch.empty_like(step.positions))
    row_size = -(-step.max_context // BLOCK_SIZE) * BLOCK_SIZE
    num_at_once = min(num_tokens, max(1, score_bytes // (4 * row_size)))
    scores = weights.new_empty(num_at_once, row_size)
    for start in range(0, num_tokens, num_at_once):
        part = slice(start, min(start + num_at_once, num_tokens))
        rows = scores[: part.stop - start]
        launch_scores(inputs, pool, step, start, top_k, target, rows)
        launch_top_k(rows, step.positions[part], step.max_context, selection.positions[part], selection.counts[part])
    return selection


def builds(target: Target) -> Iterator[Build]:
    """All that is launched here."""
    yield from kernel_queries.builds(target)
    yield from kernel_scores.builds(target)
    yield from kernel_top_k.builds()
