"""Dequantization in one pass, a row at a time."""

from numba import njit, prange

from rempart_engine.kernels.cpu_scalars import OPTIONS, load, round_to


@njit(**OPTIONS)
def dequantize_blocks(data, scales, rows, columns, out):  # type: ignore[no-untyped-def]
    height, width = data.shape
    for row in prange(height):
        for block in range(scales.shape[1]):
            scale = scales[row // rows, block]
            for column in range(block * columns, min((block + 1) * columns, width)):
                out[row, column] = round_to(load(data[row, column]) * scale, out[row, column])
