"""What rotating means, and how a CPU does it: plain torch."""

import torch


def rotate(
    x: torch.Tensor,  # [T, H, D]
    cos: torch.Tensor,  # [T, P/2]
    sin: torch.Tensor,
    is_interleaved: bool,
) -> torch.Tensor:  # [T, H, D]
    """Pairs of the first P dimensions turned by their angles (RoFormer, equation 34), the others as they are."""
    cos, sin = cos[:, None], sin[:, None]
    width = 2 * cos.shape[2]
    values = x[..., :width].float()
    if is_interleaved:
        first, second = values[..., 0::2], values[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = values.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., width:]), dim=-1)
