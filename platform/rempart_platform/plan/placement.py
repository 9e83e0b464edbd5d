"""Where weights and caches go: what each GPU holds under a layout, and how many contexts then fit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rempart_platform.plan.attention import CacheFormat
from rempart_platform.plan.errors import PlanError
from rempart_platform.plan.lines import write_amount
from rempart_platform.plan.machines import Gpu, Machine
from rempart_platform.plan.shapes import ModelShape
from rempart_platform.plan.tensors import Part, TensorGroup
from rempart_platform.plan.weights import WeightFormat, group_bytes

MOST_MACHINES = 64
"""Beyond this many, a model is said not to fit."""


class Sharing(StrEnum):
    """How the GPUs share the work."""

    TENSOR = "TP"
    """Every GPU computes a slice of each layer for all sequences; several machines are stages of a pipeline."""
    EXPERT = "DP + EP"
    """Every GPU holds all but the routed experts and computes attention for sequences of its own; experts are shared
    out among all GPUs. Without experts: every GPU holds all."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is to be placed, and what is kept free.

    Raises:
        PlanError: the overhead is no amount.
    """

    cache_format: CacheFormat
    overhead_bytes: float
    """Of each GPU: its context, communication buffers, a step's workspace."""
    with_mtp: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.overhead_bytes < math.inf:
            raise PlanError(f"--overhead-gb must be a number of at least 0, got {self.overhead_bytes / 1e9:g}")


@dataclass(frozen=True, slots=True)
class Shares:
    """What one GPU has of something, by how it is divided."""

    whole: float
    """Held by every GPU that has the layer."""
    split: float
    """Divided by tensor parallelism."""
    experts: float
    """Divided by expert and by tensor parallelism."""

    @property
    def outside_experts(self) -> float:
        return self.whole + self.split

    @property
    def total(self) -> float:
        return self.whole + self.split + self.experts


