"""One attention layer of DeepSeek-V3.2 with its projections, weights at random: what an operator's machine runs."""

from dataclasses import dataclass, field

import torch
from bench.dsa_caches import Caches
from bench.dsa_check import WrongAnswerError
from bench.dsa_points import V32, Case
from torch import nn

from rempart_engine.inputs import StepInputs
from rempart_engine.kernels.packed_linear import PackedLinear
from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.model.deepseek.attention import LatentAttention
from rempart_engine.model.deepseek.cpu_parts import CpuParts
from rempart_engine.model.deepseek.indexer import Indexer
from rempart_engine.model.deepseek.names import layer_tensors
from rempart_engine.model.deepseek.options import AttentionOptions
from rempart_engine.model.deepseek.rotary import cos_sin_tables
from rempart_engine.model.precision import Precision
from rempart_engine.model.weights.weight import Weight

_ATTENTION, _INDEXER = "self_attn.", "indexer."


@dataclass(frozen=True, slots=True)
class _SharedParts(CpuParts):
    """Makes one linear layer of each weight."""

    made: dict[int, nn.Module] = field(default_factory=dict)

    def linear(self, weight: Weight) -> nn.Module:
        if id(weight) not in self.made:
            self.made[id(weight)] = CpuParts.linear(self, weight)
        return self.made[id(weight)]


class Layers:
    """The same layer with an indexer and without, which share their weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(3)
        tensors = {
            name.removeprefix(_ATTENTION): Weight(_random(spec.shape, generator).to(dtype))
            for name, spec in layer_tensors(V32, 0).items()
            if name.startswith(_ATTENTION)
        }
        of_indexer = {
            name.removeprefix(_INDEXER): weight for name, weight in tensors.items() if name.startswith(_INDEXER)
        }
        parts = _SharedParts(Precision("shared", dtype, PackedLinear))
        indexer = Indexer(V32, of_indexer, parts, AttentionOptions().score_bytes)
        self._sparse = LatentAttention(V32, tensors, parts, indexer)
        self._dense = LatentAttention(V32, tensors, parts, None)
        self._tables = cos_sin_tables(V32, V32.max_model_len)
        self.weight_bytes = sum(weight.data.numel() for weight in tensors.values()) * dtype.itemsize

    def dense(self, x: torch.Tensor, caches: Caches, step: StepInputs) -> torch.Tensor:  # [T, W]
        return self._run(self._dense, x, caches, step, Selection.of_everything(step))

    def sparse(self, x: torch.Tensor, caches: Caches, step: StepInputs) -> torch.Tensor:  # [T, W]
        return self._run(self._sparse, x, caches, step, None)

    def _run(
        self, layer: LatentAttention, x: torch.Tensor, caches: Caches, step: StepInputs, selection: Selection | None
    ) -> torch.Tensor:
        cos, sin = self._tables
        positions = step.positions.long()
        angles = (cos[positions], sin[positions])
        added: torch.Tensor = layer(x, angles, caches.latents, caches.index_keys, step, selection)[0]
        return added


def hidden_states(num_tokens: int, dtype: torch.dtype) -> torch.Tensor:  # [T, W]
    """As a norm leaves them."""
    return torch.randn(num_tokens, V32.hidden_size, generator=torch.Generator().manual_seed(4)).to(dtype)


def check_layers(case: Case, dense: torch.Tensor, sparse: torch.Tensor) -> None:
    """Finite everywhere, and the same where all tokens are chosen; kernels are checked by themselves.

    Raises:
        WrongAnswerError: they are not.
    """
    if not (dense.isfinite().all() and sparse.isfinite().all()):
        raise WrongAnswerError(f"{case.name}: a layer's output is not finite")
    if case.num_chosen == case.context and not torch.equal(dense, sparse):
        raise WrongAnswerError(f"{case.name}: dense and sparse layers differ although all tokens are chosen")


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator).div_(shape[1] ** 0.5)
