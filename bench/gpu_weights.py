"""A DeepSeek checkpoint that never was: random weights, made on the device the moment they are asked for."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from rempart_engine.model.deepseek.config import DeepseekConfig, Fp8Blocks
from rempart_engine.model.deepseek.names import TensorSpec, expected_tensors
from rempart_engine.model.weights.deepseek_folder import DeepseekFolder
from rempart_engine.model.weights.weight import Weight

_BLOCK = (128, 128)
_EXPERTS = ".mlp.experts."
"""Nearly all of the bytes, which stay on the device. What may yet be dequantized lies on the host, as if read there."""


class RandomFolder(DeepseekFolder):
    """Stands for a folder in the published format: what may be fp8 is fp8."""

    def __init__(self, config: DeepseekConfig, device: torch.device) -> None:
        self._config = replace(config, fp8=Fp8Blocks(*_BLOCK))
        self._device = device

    def weights(self, on_read: Callable[[str], None] = lambda name: None) -> "RandomWeights":  # type: ignore[override]
        return RandomWeights(expected_tensors(self._config), self._device, on_read)


class RandomWeights(Mapping[str, Weight]):
    """Weights by name, each made anew whenever it is looked up, the same each time."""

    def __init__(self, specs: Mapping[str, TensorSpec], device: torch.device, on_read: Callable[[str], None]) -> None:
        self._specs = specs
        self._device = device
        self._on_read = on_read

    def __getitem__(self, name: str) -> Weight:
        weight = self._made(name, self._specs[name])
        self._on_read(name)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _made(self, name: str, spec: TensorSpec) -> Weight:
        if len(spec.shape) == 1:
            make = torch.zeros if name.endswith("bias") else torch.ones
            return Weight(make(spec.shape))
        seed = zlib.crc32(name.encode())
        if spec.may_be_fp8:
            weight = random_fp8(spec.shape, self._device, seed)
            return weight if _EXPERTS in name else _on_host(weight)
        numbers = _drawn(spec.shape, self._device, seed)
        return Weight((numbers if name == "embed_tokens.weight" else numbers.mul_(spec.shape[1] ** -0.5)).cpu())


def _on_host(weight: Weight) -> Weight:
    return Weight(weight.data.cpu(), None if weight.scales is None else weight.scales.cpu(), weight.block)


def random_fp8(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> Weight:
    """[out, in] of such a size that products are as large as what goes in."""
    blocks = tuple(-(-size // of_block) for size, of_block in zip(shape, _BLOCK, strict=True))
    scales = torch.full(blocks, shape[1] ** -0.5, device=device)
    return Weight(_drawn(shape, device, seed).to(torch.float8_e4m3fn), scales, _BLOCK)


def _drawn(shape: tuple[int, ...], device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
