"""Computes plans on one device: rows -> tensors -> model -> sampler -> result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rempart_engine.config import EngineConfig
from rempart_engine.core.request import SamplingParams
from rempart_engine.core.runner import LoadedModel
from rempart_engine.core.step import NewRow, RowResult, ScheduledRow, StepPlan, StepResult, TokenLogprob
from rempart_engine.inputs import RowTable
from rempart_engine.kv_storage import KVStorage
from rempart_engine.logprobs import prompt_logprobs
from rempart_engine.model.errors import ModelError
from rempart_engine.model.llama import Llama, kv_shape
from rempart_engine.model.loading import load_llama
from rempart_engine.model.precision import precision_named
from rempart_engine.model.weights.source import open_weights
from rempart_engine.sampler import Sampled, sample
from rempart_engine.sampling_rows import SamplingRows

NOT_FINITE = "the model's logits for this request were not finite, or no token was allowed"


@dataclass(frozen=True, slots=True)
class _Sampling:
    """The rows of a plan that sample, as columns [S]."""

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]


class ModelRunner:
    """A model, its KV storage and its rows. Implements `core.runner.Runner`."""

    def __init__(
        self,
        model: Llama,
        storage: KVStorage,
        rows: RowTable,
        sampling: SamplingRows,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._model = model
        self._storage = storage
        self._rows = rows
        self._sampling = sampling
        self._eos_token_ids = eos_token_ids
        self._num_prompt_logprobs: dict[int, int] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan; a row whose logits are not finite fails alone."""
        for new in plan.new_rows:
            self._start(new)
        inputs = self._rows.inputs(plan)
        logits = self._model(inputs, self._storage)
        prompt_logprobs_of_row = self._prompt_logprobs(plan, logits)
        sampling = _sampling_rows(plan)
        if not len(sampling.rows):
            results = [RowResult(row.row, prompt_logprobs=prompt_logprobs_of_row.get(row.row, ())) for row in plan.rows]
            return StepResult(plan.step, tuple(results))
        sampled = sample(_last_logits(plan, logits), sampling.rows, sampling.positions, self._sampling)
        token_ids = sampled.token_ids.cpu().numpy()
        self._rows.append_tokens(sampling.rows, token_ids)
        self._sampling.append(sampling.rows, token_ids)
        return StepResult(plan.step, _row_results(plan, sampled, token_ids, prompt_logprobs_of_row))

    def release_rows(self, rows: Sequence[int]) -> None:
        """Forget what sampling keeps of these rows; their tokens are overwritten when they start again."""
        for row in rows:
            self._sampling.remove(row)
            self._num_prompt_logprobs.pop(row, None)

    def _start(self, new: NewRow) -> None:
        self._rows.start(new)
        self._sampling.add(new.row, new, () if new.sampling.ignore_eos else self._eos_token_ids)
        if new.sampling.prompt_logprobs is not None:
            self._num_prompt_logprobs[new.row] = new.sampling.prompt_logprobs

    def _prompt_logprobs(self, plan: StepPlan, logits: torch.Tensor) -> dict[int, tuple[TokenLogprob, ...]]:
        """Of rows that want them: log-probabilities of the prompt tokens that follow this step's new tokens."""
        result: dict[int, tuple[TokenLogprob, ...]] = {}
        if not self._num_prompt_logprobs:
            return result
        for row, first in zip(plan.rows, _first_outputs(plan.rows), strict=True):
            if row.wants_prompt_logprobs:
                following = self._rows.token_ids(row.row, row.start + 1, row.start + row.num_new_tokens + 1)
                wanted = logits[first : first + len(following)]
                num_top = self._num_prompt_logprobs[row.row]
                result[row.row] = tuple(prompt_logprobs(wanted, torch.from_numpy(following), num_top))
        return result


