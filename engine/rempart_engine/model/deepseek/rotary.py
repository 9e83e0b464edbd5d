"""Rotary angles of the DeepSeek family, and what YaRN does to the softmax."""

import math

import torch

from rempart_engine.model.deepseek.config import DeepseekConfig, YarnScaling


def cos_sin_tables(config: DeepseekConfig, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles, float32 [num_positions, P/2]."""
    width = config.qk_rope_head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, width, 2).float() / width)
    size = 1.0
    if config.rope_scaling is not None:
        yarn = config.rope_scaling
        frequencies = _stretched(frequencies, yarn, config.rope_theta)
        size = _temperature(yarn, yarn.mscale) / _temperature(yarn, yarn.mscale_all_dim)
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    return angles.cos() * size, angles.sin() * size


def softmax_scale(config: DeepseekConfig) -> float:
    """1 / sqrt(head size), times the square of YaRN's temperature: queries and keys would each have carried it."""
    scale: float = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    yarn = config.rope_scaling
    if yarn is None or not yarn.mscale_all_dim:
        return scale
    temperature = _temperature(yarn, yarn.mscale_all_dim)
    return scale * temperature * temperature


def _temperature(yarn: YarnScaling, mscale: float) -> float:
    """YaRN, equation 22: 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(yarn.factor) + 1.0 if yarn.factor > 1.0 else 1.0


def _stretched(frequencies: torch.Tensor, yarn: YarnScaling, theta: float) -> torch.Tensor:
    """YaRN, section 3.2: frequencies with few turns over the original context are divided, those with many are kept."""
    width = 2 * len(frequencies)

    def dimension_of(num_turns: float) -> float:
        return (
            width * math.log(yarn.original_max_position_embeddings / (num_turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_of(yarn.beta_slow)), width - 1)
    steepness = max(high - low, 0.001)  # equal ends would divide by zero
    ramp = ((torch.arange(len(frequencies)).float() - low) / steepness).clamp(0.0, 1.0)
    return frequencies / yarn.factor * ramp + frequencies * (1.0 - ramp)
