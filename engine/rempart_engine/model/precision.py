"""In which numbers a model computes."""

from dataclasses import dataclass

import torch

from rempart_engine.kernels.int8_linear import Int8Linear
from rempart_engine.kernels.packed_linear import PackedLinear
from rempart_engine.model.llama import MakeLinear


@dataclass(frozen=True, slots=True)
class Precision:
    """A name that operators choose, and what it means."""

    name: str
    dtype: torch.dtype
    """Of activations and the KV cache."""
    make_linear: MakeLinear
    keeps_fp8: bool = False
    """Weights that a checkpoint holds in fp8 stay in it."""


_BY_NAME = {
    precision.name: precision
    for precision in (
        Precision("float32", torch.float32, PackedLinear),
        Precision("bfloat16", torch.bfloat16, PackedLinear),
        Precision("int8", torch.bfloat16, Int8Linear),
        Precision("fp8", torch.bfloat16, PackedLinear, keeps_fp8=True),
    )
}


def precision_named(name: str) -> Precision:
    """The precision of a name; "auto" is bfloat16 where this CPU multiplies it fast, else float32.

    Raises:
        KeyError: there is no such name.
    """
    if name != "auto":
        return _BY_NAME[name]
    has_fast_bfloat16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return _BY_NAME["bfloat16" if has_fast_bfloat16 else "float32"]
