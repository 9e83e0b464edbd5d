"""How tokens are to be chosen: the parameters of sampling that are left once logits are edited."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_VOCAB_SIZE = 2**18
"""Many enough for every model; few enough that a token's id fits beside its logit in 64 bits with room to spare, and
that the sum of all weights, each at most 2**44, does too."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Parameters of P choices, on the host, where they decide what work there is."""

    is_greedy: NDArray[np.bool_]  # [P]: the likeliest token; nothing else below matters
    temperature: NDArray[np.float32]  # [P], above 0
    top_k: NDArray[np.int64]  # [P], 0 for all
    top_p: NDArray[np.float64]  # [P], in (0, 1]
    min_p: NDArray[np.float64]  # [P], in [0, 1]
    seed: NDArray[np.uint64]  # [P]
    choice: NDArray[np.int64]  # [P]
    positions: NDArray[np.int64]  # [P]

    def __len__(self) -> int:
        return len(self.is_greedy)

    @property
    def is_ranked(self) -> NDArray[np.bool_]:  # [P]
        """Which tokens may be drawn depends on their order."""
        return ~self.is_greedy & ((self.top_k > 0) | (self.top_p < 1.0))
