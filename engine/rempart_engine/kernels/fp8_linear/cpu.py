"""Product with a weight that is dequantized a tile at a time, into memory that stays in the core's first cache."""

import numpy as np
from numba import njit, prange

from rempart_engine.kernels.cpu_scalars import OPTIONS, load
from rempart_engine.kernels.cpu_tiles import TILE_COLUMNS, TILE_ROWS, add_product_float32

_DEPTH = 128
"""Inputs whose weights are dequantized at a time."""


@njit(**OPTIONS)
def multiply(x, packed, scales, rows, columns, y):  # type: ignore[no-untyped-def]
    """y [T, tiles * 32] = x [T, K] @ W^T, all float32, T a multiple of 8; packed [tiles, K, 32] e4m3."""
    num_tiles, width, _ = packed.shape
    for tile in prange(num_tiles):
        right = np.empty((_DEPTH, TILE_COLUMNS), np.float32)
        own = np.empty(TILE_COLUMNS, np.float32)
        first = tile * TILE_COLUMNS
        for token in range(0, x.shape[0], TILE_ROWS):
            y[token : token + TILE_ROWS, first : first + TILE_COLUMNS] = np.float32(0.0)
        start = 0
        while start < width:
            # Up to the end of the block, so that a column has one scale.
            end = min(start + _DEPTH, (start // columns + 1) * columns, width)
            for column in range(TILE_COLUMNS):
                own[column] = scales[min((first + column) // rows, scales.shape[0] - 1), start // columns]
            for i in range(end - start):
                for column in range(TILE_COLUMNS):
                    right[i, column] = load(packed[tile, start + i, column]) * own[column]
            for token in range(0, x.shape[0], TILE_ROWS):
                add_product_float32(
                    x[token : token + TILE_ROWS, start:end],
                    right[: end - start],
                    y[token : token + TILE_ROWS, first : first + TILE_COLUMNS],
                )
            start = end
