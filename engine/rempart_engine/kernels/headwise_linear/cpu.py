"""One small product per head, tokens in tiles."""

from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
from numba import njit, prange

from rempart_engine.kernels.cpu_scalars import OPTIONS
from rempart_engine.kernels.cpu_tiles import TILE_ROWS, add_product_bfloat16, add_product_float32


@cache
def kernel_for(*, in_bfloat16: bool) -> Callable[..., None]:
    """The kernel for float32 elements, or for pairs of bfloat16."""

    @njit(**OPTIONS)
    def headwise_linear(x, weight, y):  # type: ignore[no-untyped-def]
        """y [T, H, N] = x [T, H, K] @ weight [H, K, N] head by head; T a multiple of 8, N of 32."""
        for head in prange(weight.shape[0]):
            for token in range(0, x.shape[0], TILE_ROWS):
                out = y[token : token + TILE_ROWS, head]
                out[:] = np.float32(0.0)
                if in_bfloat16:
                    add_product_bfloat16(x[token : token + TILE_ROWS, head], weight[head], out)
                else:
                    add_product_float32(x[token : token + TILE_ROWS, head], weight[head], out)

    return cast(Callable[..., None], headwise_linear)
