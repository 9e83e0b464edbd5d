"""From a network to a runner on a GPU: trial steps, KV storage in what they leave, graphs."""

import logging
from collections.abc import Callable, Sequence

import torch

from rempart_engine.config import BLOCK_SIZE, EngineConfig
from rempart_engine.core.request import SamplingParams
from rempart_engine.core.step import NewRow, ScheduledRow, StepPlan
from rempart_engine.device_sampling import DeviceSampling
from rempart_engine.gpu.buckets import buckets
from rempart_engine.gpu.graphs import Graphs, capture
from rempart_engine.gpu.memory import MemoryUse, bytes_for_blocks
from rempart_engine.gpu.rows import DeviceRows
from rempart_engine.gpu.runner import GpuRunner
from rempart_engine.kv_storage import KVStorage, block_bytes
from rempart_engine.model.errors import ModelError
from rempart_engine.model.network import Network

_log = logging.getLogger(__name__)

_INTERPRETED_CACHE_BYTES = 1 << 30
"""Where there is no GPU to try steps on."""


def load_gpu_runner(
    network: Network,
    config: EngineConfig,
    max_model_len: int,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    device: torch.device,
) -> tuple[GpuRunner, int]:
    """A runner that is warm, and how many KV blocks it has.

    Raises:
        ModelError: not even one KV block fits.
    """
    rows = DeviceRows(config.max_num_rows, max_model_len, device)
    sampling = DeviceSampling(config.max_num_rows, vocab_size, device)

    def with_blocks(num_blocks: int) -> GpuRunner:
        storage = KVStorage(network.pools, num_blocks, device)
        return GpuRunner(network, storage, rows, sampling, eos_token_ids)

    trials = trial_plans(config, max_model_len)
    num_blocks = config.num_blocks
    if num_blocks is None:
        num_bytes = config.kv_cache_bytes or _left_by(trials, with_blocks, config.gpu_memory_fraction, device)
        num_blocks = num_bytes // block_bytes(network.pools)
        if num_blocks < 1:
            raise ModelError(
                f"{num_bytes} bytes (kv_cache_bytes, or what gpu_memory_fraction leaves) hold no KV block of "
                f"{block_bytes(network.pools)} bytes"
            )
    runner = with_blocks(num_blocks)
    if device.type == "cuda":
        _run(runner, trials)
    if config.max_graph_tokens:
        runner.replay(_graphs(runner, rows, config, max_model_len))
    return runner, num_blocks


def trial_plans(config: EngineConfig, max_model_len: int) -> tuple[StepPlan, ...]:
    """The largest steps: the last tokens of the longest prompt, and a token for as many rows as there can be.

    They write into KV block 0 only, whose contents mean nothing before the scheduler hands it out.
    """
    num_tokens = min(config.max_step_tokens, max_model_len)
    sampling = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=1, logprobs=config.max_logprobs)
    blocks = (0,) * -(-max_model_len // BLOCK_SIZE)
    long = NewRow(0, (0,) * max_model_len, max_model_len, sampling, 0, blocks)
    prompt = StepPlan(0, (long,), (ScheduledRow(0, max_model_len - num_tokens, num_tokens, (), samples=True),))
    count = min(config.max_num_rows, config.max_step_tokens)
    short = tuple(NewRow(row, (0,), 1, sampling, 0, (0,)) for row in range(count))
    decoding = tuple(ScheduledRow(row, 0, 1, (), samples=True) for row in range(count))
    return prompt, StepPlan(0, short, decoding)


def _run(runner: GpuRunner, plans: Sequence[StepPlan]) -> None:
    """Raises ModelError when memory does not suffice."""
    for plan in plans:
        result = runner.launch(plan).result()
        runner.release_rows([new.row for new in plan.new_rows])
        if result.is_lost:
            raise ModelError(
                f"the GPU's memory does not suffice for a step of {plan.num_tokens} tokens: lower max_step_tokens, "
                "max_num_rows or max_model_len"
            )


def _left_by(
    trials: Sequence[StepPlan], with_blocks: Callable[[int], GpuRunner], fraction: float, device: torch.device
) -> int:
    """Bytes for KV blocks, given what the steps take."""
    if device.type != "cuda":
        return _INTERPRETED_CACHE_BYTES
    runner = with_blocks(1)
    _run(runner, trials)  # compiles kernels, and lets libraries take their workspaces
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    kept = torch.cuda.memory_allocated(device)
    _run(runner, trials)
    step = torch.cuda.max_memory_allocated(device) - kept
    free, total = torch.cuda.mem_get_info(device)
    use = MemoryUse(total, total - free - torch.cuda.memory_reserved(device), kept, step)
    _log.info("memory after trial steps", extra={"bytes_total": total, "bytes_kept": kept, "bytes_of_step": step})
    # Graphs of small steps keep at most what a large step has for a moment.
    return bytes_for_blocks(use, fraction, graphs=step)


def _graphs(runner: GpuRunner, rows: DeviceRows, config: EngineConfig, max_model_len: int) -> Graphs:
    shapes = buckets(min(config.max_graph_tokens, config.max_step_tokens), max_model_len)
    try:
        return capture(shapes, rows.tokens, runner.compute)
    except torch.OutOfMemoryError:
        _log.warning("memory does not suffice for graphs of small steps: they are launched kernel by kernel")
        return Graphs({})
