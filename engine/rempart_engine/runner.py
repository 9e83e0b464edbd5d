"""Computes plans on one device: rows -> tensors -> model -> sampler -> result."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from rempart_engine.config import EngineConfig
from rempart_engine.core.request import SamplingParams
from rempart_engine.core.runner import DoneStep, LoadedModel, Runner
from rempart_engine.core.step import NewRow, ScheduledRow, StepPlan, StepResult
from rempart_engine.drafter import Drafter
from rempart_engine.inputs import RowTable
from rempart_engine.kept import Kept
from rempart_engine.kv_storage import KVStorage, block_bytes
from rempart_engine.model.errors import ModelError
from rempart_engine.model.network import Network, load_network
from rempart_engine.model.precision import precision_named
from rempart_engine.model.weights.deepseek_folder import DeepseekFolder
from rempart_engine.model.weights.source import WeightsSource, open_weights
from rempart_engine.placement import placement_named
from rempart_engine.places import Places, sampling_places
from rempart_engine.prompt_logprobs import PromptLogprobs
from rempart_engine.results import row_results, sampled_logits
from rempart_engine.sampler import draft, verify
from rempart_engine.sampling_rows import SamplingRows

_log = logging.getLogger(__name__)

_DEFAULT_CACHE_BYTES = 1 << 30


class ModelRunner:
    """A network, its KV storage and its rows. Implements `core.runner.Runner`."""

    def __init__(
        self,
        network: Network,
        storage: KVStorage,
        rows: RowTable,
        sampling: SamplingRows,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._model = network.model
        self._drafter = None
        if network.drafter is not None:
            self._drafter = Drafter(network.drafter, storage, rows, partial(draft, state=sampling))
        self._storage = storage
        self._rows = rows
        self._sampling = sampling
        self._eos_token_ids = eos_token_ids
        self._prompt_logprobs = PromptLogprobs(rows.token_ids)

    def launch(self, plan: StepPlan) -> DoneStep:
        """Compute the plan now."""
        return DoneStep(self.execute(plan))

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan; a row whose logits are not finite fails alone."""
        for new in plan.new_rows:
            self._start(new)
        arrays = self._rows.arrays(plan)
        inputs = self._rows.inputs(arrays)
        hidden = self._model(inputs, self._storage)
        logits = self._model.logits(hidden[inputs.output_tokens])
        prompt_logprobs_of_row = self._prompt_logprobs.of_step(plan, logits)
        places = sampling_places(plan.rows)
        kept = self._sample(sampled_logits(plan, logits), places) if len(places.rows) else None
        num_drafts = {} if self._drafter is None else self._drafter.propose(plan, arrays, inputs, hidden, places, kept)
        return StepResult(plan.step, row_results(plan, places, kept, prompt_logprobs_of_row, num_drafts))

    def _sample(self, logits: torch.Tensor, places: Places) -> Kept:
        """Tokens for all places; those that go on their sequences are written down."""
        drafts = self._rows.token_ids_at(places.rows, places.positions)
        verified = verify(logits, places, drafts, self._sampling)
        is_kept = verified.is_kept.cpu().numpy()
        token_ids = verified.sampled.token_ids.cpu().numpy()
        rows, positions = places.rows[is_kept], places.positions[is_kept]
        self._rows.append_tokens(rows, positions, token_ids[is_kept])
        self._sampling.append(rows, token_ids[is_kept])
        return Kept(token_ids, is_kept, verified.is_bad.cpu().numpy(), verified.sampled.logprobs)

    def release_rows(self, rows: Sequence[int]) -> None:
        """Forget what sampling keeps of these rows; their tokens are overwritten when they start again."""
        for row in rows:
            self._sampling.remove(row)
            self._prompt_logprobs.forget(row)

    def _start(self, new: NewRow) -> None:
        self._rows.start(new)
        self._sampling.add(new.row, new, () if new.sampling.ignore_eos else self._eos_token_ids)
        self._prompt_logprobs.start(new)


def load_runner(config: EngineConfig, on_progress: Callable[[float], None]) -> LoadedModel:
    """Load the model that the configuration names and compile its kernels.

    Args:
        on_progress: told the fraction of the weights that is loaded, up to 1.

    Raises:
        ModelError: there is no such model, it is not one that can be served, or not even one KV block fits.
    """
    return runner_of(open_weights(config.model), config, on_progress)


def runner_of(source: WeightsSource, config: EngineConfig, on_progress: Callable[[float], None]) -> LoadedModel:
    """The same for weights from elsewhere."""
    torch.set_num_threads(config.num_threads)
    placement = placement_named(config.device)
    is_fp8_checkpoint = isinstance(source, DeepseekFolder) and source.config.fp8 is not None
    precision = precision_named(config.dtype, placement, is_fp8_checkpoint=is_fp8_checkpoint)
    _log.info(str(placement), extra={"device": str(placement.device), "dtype": precision.name})
    max_model_len = min(config.max_model_len or source.config.max_model_len, source.config.max_model_len)
    network = load_network(source, config, precision, max_model_len, on_progress)
    of_model = (source.config.vocab_size, source.config.eos_token_ids)
    if placement.uses_triton:
        from rempart_engine.gpu.loading import load_gpu_runner  # needs Triton, which CPU installs do without

        runner: Runner
        runner, num_blocks = load_gpu_runner(network, config, max_model_len, *of_model, placement.device)
    else:
        runner, num_blocks = _load_cpu_runner(network, config, max_model_len, *of_model)
    return LoadedModel(
        runner=runner,
        model_name=config.served_model_name or _name_of(config.model),
        architecture=source.architecture,
        vocab_size=source.config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=source.config.eos_token_ids,
        num_blocks=num_blocks,
        dtype=precision.name,
        num_mtp_layers=int(network.drafter is not None),
    )


def _load_cpu_runner(
    network: Network, config: EngineConfig, max_model_len: int, vocab_size: int, eos_token_ids: tuple[int, ...]
) -> tuple[Runner, int]:
    """A runner that is warm, and how many KV blocks it has."""
    num_bytes, bytes_per_block = config.kv_cache_bytes or _DEFAULT_CACHE_BYTES, block_bytes(network.pools)
    num_blocks = config.num_blocks or num_bytes // bytes_per_block
    if num_blocks < 1:
        raise ModelError(f"kv_cache_bytes={num_bytes} holds no KV block of {bytes_per_block} bytes")
    runner = ModelRunner(
        network,
        KVStorage(network.pools, num_blocks),
        RowTable(config.max_num_rows, max_model_len),
        SamplingRows(config.max_num_rows, vocab_size),
        eos_token_ids,
    )
    _warm_up(runner)
    return runner, num_blocks


def _name_of(model: Path) -> str:
    return model.stem if model.suffix == ".gguf" else model.resolve().name


def _warm_up(runner: ModelRunner) -> None:
    """One step through the ordinary path, so that no request waits for a compiler. It writes into block 0 only, whose
    contents mean nothing before the scheduler hands it out."""
    new = NewRow(0, (0, 0), 2, SamplingParams(temperature=0.0, max_tokens=1), 0, (0,))
    runner.execute(StepPlan(0, (new,), (ScheduledRow(0, 0, 2, (), samples=True),)))
    runner.release_rows((0,))
