"""Sampling on the device that computes the logits: what `sampler` means, without waiting for a result.

The host knows of every row which parameters it has and where its sequence ends, though not with which tokens. So steps
can be prepared ahead: all that depends on token ids, the counts of penalties, stays on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from rempart_engine.candidates import Candidates
from rempart_engine.core.step import NewRow, TokenLogprob
from rempart_engine.host_copies import to_device
from rempart_engine.kernels.sample import Chosen, choose
from rempart_engine.kernels.top_logprobs import top_logprobs
from rempart_engine.logprobs import RowLogprobs
from rempart_engine.sampling_rows import Rows, SamplingRows


@dataclass(frozen=True, slots=True)
class DeviceLogprobs:
    """Log-probabilities for W of P places; void for a place that is bad."""

    index: NDArray[np.int64]  # [W], which of the P places
    chosen: torch.Tensor  # [W] float32
    top_ids: torch.Tensor  # [W, M] int64, most likely first
    top_logprobs: torch.Tensor  # [W, M] float32, -inf where there is no more alternative
    num_top: NDArray[np.int64]  # [W], how many of the M are wanted

    def copied(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> "DeviceLogprobs":
        """The same of copies, such as `copy` makes on the host."""
        tensors = (self.chosen, self.top_ids, self.top_logprobs)
        chosen, top_ids, top_values = (copy(tensor) for tensor in tensors)
        return replace(self, chosen=chosen, top_ids=top_ids, top_logprobs=top_values)

    def token_logprobs(self, num_places: int) -> list[tuple[TokenLogprob, ...]]:
        """As values for a step's result, one tuple for each of the P places; waits if tensors are not on the host."""
        counts = (self.top_logprobs > -torch.inf).sum(dim=1)
        top = Candidates(self.top_ids, self.top_logprobs, counts) if self.top_ids.shape[1] else None
        return RowLogprobs(self.index, self.chosen, top, self.num_top).token_logprobs(num_places)


@dataclass(frozen=True, slots=True)
class DeviceSampled:
    """Outcome for P places, on the device."""

    token_ids: torch.Tensor  # [P] int64
    is_bad: torch.Tensor  # [P] bool: no token can be chosen (logits not finite, or every token forbidden); id is void
    logprobs: DeviceLogprobs | None
    """Of those places whose rows asked for them; None when none did."""


class DeviceSampling:
    """Sampling parameters of all rows, and the choice of their tokens."""

    def __init__(self, max_num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._state = SamplingRows(max_num_rows, vocab_size, device)

    def add(self, row: int, new: NewRow, eos_token_ids: Sequence[int]) -> None:
        """A sequence takes the row.

        Raises:
            InvalidRequestError: a token id of the parameters is outside the vocabulary.
        """
        self._state.add(row, new, eos_token_ids)

    def remove(self, row: int) -> None:
        """The row is free; nothing of its sequence stays in force."""
        self._state.remove(row)

    def may_repeat(self, rows: Rows) -> bool:
        """Whether each of the rows could be sampled several times in one step, with drafts between."""
        return self._state.may_repeat(rows)

    def sample(
        self,
        logits: torch.Tensor,  # [P, V] float32 (used as scratch: its contents are lost) or of a smaller type
        rows: Rows,  # [P]; a row may come several times, for several positions, if it `may_repeat`
        positions: NDArray[np.int64],  # [P], of the token to be sampled, in its sequence
    ) -> DeviceSampled:
        """Choose the next token of each place. `append` must be told of it."""
        state, logits = self._state, logits.float()
        wants = np.flatnonzero(state.wants_logprobs[rows])
        raw, raw_rows = logits, wants
        if len(wants) and state.edits(rows, positions):
            raw, raw_rows = logits[to_device(wants, self._device)], np.arange(len(wants))
        chosen = self._choose(logits, rows, positions)
        logprobs = None
        if len(wants):
            num_top = state.num_top_logprobs[rows[wants]]
            ids = chosen.token_ids[to_device(wants, self._device)]
            top = top_logprobs(raw, raw_rows, ids, int(num_top.max()))
            logprobs = DeviceLogprobs(wants, top.chosen, top.ids, top.logprobs, num_top)
        return DeviceSampled(chosen.token_ids, chosen.is_bad, logprobs)

    def draft(self, logits: torch.Tensor, rows: Rows, positions: NDArray[np.int64]) -> torch.Tensor:  # [R] int64
        """Guess tokens, as `sampler.draft` does: for like logits these are the ones that `sample` will choose."""
        return self._choose(logits.float(), rows, positions).token_ids

    def append(self, rows: Rows, token_ids: torch.Tensor, is_kept: torch.Tensor | None = None) -> None:
        """Sampled tokens [R] and whether they go on their rows' sequences, bool [R] (None: all do), on the device.

        A row whose choices depend on what it had comes once at most, in the order of its steps, and if its token is
        not kept, it is not sampled again.
        """
        self._state.append(rows, token_ids, is_kept)

    def _choose(self, logits: torch.Tensor, rows: Rows, positions: NDArray[np.int64]) -> Chosen:
        """For raw float32 logits, which are scratch."""
        state = self._state
        is_bad = None
        if state.edits(rows, positions):
            is_bad = ~logits.amax(dim=1).isfinite()  # an edit could hide it
            state.edit(logits, rows, positions)
        chosen = choose(logits, state.draws(rows, positions))
        return chosen if is_bad is None else replace(chosen, is_bad=chosen.is_bad | is_bad)
