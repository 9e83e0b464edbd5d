"""Logistic function, row by row."""

import numpy as np
from numba import njit, prange

from rempart_engine.kernels.cpu_scalars import OPTIONS, exp


@njit(**OPTIONS)
def sigmoid(x, out):  # type: ignore[no-untyped-def]
    for row in prange(x.shape[0]):
        for i in range(x.shape[1]):
            number = x[row, i]
            value = np.float32(1.0) / (np.float32(1.0) + exp(min(-number, np.float32(88.0))))
            out[row, i] = value if number == number else number
