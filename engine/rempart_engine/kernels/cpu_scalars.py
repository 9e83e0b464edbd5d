"""Scalar building blocks of the CPU kernels: small floats as their bits, and an exponential that vectorises.

A bfloat16 tensor crosses into these kernels as an array of uint16, an e4m3 one as uint8; arithmetic is float32. Every
kernel is compiled with `OPTIONS`: a multiply and an add may be fused, but nothing is reordered, so that a result
depends on its own row alone and not on its neighbours in the batch (docs/adr/0003-batch-invariance.md). A kernel that
is made for certain constants closes over plain numbers only: functions would keep it out of the compiler's cache.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

_ARITHMETIC: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
INLINED: dict[str, Any] = {**_ARITHMETIC, "forceinline": True}
OPTIONS: dict[str, Any] = {**_ARITHMETIC, "cache": True, "parallel": True}

# torch and numba then share one OpenMP pool; two pools would fight for the same cores.
numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]  # set at run time by numba

ROUNDER = np.float32(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds a small float32 to the nearest whole number, halves to even."""
_LOG2_E = np.float32(1.0 / math.log(2.0))
_LN_2_HIGH = np.float32(0.693359375)
_TWO_TO_120 = np.float32(2.0**120)
_LN_2_LOW = np.float32(-2.12194440e-4)


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as an array, bfloat16 as uint16. No copy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


@intrinsic
def float_of_bits(typing_context, bits):  # type: ignore[no-untyped-def]  # numba's protocol
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def bits_of_float(typing_context, number):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


def load(number: Any) -> Any:
    """An element of an array from `as_array` as float32."""
    raise NotImplementedError("only inside compiled kernels")


@overload(load)
def _load(number):  # type: ignore[no-untyped-def]
    if number == types.uint16:
        return lambda number: float_of_bits(np.uint32(number) << np.uint32(16))  # type: ignore[call-arg]  # numba passes the context
    if number == types.uint8:
        return lambda number: _float_of_e4m3(number)  # noqa: PLW0108 -- the compiler wants this signature
    return lambda number: number


def round_to(number: Any, like: Any) -> Any:
    """A float32 as an element of the same kind as `like`; bfloat16 rounds to nearest even, NaN stays NaN."""
    raise NotImplementedError("only inside compiled kernels")


@overload(round_to)
def _round_to(number, like):  # type: ignore[no-untyped-def]
    if like == types.uint16:
        return lambda number, like: _bfloat16_bits(number)
    return lambda number, like: number


@numba.njit(**INLINED)
def _float_of_e4m3(byte):  # type: ignore[no-untyped-def]
    """Exponent and fraction put where float32 has them are the value times 2**-120, subnormals too."""
    bits = np.uint32(byte)
    magnitude = bits & np.uint32(0x7F)
    small: Any = float_of_bits((magnitude << np.uint32(20)) | ((bits & np.uint32(0x80)) << np.uint32(24)))  # type: ignore[call-arg]
    return np.float32(np.nan) if magnitude == np.uint32(0x7F) else small * _TWO_TO_120


@numba.njit(**INLINED)
def bfloat16_pair(low, high):  # type: ignore[no-untyped-def]
    """Two float32 rounded to bfloat16, in one uint32."""
    return np.uint32(_bfloat16_bits(low)) | (np.uint32(_bfloat16_bits(high)) << np.uint32(16))


@numba.njit(**INLINED)
def pair_halves(first, second):  # type: ignore[no-untyped-def]
    """Of two pairs: the pair of their lower halves, and that of their upper ones."""
    low = np.uint32((first & np.uint32(0xFFFF)) | (second << np.uint32(16)))
    return low, np.uint32((first >> np.uint32(16)) | (second & np.uint32(0xFFFF0000)))


@numba.njit(**INLINED)
def _bfloat16_bits(number):  # type: ignore[no-untyped-def]
    bits: Any = bits_of_float(np.float32(number))  # type: ignore[call-arg]
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint16(np.uint32(0x7FC0) if number != number else rounded >> np.uint32(16))


@numba.njit(**INLINED)
def exp(number):  # type: ignore[no-untyped-def]
    """e**number for number <= 88, relative error below 2e-7 (Cephes' expf: range reduction and degree-5 polynomial)."""
    clamped = max(np.float32(number), np.float32(-87.0))
    whole = np.floor(clamped * _LOG2_E + np.float32(0.5))
    rest = (clamped - whole * _LN_2_HIGH) - whole * _LN_2_LOW
    poly = np.float32(1.9875691500e-4)
    poly = poly * rest + np.float32(1.3981999507e-3)
    poly = poly * rest + np.float32(8.3334519073e-3)
    poly = poly * rest + np.float32(4.1665795894e-2)
    poly = poly * rest + np.float32(1.6666665459e-1)
    poly = poly * rest + np.float32(5.0000001201e-1)
    value = poly * rest * rest + rest + np.float32(1.0)
    return value * float_of_bits(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))  # type: ignore[call-arg]
