"""What the logistic function means."""

import torch


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e**-x), elementwise."""
    return 1.0 / (1.0 + torch.exp(-x))