def load_runner(config: EngineConfig, on_progress: Callable[[float], None]) -> LoadedModel:
    """Load the model that the configuration names and compile its kernels.

    Args:
        on_progress: told the fraction of the weights that is loaded, up to 1.

    Raises:
        ModelError: there is no such model, it is not one that can be served, or not even one KV block fits.
    """
    torch.set_num_threads(config.num_threads)
    source = open_weights(config.model)
    precision = precision_named(config.dtype)
    max_model_len = min(config.max_model_len or source.config.max_model_len, source.config.max_model_len)
    model = load_llama(source, precision, max_model_len, on_progress)
    shape = kv_shape(source.config, precision.dtype)
    num_blocks = config.num_blocks or config.kv_cache_bytes // shape.block_bytes
    if num_blocks < 1:
        raise ModelError(f"kv_cache_bytes={config.kv_cache_bytes} holds no KV block of {shape.block_bytes} bytes")
    runner = ModelRunner(
        model,
        KVStorage(shape, num_blocks),
        RowTable(config.max_num_rows, max_model_len),
        SamplingRows(config.max_num_rows, source.config.vocab_size),
        source.config.eos_token_ids,
    )
    _warm_up(runner)
    return LoadedModel(
        runner=runner,
        model_name=config.served_model_name or _name_of(config.model),
        architecture=source.architecture,
        vocab_size=source.config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=source.config.eos_token_ids,
        num_blocks=num_blocks,
        dtype=precision.name,
    )


def _name_of(model: Path) -> str:
    return model.stem if model.suffix == ".gguf" else model.resolve().name


def _warm_up(runner: ModelRunner) -> None:
    """One step through the ordinary path, so that no request waits for a compiler. It writes into block 0 only, whose
    contents mean nothing before the scheduler hands it out."""
    new = NewRow(0, (0, 0), 2, SamplingParams(temperature=0.0, max_tokens=1), 0, (0,))
    runner.execute(StepPlan(0, (new,), (ScheduledRow(0, 0, 2, (), samples=True),)))
    runner.release_rows((0,))


def _sampling_rows(plan: StepPlan) -> _Sampling:
    sampling = [(row.row, row.start + row.num_new_tokens) for row in plan.rows if row.samples]
    table = np.array(sampling, np.int64).reshape(-1, 2)
    return _Sampling(table[:, 0], table[:, 1])


def _num_outputs(row: ScheduledRow) -> int:
    """How many of the row's new tokens have logits; `inputs` chose them."""
    return row.num_new_tokens if row.wants_prompt_logprobs else int(row.samples)


def _first_outputs(rows: Sequence[ScheduledRow]) -> NDArray[np.int64]:
    """Where each row's logits begin."""
    counts = np.array([_num_outputs(row) for row in rows], np.int64)
    return np.cumsum(counts) - counts


def _last_logits(plan: StepPlan, logits: torch.Tensor) -> torch.Tensor:
    """Logits after the last token of each row that samples, [S, V]."""
    if not any(row.wants_prompt_logprobs for row in plan.rows):
        return logits
    ends = _first_outputs(plan.rows) + [_num_outputs(row) for row in plan.rows]
    return logits[torch.from_numpy(ends[[row.samples for row in plan.rows]] - 1)]


def _row_results(
    plan: StepPlan,
    sampled: Sampled,
    token_ids: NDArray[np.int64],
    prompt_logprobs_of_row: dict[int, tuple[TokenLogprob, ...]],
) -> tuple[RowResult, ...]:
    is_bad = sampled.is_bad.tolist()
    ids = token_ids.tolist()
    logprobs = sampled.logprobs.token_logprobs(len(ids)) if sampled.logprobs else [()] * len(ids)
    results, place = [], 0
    for row in plan.rows:
        prompt = prompt_logprobs_of_row.get(row.row, ())
        if not row.samples:
            results.append(RowResult(row.row, prompt_logprobs=prompt))
            continue
        if is_bad[place]:
            results.append(RowResult(row.row, error=NOT_FINITE))
        else:
            results.append(RowResult(row.row, (ids[place],), logprobs[place], prompt))
        place += 1
    return tuple(results)
