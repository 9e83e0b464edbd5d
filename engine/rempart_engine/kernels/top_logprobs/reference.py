"""What log-probabilities mean, in float64."""

import numpy as np
import torch
from numpy.typing import NDArray


def top_logprobs(
    logits: torch.Tensor, rows: NDArray[np.int64], token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the chosen tokens [W] float32; ids [W, M] int64 and float32 values of the likeliest, most likely first."""
    wanted = logits[torch.from_numpy(rows)]
    logprobs = torch.log_softmax(wanted.double(), dim=1)
    ids = torch.sort(wanted, dim=1, descending=True, stable=True).indices[:, :num_top]
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    return chosen.float(), ids, logprobs.gather(1, ids).float()
