"""Scalar building blocks of the Triton kernels: the same numbers on every GPU, and in Triton's interpreter.

Three things differ between the machines that these kernels run on, and each is settled here once:

- GPUs before sm_89 have no instructions for e4m3: its bytes are decoded and encoded by integer arithmetic there, with
  the same results.
- The interpreter keeps bfloat16 as integers: it multiplies them as such in `tl.dot`, and it cuts where it should round.
- Rounding e4m3 in the interpreter is not to nearest even.

Rules for whoever uses them: bfloat16 is converted to float32 before any arithmetic, products go through `dot`, and
narrowing goes through `cast`.
"""

import triton
import triton.language as tl

from rempart_engine.kernels.target import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)
E4M3_LARGEST = tl.constexpr(448.0)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; float32 operands are not shortened to tf32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 `x` as float32 or bfloat16, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def decode_e4m3(values):
    """uint8 e4m3 as float32, exactly, without fp8 instructions.

    Exponent and fraction put where float32 has them are the value times 2**-120, subnormals too.
    """
    bits = values.to(tl.uint32)
    magnitude = bits & 0x7F
    small = ((magnitude << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)
    return tl.where(magnitude == 0x7F, float("nan"), small * 1.329227995784916e36)


@triton.jit
def encode_e4m3(x):
    """float32 as e4m3 in uint8: nearest even, beyond +-448 held there; NaN stays NaN. Without fp8 instructions."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), 448.0)
    # Normal numbers: round the fraction at bit 20, then move the exponent's bias from 127 to 7.
    normal = magnitude.to(tl.uint32, bitcast=True)
    normal = ((normal + 0x7FFFF + ((normal >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6: adding 1.5 * 2**14 leaves multiples of 2**-9 in the last bits, rounded to nearest even.
    subnormal = (magnitude + 24576.0).to(tl.uint32, bitcast=True) & 0xF
    rounded = tl.where(magnitude < 0.015625, subnormal, normal)
    return tl.where(x == x, sign | rounded, 0x7F).to(tl.uint8)


@triton.jit
def power_of_two_scale(needed):
    """The least power of two that is not below each positive, normal float32: 2**ceil(log2(needed)), exactly."""
    bits = needed.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def fp8_dot(a, b, acc):
    """acc + a @ b of e4m3 operands on GPUs that multiply them (sm_89 and later); `a` and `b` are float8e4nv."""
    return tl.dot(a, b, acc)
