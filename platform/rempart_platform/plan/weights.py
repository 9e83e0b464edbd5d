"""Bytes of weights by format."""

from collections.abc import Iterable
from enum import StrEnum

from rempart_platform.plan.tensors import Choice, Precision, TensorGroup

GROUP = 128
"""Rows and columns of a block with one fp8 scale; columns of a row with one integer scale."""
_FP8_SCALE_BYTES = 4
_INTEGER_SCALE_BYTES = 2
_PLAIN_BYTES = {Precision.BF16: 2, Precision.F32: 4}


class WeightFormat(StrEnum):
    """How linear layers are held. Embeddings, head, router and norms stay bf16 or fp32 in every one.

    FP8 is DeepSeek's: e4m3, one fp32 scale for each 128 x 128 block, a partial block having a whole one. INT8 has a
    bf16 scale for each 128 columns of a row. INT4 holds the bulk (see `Precision`) in 4 bits with such scales and the
    other linear layers in INT8.
    """

    FP8 = "fp8"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


def group_bytes(group: TensorGroup, weight_format: WeightFormat) -> int:
    """With scales."""
    rows, columns = group.rows, group.columns
    if not group.is_linear:
        return group.num_params * _PLAIN_BYTES[group.precision]
    row_scale_bytes = rows * _blocks(columns) * _INTEGER_SCALE_BYTES
    match weight_format:
        case WeightFormat.FP8:
            each = rows * columns + _blocks(rows) * _blocks(columns) * _FP8_SCALE_BYTES
        case WeightFormat.BF16:
            each = rows * columns * 2
        case WeightFormat.INT4 if group.precision is Precision.BULK:
            each = rows * -(-columns // 2) + row_scale_bytes
        case WeightFormat.INT4 | WeightFormat.INT8:
            each = rows * columns + row_scale_bytes
    return each * group.count


def weight_bytes(
    groups: Iterable[TensorGroup], weight_format: WeightFormat, choice: Choice = lambda group: True
) -> int:
    """Of the chosen groups."""
    return sum(group_bytes(group, weight_format) for group in groups if choice(group))


def num_tensors(groups: Iterable[TensorGroup], weight_format: WeightFormat) -> int:
    """Tensors of a checkpoint; each scale of a linear layer is one of its own."""
    return sum(
        group.count * (2 if group.is_linear and weight_format is not WeightFormat.BF16 else 1) for group in groups
    )


def _blocks(size: int) -> int:
    return -(-size // GROUP)
