"""What a mixture of experts means, and numbers of 8 and 4 bits with one scale for each output's 128 inputs."""

import torch
from torch.nn.functional import pad, silu

from rempart_engine.kernels.quantize_groups.reference import GROUP, dequantize_groups, quantize_groups

HALF = GROUP // 2


def moe(
    x: torch.Tensor,  # [T, W]
    experts: torch.Tensor,  # [T, k] int64, ascending
    weights: torch.Tensor,  # [T, k] float32
    gate: torch.Tensor,  # [E, F, W]
    up: torch.Tensor,  # [E, F, W]
    down: torch.Tensor,  # [E, W, F]
    *,
    quantizes: bool = False,
) -> torch.Tensor:  # [T, W] float64
    """Sum of weight x down(silu(gate(x)) * up(x)) over each token's experts, in float64.

    An expert's hidden state and its result are rounded to x's type.

    Args:
        quantizes: x and the hidden states are rounded to e4m3 in groups of 128 channels, too.
    """

    def taken(values: torch.Tensor) -> torch.Tensor:
        return (dequantize_groups(*quantize_groups(values)) if quantizes else values).double()

    total = torch.zeros(x.shape, dtype=torch.float64)
    for token, place in torch.ones(experts.shape).nonzero().tolist():
        expert = experts[token, place]
        row = taken(x[token : token + 1])
        hidden = silu(row @ gate[expert].double().T) * (row @ up[expert].double().T)
        result = taken(hidden.to(x.dtype)) @ down[expert].double().T
        total[token] += weights[token, place].double() * result[0].to(x.dtype).double()
    return total


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, C] as int8 [R, C] and float32 scales [ceil(C / 128), R]: the largest magnitude of 128 inputs becomes 127."""
    values, scales = _rounded(weight, 127)
    return values[:, : weight.shape[1]].contiguous(), scales


def dequantize_int8(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:  # -> [R, C] float32
    """value x scale of its output's 128 inputs."""
    return values.float() * scales.T.repeat_interleave(GROUP, 1)[:, : values.shape[1]]


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, C] as bytes [R, 64 ceil(C / 128)] and float32 scales [ceil(C / 128), R]: the largest magnitude becomes 7.

    Byte j of a group holds input j in its low half and input j + 64 in its high one, each 8 too large.
    """
    values, scales = _rounded(weight, 7)
    low, high = (values + 8).view(torch.uint8).unflatten(1, (-1, 2, HALF)).unbind(2)
    return (low | high << 4).flatten(1), scales


def dequantize_int4(values: torch.Tensor, scales: torch.Tensor, width: int) -> torch.Tensor:  # -> [R, width] float32
    """value x scale of its output's 128 inputs."""
    groups = values.unflatten(1, (-1, HALF))
    both = torch.stack((groups & 15, groups >> 4), 2).flatten(1)
    return ((both.float() - 8) * scales.T.repeat_interleave(GROUP, 1))[:, :width]


def _rounded(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [R, 128 G] int8, and scales [G, R]; inputs that are missing in the last group are zeros."""
    groups = pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))  # [R, G, 128]
    scales = (groups.abs().amax(-1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (groups / scales[..., None]).round().to(torch.int8).flatten(1), scales.T.contiguous()
