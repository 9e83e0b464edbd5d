"""The inner loop of every product with stored weights, whatever their numbers: W x^T, tile by tile along K.

Rows of a tile are outputs and its columns tokens. So tensor cores, which take 64 rows and more at a time, are filled by
weights even where there are only 16 tokens, and weights that must be decoded come to them from registers. 128 inputs
share a scale, of weights and activations alike.

A sum's order depends on the shape of the weights alone, never on the number of tokens, which only widens the tile. So a
row's bits do not depend on the others, provided that a GPU's tensor cores add the products of one instruction alike for
every width: wgmma computes all tiles on sm_90, mma.sync all on sm_80, and the tests hold it on the GPU at hand.

Numbers of weights: "float" (float32 or bfloat16), "fp8" (e4m3), "int8", and "int4": byte j of a group of 128 inputs
holds input j in its low half and input j + 64 in its high half, each 8 too large.

Pointers to e4m3 are float8e4nv where the GPU multiplies it, so that tensor cores read tiles from shared memory as they
are; elsewhere they are uint8.
"""

import triton
import triton.language as tl

from rempart_engine.kernels.triton_scalars import INTERPRETED, cast, decode_e4m3, dot, fp8_dot


@triton.jit
def sum_of_blocks(
    weights_at,  # [R, K'] pointers to each row's first inputs; K' = BLOCK_K, or bytes of BLOCK_K nibbles
    scales_at,  # pointers to the first scales: one of fp8, whose rows share it, [R] of int8 and int4
    scale_step,  # from a group's scale to the next one's
    x_at,  # [BLOCK_K, N] pointers to each token's first inputs; float32, bfloat16 or float8e4nv
    x_scales_at,  # [N] pointers to the tokens' first scales, which lie side by side; of e4m3 alone
    pair_offset,  # from a row to the row it is paired with
    pair_scale_offset,
    first,  # of the blocks of BLOCK_K inputs
    last,
    width,  # K
    NUMBERS: tl.constexpr,
    IS_PAIRED: tl.constexpr,  # of rows that x meets at the same time
    IS_EVEN: tl.constexpr,  # BLOCK_K divides K
    BLOCK_K: tl.constexpr,  # divides 128
):  # -> [R, N] float32 of the rows, and of those they are paired with
    """Sum of W x^T over blocks first to last - 1; products of one block are summed before scales are applied."""
    WEIGHT_STEP: tl.constexpr = BLOCK_K // 2 if NUMBERS == "int4" else BLOCK_K
    HALF: tl.constexpr = BLOCK_K // 2
    IS_QUANTIZED: tl.constexpr = x_at.dtype.element_ty == tl.float8e4nv
    # A thread of the tensor core holds few rows and many columns, so the side that has many scales lies along rows.
    IS_TURNED: tl.constexpr = IS_QUANTIZED and x_at.shape[1] >= 64
    if IS_TURNED:
        total = tl.zeros((x_at.shape[1], weights_at.shape[0]), tl.float32)
    else:
        total = tl.zeros((weights_at.shape[0], x_at.shape[1]), tl.float32)
    pair_total = total
    k = tl.arange(0, WEIGHT_STEP)
    # Scales are read a block ahead: nothing else hides their latency.
    scale, pair_scale, x_scale = 1.0, 1.0, 1.0
    if NUMBERS != "float":
        scale, pair_scale, x_scale = _scales(
            scales_at, scale_step, pair_scale_offset, x_scales_at, first * BLOCK_K // 128, IS_PAIRED, IS_QUANTIZED
        )
    for block in range(first, last):
        x = _load(x_at + block * BLOCK_K, (block * BLOCK_K + k < width)[:, None], IS_EVEN)
        x_high = x
        if NUMBERS == "int4":
            x_high = _load(x_at + block * BLOCK_K + HALF, (block * BLOCK_K + HALF + k < width)[:, None], IS_EVEN)
        in_row = (block * BLOCK_K + k < width)[None, :]
        weights = _load(weights_at + block * WEIGHT_STEP, in_row, IS_EVEN or NUMBERS == "int4")
        total = _add_product(total, weights, scale, x, x_high, x_scale, NUMBERS, IS_TURNED)
        if IS_PAIRED:
            weights = _load(weights_at + pair_offset + block * WEIGHT_STEP, in_row, IS_EVEN or NUMBERS == "int4")
            pair_total = _add_product(pair_total, weights, pair_scale, x, x_high, x_scale, NUMBERS, IS_TURNED)
        if NUMBERS != "float":
            group = tl.minimum(block + 1, last - 1) * BLOCK_K // 128
            scale, pair_scale, x_scale = _scales(
                scales_at, scale_step, pair_scale_offset, x_scales_at, group, IS_PAIRED, IS_QUANTIZED
            )
    if IS_TURNED:
        total, pair_total = tl.trans(total), tl.trans(pair_total)
    return total, pair_total


