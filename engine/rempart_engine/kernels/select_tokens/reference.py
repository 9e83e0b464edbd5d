"""What the indexer chooses, query by query, in float32."""

import torch

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.index_cache import read_index_keys


def index_scores(
    query: torch.Tensor,  # [Hi, D]
    weights: torch.Tensor,  # [Hi]
    keys: torch.Tensor,  # [S, D]
) -> torch.Tensor:  # [S]
    """Sum over heads of weight times the positive part of the product (DeepSeek-V3.2-Exp, equation 1)."""
    return (torch.relu(query.float() @ keys.float().T) * weights[:, None]).sum(0)


def select_tokens(
    queries: torch.Tensor,  # [T, Hi, D]
    weights: torch.Tensor,  # [T, Hi] float32
    pool: torch.Tensor,  # index cache of the layer
    step: StepInputs,
    top_k: int,
) -> list[torch.Tensor]:
    """For each token: ascending positions, its own at most, of the top_k largest scores; of equal ones the earliest."""
    chosen = []
    for token, position in enumerate(step.positions.tolist()):
        table = step.block_tables[int(step.token_rows[token])].long()
        places = torch.arange(position + 1)
        slots = table[places // 64] * 64 + places % 64
        scores = index_scores(queries[token], weights[token], read_index_keys(pool, slots, queries.shape[2]))
        order = scores.sort(descending=True, stable=True).indices[:top_k]
        chosen.append(order.sort().values)
    return chosen
