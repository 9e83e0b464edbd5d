"""Rotary position embedding: tables of angles."""

import math

import torch

from rempart_engine.model.config import LinearScaling, Llama3Scaling, LlamaConfig


def cos_sin_tables(config: LlamaConfig, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles, float32 [num_positions, head_dim / 2]."""
    frequencies = _scaled(
        1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim), config
    )
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    return angles.cos(), angles.sin()


def _scaled(frequencies: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling)


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended (Llama 3.1's rule)."""
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    blend = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return frequencies / scaling.factor * (1.0 - blend) + frequencies * blend
