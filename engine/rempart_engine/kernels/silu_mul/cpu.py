"""Gated activation in one pass over each token."""

import numpy as np
from numba import njit, prange

from rempart_engine.kernels.cpu_scalars import OPTIONS, exp, load, round_to


@njit(**OPTIONS)
def silu_mul(gate_up, out):  # type: ignore[no-untyped-def]
    num_tokens, width = out.shape
    for token in prange(num_tokens):
        for i in range(width):
            gate = load(gate_up[token, i])
            value = gate / (np.float32(1.0) + exp(min(-gate, np.float32(88.0)))) * load(gate_up[token, width + i])
            out[token, i] = round_to(value, out[token, i])
