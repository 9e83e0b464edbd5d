"""How the matrices of all experts are stored, each kind of number in its own way."""

from typing import Protocol

import torch

from rempart_engine.kernels.fp8_blocks.reference import dequantize_blocks, quantize_blocks
from rempart_engine.kernels.moe.reference import quantize_int4, quantize_int8
from rempart_engine.kernels.product_tiles import Numbers
from rempart_engine.kernels.quantize_groups.reference import GROUP

_BLOCK = (GROUP, GROUP)


class Matrix(Protocol):
    """One matrix as its checkpoint holds it."""

    @property
    def data(self) -> torch.Tensor:  # [R, C] floats, or float8_e4m3fn with scales
        ...

    @property
    def scales(self) -> torch.Tensor | None:  # [ceil(R / rows), ceil(C / columns)]
        ...

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale."""
        ...


def empty_matrices(
    numbers: Numbers, count: tuple[int, ...], rows: int, columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Room for `count` matrices [rows, columns] and their scales, if the numbers have any.

    Data are [..., rows, columns], of "int4" bytes [..., rows, 64 G], with G = ceil(columns / 128) groups; scales are
    [..., ceil(rows / 128), G] for "fp8" and [..., G, rows] for integers.
    """
    num_groups = -(-columns // GROUP)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
    stored_columns = num_groups * GROUP // 2 if numbers == "int4" else columns
    data = torch.empty((*count, rows, stored_columns), dtype=dtype.get(numbers, torch.uint8), device=device)
    if numbers in ("float32", "bfloat16"):
        return data, None
    per_matrix = (-(-rows // GROUP), num_groups) if numbers == "fp8" else (num_groups, rows)
    return data, torch.empty((*count, *per_matrix), device=device)


def in_numbers(matrix: Matrix, numbers: Numbers, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A matrix as `empty_matrices` has room for it; fp8 that stays fp8 keeps its bits.

    Raises:
        ValueError: it should stay fp8, and its blocks are not 128 x 128.
    """
    data = matrix.data.to(device)
    if matrix.scales is not None and matrix.block is not None:
        scales = matrix.scales.to(device, torch.float32)
        if numbers == "fp8":
            if matrix.block != _BLOCK:
                raise ValueError(
                    f"experts in fp8 have blocks of {_BLOCK}, not {matrix.block}: take other numbers for them"
                )
            return data, scales
        data = dequantize_blocks(data, scales, matrix.block)
    if numbers == "fp8":
        return quantize_blocks(data, _BLOCK)
    if numbers == "int8":
        return quantize_int8(data)
    if numbers == "int4":
        return quantize_int4(data)
    return data.to(torch.float32 if numbers == "float32" else torch.bfloat16), None
