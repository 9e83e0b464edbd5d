"""In which numbers a model computes."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from rempart_engine.kernels.dense_linear import DenseLinear
from rempart_engine.kernels.int8_linear import Int8Linear
from rempart_engine.kernels.packed_linear import PackedLinear
from rempart_engine.model.errors import ModelError
from rempart_engine.model.llama import MakeLinear
from rempart_engine.placement import ON_CPU, Placement

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16, "fp8": torch.bfloat16}


_EXPERTS: dict[str, Literal["int8", "int4"]] = {"int8": "int8", "int4": "int4"}


@dataclass(frozen=True, slots=True)
class Precision:
    """A name that operators choose, and what it means on a device."""

    name: str
    dtype: torch.dtype
    """Of activations and the KV cache."""
    make_linear: MakeLinear
    keeps_fp8: bool = False
    """Weights that a checkpoint holds in fp8 stay in it."""
    experts: Literal["int8", "int4"] | None = None
    """Numbers of routed experts, if they have others than the rest."""
    placement: Placement = ON_CPU


def precision_named(name: str, placement: Placement = ON_CPU, *, is_fp8_checkpoint: bool = False) -> Precision:
    """The precision of a name.

    "auto" is the checkpoint's fp8 on a GPU, else bfloat16 where it is multiplied fast, else float32.

    Raises:
        ModelError: there is no such precision on this device.
    """
    if placement.uses_triton:
        return _on_gpu(("fp8" if is_fp8_checkpoint else "bfloat16") if name == "auto" else name, placement)
    if name == "auto":
        has_fast_bfloat16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        name = "bfloat16" if has_fast_bfloat16 else "float32"
    if name not in _DTYPES:
        raise ModelError(f"dtype {name} is for routed experts on a GPU")
    make_linear: MakeLinear = Int8Linear if name == "int8" else PackedLinear
    return Precision(name, _DTYPES[name], make_linear, keeps_fp8=name == "fp8")


def _on_gpu(name: str, placement: Placement) -> Precision:
    return Precision(
        name,
        torch.float32 if name == "float32" else torch.bfloat16,
        partial(_dense, placement.device),
        keeps_fp8=name == "fp8",
        experts=_EXPERTS.get(name),
        placement=placement,
    )


def _dense(device: torch.device, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    return DenseLinear(weight.to(device), None if bias is None else bias.to(device))
