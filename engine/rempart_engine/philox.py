"""Random numbers that are a pure function of a key and a counter: Philox4x32-10 (Salmon et al., SC 2011).

No state is kept between draws, so a draw is the same whatever was drawn before it, beside it, or on which engine.
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Blocks of 128 random bits: counter [..., 4], key [..., 2] -> [..., 4], all uint32."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> _WORD) ^ c1 ^ k0, product1 & _LOW
        c2, c3 = (product0 >> _WORD) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def uniforms(
    seeds: NDArray[np.uint64], positions: NDArray[np.int64], choices: NDArray[np.int64]
) -> NDArray[np.float64]:
    """One number in the open interval (0, 1) for each (seed, position, choice), all [R]; 52 random bits each."""
    key = np.stack((seeds & _LOW, seeds >> _WORD), axis=-1).astype(np.uint32)
    counter = np.zeros((len(seeds), 4), np.uint32)
    counter[:, 0] = positions
    counter[:, 1] = choices
    words = philox4x32(counter, key)[:, :2].astype(np.uint64)
    bits = (words[:, 0] >> np.uint64(6)) << np.uint64(26) | words[:, 1] >> np.uint64(6)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52
