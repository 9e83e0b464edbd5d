"""The inner loops of the CPU kernels, written once as vector instructions.

Products `c += a @ b` go tile by tile, 8 x 32 float32 sums held in registers over the whole of K. Two kinds of elements:

    float32    a [M, K],   b [K, N]      one fused multiply-add per element of K
    bfloat16   a [M, K/2], b [K/2, N]    as uint32, each a pair of neighbours along K, lower one first; one dot
                                         instruction (AVX-512 BF16) multiplies both exactly and adds in float32

Each sum is a fixed sequence of operations over K, so a row of a result cannot depend on the rows beside it
(docs/adr/0003-batch-invariance.md). A compiler left to itself keeps such sums in memory: four times slower.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from rempart_engine.kernels.cpu_scalars import INLINED, bfloat16_pair, load

TILE_ROWS = 8
TILE_COLUMNS = 32

_LANES = 16
_PARTS = range(TILE_COLUMNS // _LANES)
_FLOAT_BYTES = 4
_VECTOR_BYTES = _FLOAT_BYTES * _LANES
_LINE_BYTES = 64
_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_ADDRESS = ir.IntType(64)
_SUMS = ir.VectorType(_FLOAT, _LANES)
_MULTIPLY_ADD = "llvm.fma.v16f32"


class _BFloat16(ir.Type):  # type: ignore[misc]  # llvmlite carries no types
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


@cache
def has_bfloat16_dot() -> bool:
    """Whether this CPU multiplies pairs of bfloat16 in one instruction."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))


@njit(**INLINED)
def add_product_float32(a, b, c):  # type: ignore[no-untyped-def]
    """c [M, N] += a [M, K] @ b [K, N]; M a multiple of 8, N of 32. `a` has any strides; K is that of b."""
    for row in range(0, c.shape[0], TILE_ROWS):
        for column in range(0, c.shape[1], TILE_COLUMNS):
            _add_tile_float32(a, b, c, row, column)  # type: ignore[call-arg]  # numba passes the context


@njit(**INLINED)
def add_product_bfloat16(a, b, c):  # type: ignore[no-untyped-def]
    """c [M, N] += a [M, K/2] @ b [K/2, N] of pairs; as for float32."""
    for row in range(0, c.shape[0], TILE_ROWS):
        for column in range(0, c.shape[1], TILE_COLUMNS):
            _add_tile_bfloat16(a, b, c, row, column)  # type: ignore[call-arg]


@njit(**INLINED)
def weighted_scores_float32(a, b, weights, following, out):  # type: ignore[no-untyped-def]
    """out [M] = sum over N of weights [N] * max(a [M, K] @ b [K, N], 0); M a multiple of 8, N of 32.

    Products never leave the registers. Meanwhile the memory of `following`, without gaps, comes closer.
    """
    for row in range(0, out.shape[0], TILE_ROWS):
        fetch_rows(following, row, out.shape[0])  # type: ignore[call-arg]
        _weighted_tile_float32(a, b, weights, out, row)


@njit(**INLINED)
def weighted_scores_bfloat16(a, b, weights, following, out):  # type: ignore[no-untyped-def]
    """The same for a [M, K/2] and b [K/2, N] of pairs."""
    for row in range(0, out.shape[0], TILE_ROWS):
        fetch_rows(following, row, out.shape[0])  # type: ignore[call-arg]
        _weighted_tile_bfloat16(a, b, weights, out, row)


@njit(**INLINED)
def read_e4m3_pairs(values, first, pairs):  # type: ignore[no-untyped-def]
    """pairs [P] = bfloat16 pairs of the e4m3 bytes values[first:][:2 P], exactly."""
    whole = len(pairs) // _LANES * _LANES
    for start in range(0, whole, _LANES):
        _read_e4m3_vector(values, first + 2 * start, pairs, start)  # type: ignore[call-arg]
    for i in range(whole, len(pairs)):
        pairs[i] = bfloat16_pair(load(values[first + 2 * i]), load(values[first + 2 * i + 1]))


