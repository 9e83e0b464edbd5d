"""Row-wise quantization in two passes over each token."""

import numpy as np
from numba import njit, prange

from rempart_engine.kernels.cpu_scalars import OPTIONS, ROUNDER, load
from rempart_engine.kernels.quantize_rows.reference import ZERO_POINT

_LANES = 16


@njit(**OPTIONS)
def quantize_rows(x, q, scales):  # type: ignore[no-untyped-def]
    num_tokens, width = x.shape
    for token in prange(num_tokens):
        lanes = np.zeros(_LANES, np.float32)
        poison = np.zeros(_LANES, np.float32)  # NaN where a value is not finite: integers could not tell
        whole = width - width % _LANES
        for start in range(0, whole, _LANES):
            for lane in range(_LANES):
                value = load(x[token, start + lane])
                lanes[lane] = max(lanes[lane], abs(value))
                poison[lane] += value * np.float32(0.0)
        for i in range(whole, width):
            lanes[0] = max(lanes[0], abs(load(x[token, i])))
            poison[0] += load(x[token, i]) * np.float32(0.0)
        scale = lanes.max() / np.float32(127.0)
        factor = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
        for i in range(width):
            rounded = (load(x[token, i]) * factor + ROUNDER) - ROUNDER
            q[token, i] = np.uint8(np.int32(rounded) + ZERO_POINT)
        scales[token] = scale + poison.sum()
