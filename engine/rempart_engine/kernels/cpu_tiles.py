"""The inner loops of the CPU kernels, written once as vector instructions.

Products `c += a @ b` go tile by tile, 8 x 32 float32 sums held in registers over the whole of K. Two kinds of elements:

    float32    a [M, K],   b [K, N]      one fused multiply-add per element of K
    bfloat16   a [M, K/2], b [K/2, N]    as uint32, each a pair of neighbours along K, lower one first; one dot
                                         instruction (AVX-512 BF16) multiplies both exactly and adds in float32

Each sum is a fixed sequence of operations over K, so a row of a result cannot depend on the rows beside it
(docs/adr/0003-batch-invariance.md). A compiler left to itself keeps such sums in memory: four times slower.
"""

from functools import cache
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from rempart_engine.kernels.cpu_scalars import INLINED

TILE_ROWS = 8
TILE_COLUMNS = 32

_LANES = 16
_VECTORS = TILE_COLUMNS // _LANES
_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_ADDRESS = ir.IntType(64)
_SUMS = ir.VectorType(_FLOAT, _LANES)


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


@intrinsic
def weighted_positive_sum(typing_context, numbers, weights, row):  # type: ignore[no-untyped-def]  # numba's protocol
    """Sum over i of weights[i] * max(numbers[row, i], 0) in float32, in a fixed order; a multiple of 16 of them."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        numbers, weights = (make_array(signature.args[i])(context, builder, args[i]) for i in range(2))
        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_SUMS, [_SUMS] * 3), "llvm.fma.v16f32"
        )
        row_step, _ = cgutils.unpack_tuple(builder, numbers.strides)
        at = builder.add(builder.ptrtoint(numbers.data, _ADDRESS), builder.mul(row_step, args[2]))
        weights_at = builder.ptrtoint(weights.data, _ADDRESS)
        num_vectors = builder.udiv(cgutils.unpack_tuple(builder, weights.shape)[0], _ADDRESS(_LANES))
        zeros = ir.Constant(_SUMS, [0.0] * _LANES)
        total = cgutils.alloca_once_value(builder, zeros)
        with cgutils.for_range(builder, num_vectors, intp=_ADDRESS) as loop:
            offset = builder.mul(loop.index, _ADDRESS(4 * _LANES))
            values = _load(builder, _SUMS, builder.add(at, offset))
            factors = _load(builder, _SUMS, builder.add(weights_at, offset))
            positive = builder.select(builder.fcmp_ordered(">", values, zeros), values, zeros)
            builder.store(builder.call(multiply_add, [positive, factors, builder.load(total)]), total)
        return _sum_of_lanes(builder, builder.load(total))

    return types.float32(numbers, weights, types.int64), generate


@intrinsic
def _add_tile_float32(typing_context, a, b, c, row, column):  # type: ignore[no-untyped-def]
    signature = types.void(a, b, c, types.int64, types.int64)
    return signature, _generator(_FLOAT, "llvm.fma.v16f32", _SUMS, sums_first=False)


@intrinsic
def _add_tile_bfloat16(typing_context, a, b, c, row, column):  # type: ignore[no-untyped-def]
    signature = types.void(a, b, c, types.int64, types.int64)
    pairs = ir.VectorType(_BFloat16(), 2 * _LANES)
    return signature, _generator(_INT, "llvm.x86.avx512bf16.dpbf16ps.512", pairs, sums_first=True)


def _generator(element: ir.Type, instruction: str, operand: ir.Type, *, sums_first: bool) -> Any:
    """Code generator of a tile product: `instruction` takes two operands and the sums, these first or last."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        a, b, c = (
            make_array(kind)(context, builder, value) for kind, value in zip(signature.args[:3], args[:3], strict=True)
        )
        first_row, first_column = args[3:]
        multiply = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_SUMS, [_SUMS, operand, operand] if sums_first else [operand, operand, _SUMS]),
            instruction,
        )
        tile = _Tile(builder, c, first_row, first_column)
        a_row, a_step = cgutils.unpack_tuple(builder, a.strides)
        b_step, _ = cgutils.unpack_tuple(builder, b.strides)
        depth = cgutils.unpack_tuple(builder, b.shape)[0]
        a_start = builder.add(builder.ptrtoint(a.data, _ADDRESS), builder.mul(a_row, first_row))
        b_start = builder.add(builder.ptrtoint(b.data, _ADDRESS), builder.mul(_ADDRESS(4), first_column))
        vector = ir.VectorType(element, _LANES)
        sums = [[tile.load(row, part) for part in range(_VECTORS)] for row in range(TILE_ROWS)]
        with cgutils.for_range(builder, depth, intp=_ADDRESS) as loop:
            b_at = builder.add(b_start, builder.mul(loop.index, b_step))
            rights = [
                builder.bitcast(_load(builder, vector, _offset(builder, b_at, 4 * _LANES * part)), operand)
                for part in range(_VECTORS)
            ]
            a_at = builder.add(a_start, builder.mul(loop.index, a_step))
            for row in range(TILE_ROWS):
                number = _load(builder, element, builder.add(a_at, builder.mul(a_row, _ADDRESS(row))))
                left = builder.bitcast(_broadcast(builder, number, vector), operand)
                for part, right in enumerate(rights):
                    total = builder.load(sums[row][part])
                    operands = [total, left, right] if sums_first else [left, right, total]
                    builder.store(builder.call(multiply, operands), sums[row][part])
        for row in range(TILE_ROWS):
            for part in range(_VECTORS):
                tile.store(row, part, builder.load(sums[row][part]))
        return context.get_dummy_value()

    return generate


