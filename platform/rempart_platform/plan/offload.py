"""Routed experts in host memory, everything else on the GPUs of one machine: what a machine too small can still do.

The host computes the experts of a decode step where they lie, so that its memory bandwidth bounds the step; a prefill
pass streams all experts to the GPUs instead, so that the links bound it.
"""

from dataclasses import dataclass

from rempart_platform.plan.bounds import read_shares
from rempart_platform.plan.machines import Machine
from rempart_platform.plan.placement import Placement, Setup, Sharing
from rempart_platform.plan.shapes import ModelShape
from rempart_platform.plan.tensors import Part, TensorGroup
from rempart_platform.plan.weights import WeightFormat, weight_bytes

ASSUMED_HOST_BANDWIDTHS = (200e9, 400e9)
"""Bytes/s of one and of two sockets with eight channels of DDR4-3200: taken when a machine's own is unknown."""
EXPERT_FORMATS = (WeightFormat.FP8, WeightFormat.INT8, WeightFormat.INT4)


@dataclass(frozen=True, slots=True)
class Offload:
    """A model with experts on one machine."""

    model: ModelShape
    machine: Machine
    setup: Setup

    @property
    def gpu_format(self) -> WeightFormat:
        """Of what stays on the GPUs: fp8 only where it can be multiplied."""
        is_fp8 = self.model.published is WeightFormat.FP8 and self.machine.gpu.has_fp8
        return WeightFormat.FP8 if is_fp8 else WeightFormat.BF16

    @property
    def gpu_placement(self) -> Placement:
        """Of which the routed experts are to be left out."""
        can_cut = self.model.attention.num_heads % self.machine.num_gpus == 0
        sharing = Sharing.TENSOR if can_cut else Sharing.EXPERT
        return Placement(self.model, self.machine, self.gpu_format, sharing, 1, self.setup)

    @property
    def gpu_bytes(self) -> float:
        """Of weights, on one GPU."""
        return self.gpu_placement.held.outside_experts

    @property
    def gpu_free_bytes(self) -> float:
        """For caches, on one GPU."""
        return self.machine.gpu.memory_bytes - self.setup.overhead_bytes - self.gpu_bytes

    def host_bytes(self, expert_format: WeightFormat) -> int:
        """Of the routed experts, without MTP's."""
        return weight_bytes(self.model.tensors, expert_format, _is_offloaded)

    def token_bytes(self, expert_format: WeightFormat) -> float:
        """Of the experts that one token uses."""
        return self.host_bytes(expert_format) * self.model.num_experts_per_token / self.model.num_experts

    @property
    def gpu_read_bytes(self) -> float:
        """Weights that a GPU reads for one token: all that it holds but the embedding."""
        return read_shares(self.gpu_placement).outside_experts

    def host_tokens_per_s(self, expert_format: WeightFormat, host_bandwidth: float) -> float:
        """Of one sequence, if the GPUs took no time."""
        return host_bandwidth / self.token_bytes(expert_format)

    def decode_tokens_per_s(self, expert_format: WeightFormat, host_bandwidth: float) -> float:
        """Of one sequence, at most: each layer's experts wait for its attention, and the next layer for them."""
        host_s = self.token_bytes(expert_format) / host_bandwidth
        return 1 / (host_s + self.gpu_read_bytes / self.machine.gpu.bandwidth)

    def pass_seconds(self, expert_format: WeightFormat) -> float | None:
        """Of streaming all experts once, each GPU over a link of its own; None when the link is unknown."""
        link = self.machine.gpu.host_link
        return None if link is None else self.host_bytes(expert_format) / (link * self.machine.num_gpus)


def _is_offloaded(group: TensorGroup) -> bool:
    return group.part is Part.ROUTED_EXPERTS and not group.is_mtp