@triton.jit
def _scales(
    scales_at,
    scale_step,
    pair_scale_offset,
    x_scales_at,
    group,
    IS_PAIRED: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
):
    """Of the rows, of those they are paired with, and of the tokens."""
    scale = tl.load(scales_at + group * scale_step)
    pair_scale = scale
    if IS_PAIRED:
        pair_scale = tl.load(scales_at + pair_scale_offset + group * scale_step)
    x_scale = 1.0
    if IS_QUANTIZED:
        x_scale = tl.load(x_scales_at + group)
    return scale, pair_scale, x_scale


@triton.jit
def _load(at, is_there, IS_WHOLE: tl.constexpr):
    if IS_WHOLE:
        return tl.load(at)
    return tl.load(at, mask=is_there, other=0.0)


@triton.jit
def _add_product(
    total,  # [R, N] float32, [N, R] if turned
    weights,  # [R, K], or bytes of nibbles [R, K / 2]
    scale,  # of fp8, or [R] of int8 and int4
    x,  # [K, N]; its first half with nibbles
    x_high,  # the second half
    x_scale,  # [N] of e4m3
    NUMBERS: tl.constexpr,
    IS_TURNED: tl.constexpr,
):
    product = tl.zeros(total.shape, tl.float32)
    if NUMBERS == "float":
        if weights.dtype == x.dtype:
            total = dot(weights, x, total)
        else:
            total = dot(weights.to(tl.float32), x.to(tl.float32), total)
    elif IS_TURNED:
        total += _fp8_product(tl.trans(x), tl.trans(weights), product) * (x_scale * scale)[:, None]
    elif x.dtype == tl.float8e4nv:
        total += _fp8_product(weights, x, product) * (x_scale * scale)[None, :]
    elif NUMBERS == "fp8":
        total += dot(_from_e4m3(weights, x.dtype), x, product) * scale
    elif NUMBERS == "int8":
        total += dot(_small_integers(weights ^ 0x80, 128, x.dtype), x, product) * scale[:, None]
    else:
        product = dot(_small_integers(weights & 15, 8, x.dtype), x, product)
        total += dot(_small_integers(weights >> 4, 8, x.dtype), x_high, product) * scale[:, None]
    return total


@triton.jit
def _small_integers(values, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """uint8 minus the offset as floats: in the last bits of 2**23 an integer is a float already."""
    shifted = (values.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
    return cast(shifted - (8388608.0 + OFFSET), dtype)


@triton.jit
def _from_e4m3(values, dtype: tl.constexpr):
    """e4m3 as floats, exactly."""
    if values.dtype == tl.uint8:
        decoded = cast(decode_e4m3(values), dtype)
    elif INTERPRETED:
        decoded = cast(decode_e4m3(values.to(tl.uint8, bitcast=True)), dtype)
    else:
        decoded = values.to(dtype)
    return decoded


@triton.jit
def _fp8_product(a, b, acc):
    """acc + a @ b of float8e4nv."""
    if INTERPRETED:
        a, b = _from_e4m3(a, tl.float32), _from_e4m3(b, tl.float32)
        acc = dot(a, b, acc)
    else:
        acc = fp8_dot(a, b, acc)
    return acc
