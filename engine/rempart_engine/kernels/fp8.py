"""Numbers in e4m3 beside scales that are powers of two, as DeepSeek's caches hold them."""

import torch

LARGEST = 448.0
"""Of e4m3."""


def power_of_two_scales(needed: torch.Tensor) -> torch.Tensor:
    """The least power of two that is not below each positive number, exactly: 2**ceil(log2(needed))."""
    mantissa, exponent = torch.frexp(needed)  # needed = mantissa * 2**exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(needed), exponent - (mantissa == 0.5).to(exponent.dtype))


def e4m3_bytes(values: torch.Tensor) -> torch.Tensor:
    """Values rounded to e4m3 (nearest even), beyond +-448 held there, as uint8 of the same shape."""
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