class _Tile:
    """The sums' place in memory."""

    def __init__(self, builder: Any, array: Any, first_row: Any, first_column: Any) -> None:
        self._builder = builder
        self._row_step, _ = cgutils.unpack_tuple(builder, array.strides)
        row_at = builder.add(builder.ptrtoint(array.data, _ADDRESS), builder.mul(self._row_step, first_row))
        self._start = builder.add(row_at, builder.mul(_ADDRESS(4), first_column))

    def load(self, row: int, part: int) -> Any:
        """A variable that holds 16 sums; the compiler turns it into a register."""
        variable = cgutils.alloca_once(self._builder, _SUMS)
        self._builder.store(_load(self._builder, _SUMS, self._at(row, part)), variable)
        return variable

    def store(self, row: int, part: int, sums: Any) -> None:
        self._builder.store(sums, self._builder.inttoptr(self._at(row, part), _SUMS.as_pointer()), align=4)

    def _at(self, row: int, part: int) -> Any:
        at = self._builder.add(self._start, self._builder.mul(self._row_step, _ADDRESS(row)))
        return _offset(self._builder, at, 4 * _LANES * part)


def _offset(builder: Any, address: Any, num_bytes: int) -> Any:
    return builder.add(address, _ADDRESS(num_bytes))


def _load(builder: Any, kind: ir.Type, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _broadcast(builder: Any, number: Any, vector: ir.VectorType) -> Any:
    unset = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(unset, number, _INT(0))
    return builder.shuffle_vector(first, unset, ir.Constant(ir.VectorType(_INT, _LANES), [0] * _LANES))


def _sum_of_lanes(builder: Any, vector: Any) -> Any:
    """By halving: lane i and lane i + 8, then i and i + 4, ..."""
    width = _LANES
    while width > 1:
        width //= 2
        mask = ir.Constant(ir.VectorType(_INT, width), list(range(width)))
        upper = ir.Constant(ir.VectorType(_INT, width), list(range(width, 2 * width)))
        low, high = (builder.shuffle_vector(vector, vector, part) for part in (mask, upper))
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, _INT(0))
