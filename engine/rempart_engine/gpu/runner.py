"""Computes plans on a GPU: everything is launched, and nothing is waited for but the sampled tokens.

plan -> arrays -> [graph, or model] -> logits -> sampled tokens -> rows of the device -> next plan's tokens
                                                        └─► host, while the next plan is launched
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rempart_engine.core.runner import DoneStep, PendingStep
from rempart_engine.core.step import NewRow, StepPlan, StepResult, TokenLogprob
from rempart_engine.device_sampling import DeviceLogprobs, DeviceSampling
from rempart_engine.drafter import Drafter
from rempart_engine.gpu.copies import Download, to_host
from rempart_engine.gpu.graphs import Graphs, Outputs
from rempart_engine.gpu.rows import DeviceRows
from rempart_engine.host_copies import to_device
from rempart_engine.inputs import StepArrays, StepInputs
from rempart_engine.kept import Kept
from rempart_engine.kv_storage import KVStorage
from rempart_engine.model.network import Network
from rempart_engine.places import Places, sampling_places
from rempart_engine.prompt_logprobs import PromptLogprobs
from rempart_engine.results import row_results, sampled_logits
from rempart_engine.sampler import accepted

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Sampled:
    """Tokens of a step's places on their way to the host."""

    download: Download
    logprobs: DeviceLogprobs | None
    """On the host when the download is."""

    def kept(self) -> Kept:
        """Wait for them."""
        host = self.download.wait()
        return Kept(host["token_ids"], host["is_kept"], host["is_bad"], self.logprobs)


@dataclass(frozen=True, slots=True, eq=False)
class _GpuStep:
    """A step that was launched."""

    plan: StepPlan
    places: Places
    sampled: _Sampled | None
    prompt_logprobs: Mapping[int, tuple[TokenLogprob, ...]]
    num_drafts: Mapping[int, int]
    is_done: bool = False

    def result(self) -> StepResult:
        kept = None if self.sampled is None else self.sampled.kept()
        rows = row_results(self.plan, self.places, kept, self.prompt_logprobs, self.num_drafts)
        return StepResult(self.plan.step, rows)


class GpuRunner:
    """A network, its KV storage and its rows. Implements `core.runner.Runner`."""

    def __init__(
        self,
        network: Network,
        storage: KVStorage,
        rows: DeviceRows,
        sampling: DeviceSampling,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._model = network.model
        self._storage = storage
        self._rows = rows
        self._sampling = sampling
        self._eos_token_ids = eos_token_ids
        self._graphs = Graphs({})
        self._prompt_logprobs = PromptLogprobs(rows.prompt_token_ids)
        self._drafter = None
        if network.drafter is not None:
            self._drafter = Drafter(network.drafter, storage, rows, sampling.draft)

    def replay(self, graphs: Graphs) -> None:
        """From now on replay steps that these graphs hold."""
        self._graphs = graphs

    @torch.inference_mode()
    def compute(self, inputs: StepInputs) -> Outputs:
        """Hidden states and logits of all tokens, as graphs capture them."""
        hidden = self._model(inputs, self._storage)
        return hidden, self._model.logits(hidden)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Launch the plan; a row whose logits are not finite fails alone, and a step that finds no memory is lost.

        A step that proposes drafts, or has log-probabilities of a prompt, waits for its tokens here.
        """
        try:
            return self._launch(plan)
        except torch.OutOfMemoryError:
            _log.warning("memory does not suffice for a step", extra={"num_tokens": plan.num_tokens})
            if self._rows.tokens.is_cuda:
                torch.cuda.empty_cache()
            return DoneStep(StepResult.lost(plan))

    def release_rows(self, rows: Sequence[int]) -> None:
        """Forget what sampling keeps of these rows; their tokens are overwritten when they start again."""
        for row in rows:
            self._sampling.remove(row)
            self._prompt_logprobs.forget(row)

    def _launch(self, plan: StepPlan) -> _GpuStep:
        for new in plan.new_rows:
            self._start(new)
        arrays = self._rows.arrays(plan)
        hidden, logits = self._outputs(arrays)
        prompt_logprobs_of_row = self._prompt_logprobs.of_step(plan, logits)
        places = sampling_places(plan.rows)
        sampled = self._sample(sampled_logits(plan, logits), places) if len(places.rows) else None
        kept, num_drafts = None, {}
        if self._drafter is not None:
            if sampled is not None and any(row.max_drafts for row in plan.rows):
                kept = sampled.kept()
            num_drafts = self._drafter.propose(plan, arrays, self._rows.inputs(arrays), hidden, places, kept)
        return _GpuStep(plan, places, sampled, prompt_logprobs_of_row, num_drafts, is_done=kept is not None)

    def _outputs(self, arrays: StepArrays) -> Outputs:
        """Hidden states [T, W] of all tokens, and logits [O, V] of those that need them."""
        outputs = self._graphs.run(arrays)
        if outputs is not None:
            hidden, logits = outputs
            if len(arrays.output_tokens) < len(logits):
                logits = logits[to_device(arrays.output_tokens, logits.device)]
            return hidden, logits
        inputs = self._rows.inputs(arrays)
        hidden = self._model(inputs, self._storage)
        return hidden, self._model.logits(hidden[inputs.output_tokens])

    def _sample(self, logits: torch.Tensor, places: Places) -> _Sampled:
        """Tokens for all places, written down where the next step's inputs are read."""
        sampled = self._sampling.sample(logits, places.rows, places.positions)
        is_kept, is_bad = ~sampled.is_bad, sampled.is_bad
        if places.has_drafts:
            drafts = self._rows.token_ids_at(places.rows, places.positions)
            is_kept, is_bad = accepted(sampled.token_ids, sampled.is_bad, places, drafts)
        # What is not kept is written beyond the row's end, and overwritten before it is read.
        self._rows.write_drafts(places.rows, places.positions, sampled.token_ids)
        self._sampling.append(places.rows, sampled.token_ids, is_kept)
        logprobs = None if sampled.logprobs is None else sampled.logprobs.copied(to_host)
        tensors = {"token_ids": sampled.token_ids, "is_kept": is_kept, "is_bad": is_bad}
        return _Sampled(Download(tensors), logprobs)

    def _start(self, new: NewRow) -> None:
        self._rows.start(new)
        self._sampling.add(new.row, new, () if new.sampling.ignore_eos else self._eos_token_ids)
        self._prompt_logprobs.start(new)
