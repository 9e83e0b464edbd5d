"""Graphs of small steps: a model's hundreds of launches as one."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rempart_engine.gpu.buckets import Bucket, bucket_for, filling, flattened
from rempart_engine.gpu.copies import Layout
from rempart_engine.gpu.rows import as_mapping, step_inputs
from rempart_engine.inputs import StepArrays, StepInputs

_log = logging.getLogger(__name__)

Outputs = tuple[torch.Tensor, torch.Tensor]
"""Hidden states [T, W] and logits [T, V] of all tokens of a step."""
Compute = Callable[[StepInputs], Outputs]


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """One shape: the memory that its graph reads, and what the graph leaves."""

    layout: Layout
    buffer: torch.Tensor  # [bytes] uint8, on the device
    replay: Callable[[], Any]
    outputs: Outputs


class Graphs:
    """Steps that fit one of the captured shapes."""

    def __init__(self, captured: Mapping[Bucket, _Captured]) -> None:
        self._captured = captured

    def run(self, arrays: StepArrays) -> Outputs | None:
        """Outputs of a step's tokens, which last until the next run; None if the step is too large for every shape."""
        bucket = bucket_for(arrays, tuple(self._captured))
        if bucket is None:
            return None
        captured = self._captured[bucket]
        packed = captured.layout.pack(as_mapping(flattened(arrays, bucket)), captured.buffer.device)
        captured.buffer.copy_(packed, non_blocking=True)
        captured.replay()
        hidden, logits = captured.outputs
        num_tokens = len(arrays.positions)
        return hidden[:num_tokens], logits[:num_tokens]


def capture(among: Sequence[Bucket], tokens: torch.Tensor, compute: Compute) -> Graphs:
    """Capture every shape, the largest first, for smaller ones find room in its memory.

    Args:
        tokens: of all rows, `DeviceRows.tokens`.
        compute: called for each shape, once to warm up and once to be recorded; it must not wait for the device.
    """
    pool = torch.cuda.graph_pool_handle() if tokens.is_cuda else None
    captured = {bucket: _capture(bucket, tokens, compute, pool) for bucket in sorted(among, reverse=True)}
    _log.info("small steps are replayed from graphs", extra={"num_graphs": len(captured)})
    return Graphs(captured)


def _capture(bucket: Bucket, tokens: torch.Tensor, compute: Compute, pool: Any) -> _Captured:
    arrays = as_mapping(filling(bucket))
    layout = Layout.of(arrays)
    buffer = layout.pack(arrays, tokens.device).to(tokens.device, copy=True)
    views = layout.views(buffer)

    def once() -> Outputs:
        return compute(step_inputs(views, tokens, bucket.max_context))

    outputs = once()
    if not tokens.is_cuda:
        return _Captured(layout, buffer, lambda: _copy(once(), outputs), outputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = once()
    return _Captured(layout, buffer, graph.replay, outputs)


def _copy(source: Outputs, target: Outputs) -> None:
    for new, old in zip(source, target, strict=True):
        old.copy_(new)
