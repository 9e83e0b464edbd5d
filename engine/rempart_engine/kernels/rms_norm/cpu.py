"""Residual add and RMS norm in one pass over each token."""

import numpy as np
from numba import njit, prange

from rempart_engine.kernels.cpu_scalars import OPTIONS, load, round_to

_LANES = 16


@njit(**OPTIONS)
def add_rms_norm(residual, delta, weight, eps, out):  # type: ignore[no-untyped-def]
    num_tokens, width = residual.shape
    for token in prange(num_tokens):
        # One sum per lane keeps the loop vectorisable and the order of additions fixed.
        lanes = np.zeros(_LANES, np.float32)
        whole = width - width % _LANES
        for start in range(0, whole, _LANES):
            for lane in range(_LANES):
                number = residual[token, start + lane] + load(delta[token, start + lane])
                residual[token, start + lane] = number
                lanes[lane] += number * number
        for i in range(whole, width):
            number = residual[token, i] + load(delta[token, i])
            residual[token, i] = number
            lanes[0] += number * number
        total = np.float32(0.0)
        for lane in range(_LANES):
            total += lanes[lane]
        factor = np.float32(1.0) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            out[token, i] = round_to(residual[token, i] * factor * weight[i], out[token, i])