@dataclass(frozen=True, slots=True)
class Placement:
    """A model on machines of one kind, in one format and layout."""

    model: ModelShape
    machine: Machine
    weight_format: WeightFormat
    sharing: Sharing
    num_machines: int
    setup: Setup

    @property
    def gpu(self) -> Gpu:
        return self.machine.gpu

    @property
    def num_gpus(self) -> int:
        """Of all machines."""
        return self.num_machines * self.machine.num_gpus

    @property
    def num_stages(self) -> int:
        """Of the pipeline."""
        return self.num_machines if self.sharing is Sharing.TENSOR else 1

    @property
    def num_ranks(self) -> int:
        """GPUs that each layer's matrices are cut for."""
        return self.machine.num_gpus if self.sharing is Sharing.TENSOR else 1

    @property
    def num_groups(self) -> int:
        """Groups of GPUs with sequences of their own."""
        return 1 if self.sharing is Sharing.TENSOR else self.num_gpus

    @property
    def layout(self) -> str:
        if self.num_gpus == 1:
            return "one GPU"
        if self.sharing is Sharing.TENSOR:
            return f"TP {self.num_ranks}" + (f" x PP {self.num_stages}" if self.num_stages > 1 else "")
        if self.model.num_experts:
            return f"DP attention {self.num_gpus} + EP {self.num_gpus}"
        return f"DP {self.num_gpus}"

    @property
    def num_mtp_layers(self) -> int:
        """That are held."""
        return self.model.num_mtp_layers if self.setup.with_mtp else 0

    @property
    def most_layers(self) -> int:
        """Of one stage."""
        return -(-(self.model.num_layers + self.num_mtp_layers) // self.num_stages)

    def even_shares(self, amount: Callable[[TensorGroup], float]) -> Shares:
        """A GPU's part of the sum of `amount` over all groups, were layers and experts divided evenly."""
        groups = self.model.tensors
        experts = sum(amount(group) for group in groups if group.part is Part.ROUTED_EXPERTS)
        others = [group for group in groups if group.part is not Part.ROUTED_EXPERTS]
        return Shares(
            whole=sum(amount(group) for group in others if not group.is_split) / self.num_stages,
            split=sum(amount(group) for group in others if group.is_split) / self.num_stages / self.num_ranks,
            experts=experts / self.num_gpus,
        )

    @property
    def held(self) -> Shares:
        """Bytes of weights on the GPU that has most of each: layers and experts are whole things."""
        ends = {Part.EMBEDDING: 0.0, Part.HEAD: 0.0}
        whole = split = experts = 0.0
        for group in filter(self.is_held, self.model.tensors):
            size = group_bytes(group, self.weight_format)
            if group.part in ends:
                ends[group.part] += size
            elif group.part is Part.ROUTED_EXPERTS:
                experts += size
            elif group.is_split:
                split += size
            else:
                whole += size
        stage = self.most_layers / (self.model.num_layers + self.num_mtp_layers)
        # The first stage of a pipeline has the embedding, its last the head.
        at_ends = sum(ends.values()) if self.num_stages == 1 else max(ends.values())
        return Shares(
            whole=stage * whole,
            split=(stage * split + at_ends) / self.num_ranks,
            experts=experts * self._most_experts_share(),
        )

    @property
    def outside_experts_formula(self) -> str:
        """Of the bytes that a GPU holds beside routed experts."""
        held = self.held
        if self.num_ranks == 1:
            return f"{write_amount(held.outside_experts, 'B')} whole"
        return f"{write_amount(held.whole, 'B')} whole + {write_amount(held.split, 'B')} cut"

    def _most_experts_share(self) -> float:
        if not self.model.num_experts:
            return 0.0
        if self.sharing is Sharing.EXPERT:
            return -(-self.model.num_experts // self.num_gpus) / self.model.num_experts
        expert_layers = self.model.num_expert_layers + self.num_mtp_layers
        return min(1.0, self.most_layers / expert_layers) / self.num_ranks

    def is_held(self, group: TensorGroup) -> bool:
        """MTP is optional, and its copies of embedding and head never need memory."""
        return not group.is_mtp or (self.setup.with_mtp and group.part in (Part.ROUTED_EXPERTS, Part.OTHER))

    @property
    def free_bytes(self) -> float:
        """For caches, on a GPU; negative when the weights do not fit."""
        return self.gpu.memory_bytes - self.setup.overhead_bytes - self.held.total

    def context_bytes(self, context: int) -> float:
        """Of the cache of one sequence, on each GPU that has a part of it."""
        attention = self.model.attention
        per_token = attention.cache_bytes(self.setup.cache_format, with_mtp=self.setup.with_mtp)
        stage = self.most_layers / (self.model.num_layers + self.num_mtp_layers)
        return context * per_token * stage / attention.cache_shards(self.num_ranks)

    def num_contexts(self, context: int) -> int:
        """Sequences of that many tokens that fit at once."""
        return max(0, self.num_groups * math.floor(self.free_bytes / self.context_bytes(context)))

    def contexts_formula(self, context: int) -> str:
        held = self.held
        memory, overhead = write_amount(self.gpu.memory_bytes, "B"), write_amount(self.setup.overhead_bytes, "B")
        weights = f"{write_amount(held.outside_experts, 'B')} weights"
        if held.experts:
            weights += f" - {write_amount(held.experts, 'B')} routed experts"
        cache = f"{write_amount(self.context_bytes(context), 'B')} cache"
        each = f"floor(({memory} - {overhead} overhead - {weights}) / {cache})"
        return f"max(0; {self.num_groups} * {each})" if self.num_groups > 1 else f"max(0; {each})"


def placements(
    model: ModelShape, machine: Machine, weight_format: WeightFormat, num_machines: int, setup: Setup
) -> tuple[Placement, ...]:
    """In every layout that can be: tensor parallelism needs to divide the heads, a pipeline has a layer a stage."""
    found = []
    can_cut = model.attention.num_heads % machine.num_gpus == 0 and num_machines <= model.num_layers
    for sharing in Sharing:
        if sharing is Sharing.TENSOR and not can_cut:
            continue
        if sharing is Sharing.EXPERT and machine.num_gpus * num_machines == 1 and can_cut:
            continue  # on one GPU the two are the same
        found.append(Placement(model, machine, weight_format, sharing, num_machines, setup))
    return tuple(found)


def roomiest(candidates: Sequence[Placement], context: int) -> Placement:
    """That with most contexts; of equals, the one with more memory left, then the first."""
    return max(candidates, key=lambda each: (each.num_contexts(context), each.free_bytes))


def smallest(
    model: ModelShape, machine: Machine, weight_format: WeightFormat, setup: Setup, context: int
) -> Placement | None:
    """On as few machines as hold the weights and one context; None when no number up to MOST_MACHINES does."""
    for num_machines in range(1, MOST_MACHINES + 1):
        roomy = roomiest(placements(model, machine, weight_format, num_machines, setup), context)
        if roomy.num_contexts(context):
            return roomy
    return None


def formats_by_worth(model: ModelShape, gpu: Gpu) -> tuple[WeightFormat, ...]:
    """All formats, the one to try first coming first: as published, then from the widest to the narrowest.

    A GPU without fp8 has to decode fp8 weights before it multiplies: int8, which it can multiply, comes first.
    """
    if not gpu.has_fp8:
        return (WeightFormat.BF16, WeightFormat.INT8, WeightFormat.FP8, WeightFormat.INT4)
    if model.published is WeightFormat.FP8:
        return (WeightFormat.FP8, WeightFormat.BF16, WeightFormat.INT8, WeightFormat.INT4)
    return (WeightFormat.BF16, WeightFormat.FP8, WeightFormat.INT8, WeightFormat.INT4)


def best(model: ModelShape, machine: Machine, setup: Setup, context: int) -> Placement | None:
    """On as few machines as any format takes; of formats that take equally many, in the one of most worth."""
    found = [smallest(model, machine, each, setup, context) for each in formats_by_worth(model, machine.gpu)]
    return min((each for each in found if each is not None), key=lambda each: each.num_machines, default=None)
