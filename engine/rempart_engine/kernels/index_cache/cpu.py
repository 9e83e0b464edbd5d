"""Index keys to e4m3 in one pass over each."""

from typing import Any

import numpy as np
from numba import njit, prange

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.kernels.cpu_scalars import INLINED, OPTIONS, ROUNDER, bits_of_float, float_of_bits
from rempart_engine.kernels.fp8 import LARGEST

LEAST_AMAX = np.float32(1e-4)
"""No scale is smaller than a key of this size needs."""
_LARGEST = np.float32(LARGEST)
_LEAST_NORMAL = np.float32(2.0**-6)
_SUBNORMALS = np.float32(2.0**9)
"""A subnormal is a whole number of these parts."""


@njit(**INLINED)
def _power_of_two(needed):  # type: ignore[no-untyped-def]
    """The least power of two that is not below a positive number."""
    bits: Any = bits_of_float(needed)  # type: ignore[call-arg]  # numba passes the context
    return float_of_bits(np.uint32((bits + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)))


@njit(**INLINED)
def _e4m3(number):  # type: ignore[no-untyped-def]
    """Nearest e4m3, ties to even, for a number of at most 448; NaN stays NaN."""
    bits: Any = bits_of_float(number)  # type: ignore[call-arg]
    sign = (bits >> np.uint32(24)) & np.uint32(0x80)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    rounded = (magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    normal = rounded - np.uint32(120 << 3)
    subnormal = np.uint32((abs(number) * _SUBNORMALS + ROUNDER) - ROUNDER)
    finite = subnormal if abs(number) < _LEAST_NORMAL else normal
    return np.uint8((np.uint32(0x7F) if number != number else finite) | sign)


@njit(**OPTIONS)
def store_fp8_keys(keys, slots, pages, scales):  # type: ignore[no-untyped-def]
    """Keys [T, D] float32 into pages [N, 64 (D + 4)] uint8, whose float32 view is `scales`."""
    num_tokens, dim = keys.shape
    for token in prange(num_tokens):
        block, offset = slots[token] // BLOCK_SIZE, slots[token] % BLOCK_SIZE
        largest = LEAST_AMAX
        for d in range(dim):
            largest = max(largest, abs(keys[token, d]))
        scale = _power_of_two(largest / _LARGEST)
        for d in range(dim):
            pages[block, offset * dim + d] = _e4m3(keys[token, d] / scale)
        scales[block, BLOCK_SIZE * dim // 4 + offset] = scale