@intrinsic
def _read_e4m3_vector(typing_context, values, first, pairs, start):  # type: ignore[no-untyped-def]  # numba's protocol
    """pairs[start:][:16] of values[first:][:32], in 16-bit integers, which a compiler would widen."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        values, pairs = (_array(context, builder, signature, args, i) for i in (0, 2))
        source = builder.add(builder.ptrtoint(values.data, _ADDRESS), args[1])
        target = builder.add(builder.ptrtoint(pairs.data, _ADDRESS), builder.mul(args[3], _ADDRESS(_FLOAT_BYTES)))
        shorts = ir.VectorType(ir.IntType(16), 2 * _LANES)
        bytes_ = ir.VectorType(ir.IntType(8), 2 * _LANES)
        loaded = builder.load(builder.inttoptr(source, bytes_.as_pointer()), align=1)
        _store(builder, _bfloat16_of_e4m3(builder, builder.zext(loaded, shorts), shorts), target)
        return context.get_dummy_value()

    return types.void(values, types.int64, pairs, types.int64), generate


def _bfloat16_of_e4m3(builder: Any, numbers: Any, shorts: ir.VectorType) -> Any:
    """Bits of e4m3 in 16-bit lanes as those of bfloat16: another exponent bias; subnormals are normal there."""

    def all_of(number: int) -> Any:
        return ir.Constant(shorts, [number] * (2 * _LANES))

    def shifted(vector: Any, places: int, bias: int) -> Any:
        return builder.add(builder.shl(vector, all_of(places)), all_of(bias))

    def where_below(vector: Any, bound: int, below: Any, otherwise: Any) -> Any:
        return builder.select(builder.icmp_unsigned("<", vector, all_of(bound)), below, otherwise)

    magnitude = builder.and_(numbers, all_of(0x7F))
    sign = builder.shl(builder.and_(numbers, all_of(0x80)), all_of(8))
    # 2**-9 is 0x3B00; a subnormal's leading bit becomes the exponent, the bits behind it the fraction.
    least = where_below(magnitude, 1, all_of(0), all_of(0x3B00))
    subnormal = where_below(
        magnitude, 4, where_below(magnitude, 2, least, shifted(magnitude, 6, 0x3B00)), shifted(magnitude, 5, 0x3B80)
    )
    finite = where_below(magnitude, 8, subnormal, shifted(magnitude, 4, (127 - 7) << 7))
    return builder.or_(where_below(magnitude, 0x7F, finite, all_of(0x7FC0)), sign)


@intrinsic
def fetch_rows(typing_context, array, row, num_rows):  # type: ignore[no-untyped-def]  # numba's protocol
    """Have 8 of num_rows equal parts of the array, from `row` on, on their way into the second-level cache."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        found = _array(context, builder, signature, args, 0)
        address = ir.IntType(8).as_pointer()
        fetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [address, _INT, _INT, _INT]), "llvm.prefetch.p0"
        )
        num_bytes = builder.udiv(builder.mul(found.nitems, found.itemsize), args[2])
        start = builder.add(builder.ptrtoint(found.data, _ADDRESS), builder.mul(num_bytes, args[1]))
        num_lines = builder.udiv(builder.mul(num_bytes, _ADDRESS(TILE_ROWS)), _ADDRESS(_LINE_BYTES))
        with cgutils.for_range(builder, num_lines, intp=_ADDRESS) as loop:
            line = builder.add(start, builder.mul(loop.index, _ADDRESS(_LINE_BYTES)))
            builder.call(fetch, [builder.inttoptr(line, address), _INT(0), _INT(2), _INT(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


@intrinsic
def _add_tile_float32(typing_context, a, b, c, row, column):  # type: ignore[no-untyped-def]
    return types.void(a, b, c, types.int64, types.int64), _adding(_FLOAT32)


@intrinsic
def _add_tile_bfloat16(typing_context, a, b, c, row, column):  # type: ignore[no-untyped-def]
    return types.void(a, b, c, types.int64, types.int64), _adding(_PAIRS)


@intrinsic
def _weighted_tile_float32(typing_context, a, b, weights, out, row):  # type: ignore[no-untyped-def]
    return types.void(a, b, weights, out, types.int64), _weighting(_FLOAT32)


@intrinsic
def _weighted_tile_bfloat16(typing_context, a, b, weights, out, row):  # type: ignore[no-untyped-def]
    return types.void(a, b, weights, out, types.int64), _weighting(_PAIRS)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is multiplied, and by which instruction: of two operands and the sums, these first or last."""

    element: ir.Type
    operand: ir.VectorType
    instruction: str
    sums_first: bool

    def multiply(self, builder: Any, left: Any, right: Any, sums: Any) -> Any:
        operands = [sums, left, right] if self.sums_first else [left, right, sums]
        kinds = [_SUMS if operand is sums else self.operand for operand in operands]
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_SUMS, kinds), self.instruction)
        return builder.call(function, operands)


_FLOAT32 = _Kind(_FLOAT, _SUMS, _MULTIPLY_ADD, sums_first=False)
_PAIRS = _Kind(_INT, ir.VectorType(_BFloat16(), 2 * _LANES), "llvm.x86.avx512bf16.dpbf16ps.512", sums_first=True)

_Sums = list[list[Any]]
"""Variables of a tile, 8 x 2 vectors; the compiler keeps them in registers."""


def _adding(kind: _Kind) -> Any:
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        a, b, c = (_array(context, builder, signature, args, i) for i in range(3))
        first_row, first_column = args[3:]
        places = [
            [
                _offset(builder, _row_at(builder, c, first_row, row, first_column), _VECTOR_BYTES * part)
                for part in _PARTS
            ]
            for row in range(TILE_ROWS)
        ]
        sums = [[cgutils.alloca_once_value(builder, _load(builder, _SUMS, at)) for at in row] for row in places]
        _multiply_over_depth(builder, kind, a, b, first_row, first_column, sums)
        for row in range(TILE_ROWS):
            for part in _PARTS:
                _store(builder, builder.load(sums[row][part]), places[row][part])
        return context.get_dummy_value()

    return generate


def _weighting(kind: _Kind) -> Any:
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        a, b, weights, out = (_array(context, builder, signature, args, i) for i in range(4))
        first_row = args[4]
        weights_at = builder.ptrtoint(weights.data, _ADDRESS)
        zeros = ir.Constant(_SUMS, [0.0] * _LANES)
        totals = [cgutils.alloca_once_value(builder, zeros) for _ in range(TILE_ROWS)]
        sums = [[cgutils.alloca_once(builder, _SUMS) for _ in _PARTS] for _ in range(TILE_ROWS)]
        num_tiles = builder.udiv(cgutils.unpack_tuple(builder, b.shape)[1], _ADDRESS(TILE_COLUMNS))
        with cgutils.for_range(builder, num_tiles, intp=_ADDRESS) as tiles:
            first_column = builder.mul(tiles.index, _ADDRESS(TILE_COLUMNS))
            for variables in sums:
                for variable in variables:
                    builder.store(zeros, variable)
            _multiply_over_depth(builder, kind, a, b, first_row, first_column, sums)
            tile_weights_at = builder.add(weights_at, builder.mul(first_column, _ADDRESS(_FLOAT_BYTES)))
            for part in _PARTS:
                factors = _load(builder, _SUMS, _offset(builder, tile_weights_at, _VECTOR_BYTES * part))
                for row in range(TILE_ROWS):
                    product = builder.load(sums[row][part])
                    positive = builder.select(builder.fcmp_ordered("<", product, zeros), zeros, product)
                    total = _FLOAT32.multiply(builder, positive, factors, builder.load(totals[row]))
                    builder.store(total, totals[row])
        out_at = builder.add(builder.ptrtoint(out.data, _ADDRESS), builder.mul(first_row, _ADDRESS(_FLOAT_BYTES)))
        _store(builder, _sums_of_lanes(builder, [builder.load(total) for total in totals]), out_at)
        return context.get_dummy_value()

    return generate


def _multiply_over_depth(
    builder: Any, kind: _Kind, a: Any, b: Any, first_row: Any, first_column: Any, sums: _Sums
) -> None:
    """sums += a[first_row:][:8] @ b[:, first_column:][:, :32]."""
    a_row_step, a_step = cgutils.unpack_tuple(builder, a.strides)
    b_step, _ = cgutils.unpack_tuple(builder, b.strides)
    a_start = builder.add(builder.ptrtoint(a.data, _ADDRESS), builder.mul(a_row_step, first_row))
    b_start = builder.add(builder.ptrtoint(b.data, _ADDRESS), builder.mul(_ADDRESS(_FLOAT_BYTES), first_column))
    vector = ir.VectorType(kind.element, _LANES)
    with cgutils.for_range(builder, cgutils.unpack_tuple(builder, b.shape)[0], intp=_ADDRESS) as loop:
        b_at = builder.add(b_start, builder.mul(loop.index, b_step))
        rights = [
            builder.bitcast(_load(builder, vector, _offset(builder, b_at, _VECTOR_BYTES * part)), kind.operand)
            for part in _PARTS
        ]
        a_at = builder.add(a_start, builder.mul(loop.index, a_step))
        for row in range(TILE_ROWS):
            number = _load(builder, kind.element, builder.add(a_at, builder.mul(a_row_step, _ADDRESS(row))))
            left = builder.bitcast(_broadcast(builder, number, vector), kind.operand)
            for part, right in enumerate(rights):
                variable = sums[row][part]
                builder.store(kind.multiply(builder, left, right, builder.load(variable)), variable)


def _array(context: Any, builder: Any, signature: Any, args: Any, index: int) -> Any:
    return make_array(signature.args[index])(context, builder, args[index])


def _row_at(builder: Any, array: Any, first_row: Any, row: int, first_column: Any) -> Any:
    """Address of a float in row first_row + row."""
    row_step, _ = cgutils.unpack_tuple(builder, array.strides)
    start = builder.add(builder.ptrtoint(array.data, _ADDRESS), builder.mul(_ADDRESS(_FLOAT_BYTES), first_column))
    return builder.add(start, builder.mul(row_step, builder.add(first_row, _ADDRESS(row))))


def _offset(builder: Any, address: Any, num_bytes: int) -> Any:
    return builder.add(address, _ADDRESS(num_bytes))


def _load(builder: Any, kind: ir.Type, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=_FLOAT_BYTES)


def _store(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=_FLOAT_BYTES)


def _broadcast(builder: Any, number: Any, vector: ir.VectorType) -> Any:
    unset = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(unset, number, _INT(0))
    return builder.shuffle_vector(first, unset, ir.Constant(ir.VectorType(_INT, _LANES), [0] * _LANES))


def _sums_of_lanes(builder: Any, vectors: list[Any]) -> Any:
    """The sum of each vector's 16 lanes, by halving: lane i and lane i + 8, then i and i + 4, ... As one vector.

    Two half-used vectors are put together into one, so that every addition works on whole vectors.
    """
    width = _LANES // 2  # of each vector's own part after the first addition
    while len(vectors) > 1:
        vectors = [
            _halves_added(builder, first, second, width)
            for first, second in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width //= 2
    (last,) = vectors
    evens, odds = (
        builder.shuffle_vector(last, last, ir.Constant(ir.VectorType(_INT, _LANES // 2), list(range(start, _LANES, 2))))
        for start in (0, 1)
    )
    return builder.fadd(evens, odds)


def _halves_added(builder: Any, first: Any, second: Any, width: int) -> Any:
    """Parts of 2 * width lanes folded to width lanes: those of `first`, then those of `second`."""
    starts = [start for start in range(0, 2 * _LANES, 2 * width)]
    low, high = (
        ir.Constant(ir.VectorType(_INT, _LANES), [start + shift + lane for start in starts for lane in range(width)])
        for shift in (0, width)
    )
    return builder.fadd(builder.shuffle_vector(first, second, low), builder.shuffle_vector(first, second, high))
