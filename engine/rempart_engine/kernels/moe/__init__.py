"""All routed experts of a layer on a GPU, each token computed by the few it was routed to."""

import torch
from torch import nn

from rempart_engine.kernels.moe.matrices import Matrix, empty_matrices, in_numbers
from rempart_engine.kernels.product_tiles import Numbers


class GroupedExperts(nn.Module):
    """Gated MLPs, stacked: down(silu(gate(x)) * up(x)) for each.

    Numbers of weights: "float32" and "bfloat16" as they are; "fp8" with scales of 128 x 128 blocks, multiplied in e4m3
    with quantized activations where the GPU can and activations are bfloat16, else decoded as they are read; "int8" and
    "int4" (W8A16, W4A16) with one scale for each output's 128 inputs, made from any weight as it is written.
    """

    gate_up: torch.Tensor  # [E, 2, F, W] as `empty_matrices` says
    gate_up_scales: torch.Tensor | None
    down: torch.Tensor  # [E, W, F]
    down_scales: torch.Tensor | None

    def __init__(
        self, num_experts: int, width: int, intermediate: int, numbers: Numbers, device: torch.device | str
    ) -> None:
        """Room for the weights; `write` fills it."""
        super().__init__()
        self.num_experts, self.width, self.intermediate, self.numbers = num_experts, width, intermediate, numbers
        device = torch.device(device)
        data, scales = empty_matrices(numbers, (num_experts, 2), intermediate, width, device)
        self.register_buffer("gate_up", data)
        self.register_buffer("gate_up_scales", scales)
        data, scales = empty_matrices(numbers, (num_experts,), width, intermediate, device)
        self.register_buffer("down", data)
        self.register_buffer("down_scales", scales)

    def write(self, expert: int, gate: Matrix, up: Matrix, down: Matrix) -> None:
        """Fills one expert with gate and up [F, W] and down [W, F].

        Raises:
            ValueError: a matrix has another shape, or fp8 blocks that these numbers cannot hold.
            IndexError: there is no such expert.
        """
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} of {self.num_experts}")
        for name, matrix, shape in (
            ("gate", gate, (self.intermediate, self.width)),
            ("up", up, (self.intermediate, self.width)),
            ("down", down, (self.width, self.intermediate)),
        ):
            if matrix.data.shape != shape:
                raise ValueError(f"an expert's {name} is {shape}, not {tuple(matrix.data.shape)}")
        self._write(self.gate_up, self.gate_up_scales, (expert, 0), gate)
        self._write(self.gate_up, self.gate_up_scales, (expert, 1), up)
        self._write(self.down, self.down_scales, (expert,), down)

    def _write(self, data: torch.Tensor, scales: torch.Tensor | None, place: tuple[int, ...], matrix: Matrix) -> None:
        new_data, new_scales = in_numbers(matrix, self.numbers, data.device)
        data[place].copy_(new_data)
        if scales is not None and new_scales is not None:
            scales[place].copy_(new_scales)

    def forward(
        self,
        x: torch.Tensor,  # [T, W] float32 or bfloat16
        experts: torch.Tensor,  # [T, k] int64: valid ids, as `kernels.route_tokens` gives them
        weights: torch.Tensor,  # [T, k] float32
    ) -> torch.Tensor:  # [T, W] float32
        """Sum of weight x expert(x) over each token's experts, in the order of its row of ids.

        A row's bits do not depend on the other rows. Nothing waits for the GPU, and shapes depend on T and k alone.

        Raises:
            ValueError: shapes, types or strides are others.
        """
        if x.dim() != 2 or x.shape[1] != self.width or x.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"[T, {self.width}] in float32 or bfloat16 is taken, not {tuple(x.shape)} in {x.dtype}")
        if self.width > 1 and x.stride(1) != 1:
            raise ValueError(f"a token's channels lie side by side, not with strides {x.stride()}")
        if experts.dim() != 2 or len(experts) != len(x) or experts.dtype != torch.int64:
            raise ValueError(f"[{len(x)}, k] ids in int64 are taken, not {tuple(experts.shape)} in {experts.dtype}")
        if weights.shape != experts.shape or weights.dtype != torch.float32:
            raise ValueError(f"weights {tuple(weights.shape)} in {weights.dtype} do not fit ids {tuple(experts.shape)}")
        from rempart_engine.kernels.moe.kernel import Stack, grouped_experts

        stack = Stack(self.numbers, self.gate_up, self.gate_up_scales, self.down, self.down_scales)
        return grouped_experts(x, experts.contiguous(), weights.contiguous(), stack)
