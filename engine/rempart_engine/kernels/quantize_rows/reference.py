"""What quantizing rows means."""

import torch

ZERO_POINT = 128


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] as uint8 around 128 and one float32 scale per row [T]: x ~ (q - 128) * scale, scale = max|x| / 127.

    Ties may round either way. A row of zeros has scale 0, a row that is not finite has scale NaN.
    """
    x = x.float()
    scale = x.abs().amax(-1) / 127.0
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    factor = torch.where(scale > 0, 1.0 / scale, 0.0)
    return ((x * factor[:, None]).round() + ZERO_POINT).to(torch.uint8), scale
