"""What sampling keeps for every row from step to step, and the edits of logits that follow from it."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rempart_engine.core.request import InvalidRequestError
from rempart_engine.core.step import NewRow
from rempart_engine.host_copies import to_device
from rempart_engine.kernels.sample import Draws
from rempart_engine.seen_tokens import RowLists, SeenTokens

Rows = NDArray[np.int64]

_LEAST_TEMPERATURE = 1e-6  # below it the quotient of logits could overflow; the draw is greedy long before


class SamplingRows:
    """Sampling parameters of all rows, as columns indexed by row number.

    Rows enter with `add`, get their sampled tokens with `append`, leave with `remove`. Columns live on the host, where
    they decide which work a step needs at all; token ids and counts live on the device. Nothing here waits for it.
    """

    def __init__(self, max_num_rows: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._max_num_rows, self._vocab_size, self._device = max_num_rows, vocab_size, device
        self.is_greedy = np.ones(max_num_rows, np.bool_)
        self.temperature = np.ones(max_num_rows, np.float32)
        self.top_k = np.zeros(max_num_rows, np.int64)
        self.top_p = np.ones(max_num_rows, np.float64)
        self.min_p = np.zeros(max_num_rows, np.float64)
        self.seed = np.zeros(max_num_rows, np.uint64)
        self.choice = np.zeros(max_num_rows, np.int64)
        self.wants_logprobs = np.zeros(max_num_rows, np.bool_)
        self.num_top_logprobs = np.zeros(max_num_rows, np.int64)
        self._repetition = np.ones(max_num_rows, np.float32)
        self._presence = np.zeros(max_num_rows, np.float32)
        self._frequency = np.zeros(max_num_rows, np.float32)
        self._has_penalties = np.zeros(max_num_rows, np.bool_)
        self._has_bias = np.zeros(max_num_rows, np.bool_)
        self._has_allowed = np.zeros(max_num_rows, np.bool_)
        self._min_tokens = np.zeros(max_num_rows, np.int64)
        self._num_prompt_tokens = np.zeros(max_num_rows, np.int64)
        self._num_output = np.zeros(max_num_rows, np.int64)
        self._bias_ids = RowLists(max_num_rows, torch.int64, device)
        self._bias = RowLists(max_num_rows, torch.float32, device)
        self._allowed_ids = RowLists(max_num_rows, torch.int64, device)
        self._ending_ids = RowLists(max_num_rows, torch.int64, device)
        self._seen: SeenTokens | None = None  # large, so made when a row first has penalties

    def add(self, row: int, new: NewRow, eos_token_ids: Sequence[int]) -> None:
        """A sequence takes the row.

        Raises:
            InvalidRequestError: a token id of the parameters is outside the vocabulary.
        """
        sampling = new.sampling
        endings = tuple(dict.fromkeys((*sampling.stop_token_ids, *eos_token_ids)))
        self._require_in_vocabulary("logit_bias", tuple(sampling.logit_bias))
        self._require_in_vocabulary("allowed_token_ids", sampling.allowed_token_ids)
        self._require_in_vocabulary("stop_token_ids", endings)
        self.is_greedy[row] = sampling.is_greedy
        self.temperature[row] = max(sampling.temperature, _LEAST_TEMPERATURE)
        self.top_k[row] = min(sampling.top_k, self._vocab_size)
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.seed[row] = (sampling.seed or 0) & (2**64 - 1)
        self.choice[row] = new.choice
        self.wants_logprobs[row] = sampling.logprobs is not None
        self.num_top_logprobs[row] = min(sampling.logprobs or 0, self._vocab_size)
        self._num_prompt_tokens[row] = new.num_prompt_tokens
        self._num_output[row] = len(new.token_ids) - new.num_prompt_tokens
        self._min_tokens[row] = sampling.min_tokens if endings else 0
        self._ending_ids.write(row, endings)
        self._has_bias[row] = bool(sampling.logit_bias)
        self._bias_ids.write(row, tuple(sampling.logit_bias))
        self._bias.write(row, tuple(sampling.logit_bias.values()))
        self._has_allowed[row] = bool(sampling.allowed_token_ids)
        self._allowed_ids.write(row, sampling.allowed_token_ids)
        self._start_penalties(row, new)

    def append(
        self, rows: Rows, token_ids: NDArray[np.int64] | torch.Tensor, is_kept: torch.Tensor | None = None
    ) -> None:
        """Sampled tokens and their rows, both [R]; a row that came several times in `may_repeat` may do so here.

        `is_kept` bool [R] on the device: penalties count these tokens only; None: all of them.
        """
        np.add.at(self._num_output, rows, 1)
        penalised = np.flatnonzero(self._has_penalties[rows])
        if self._seen is not None and len(penalised):
            ids = torch.as_tensor(token_ids, dtype=torch.int64, device=self._device)
            index = to_device(penalised, self._device)
            self._seen.append(rows[penalised], ids[index], None if is_kept is None else is_kept[index])

    def remove(self, row: int) -> None:
        """The row is free; nothing of its sequence stays in force."""
        self.is_greedy[row] = True
        self.wants_logprobs[row] = False
        self._has_penalties[row] = False
        self._has_bias[row] = False
        self._has_allowed[row] = False
        self._min_tokens[row] = 0

    def may_repeat(self, rows: Rows) -> bool:
        """Whether each of the rows could be sampled several times in one step, with drafts between.

        Bias and allowed ids edit all logits of a row alike. Penalties depend on each token before, and `min_tokens` on
        how many there are: what these rows keep is right for the next token only.
        """
        return not (self._has_penalties[rows] | self._must_go_on(rows, None)).any()

    def edits(self, rows: Rows, positions: NDArray[np.int64] | None = None) -> bool:
        """Whether `edit` would change anything."""
        flags = (self._has_bias, self._has_allowed, self._has_penalties)
        return any(bool(flag[rows].any()) for flag in flags) or bool(self._must_go_on(rows, positions).any())

    def edit(self, logits: torch.Tensor, rows: Rows, positions: NDArray[np.int64] | None = None) -> None:
        """Apply bias, allowed ids, min_tokens and penalties, in this order and in place; logits float32 [R, V].

        `positions` [R] are those of the tokens to be sampled; None: each row's next, after what was appended.
        """
        for flags, apply in (
            (self._has_bias[rows], self._add_bias),
            (self._has_allowed[rows], self._keep_allowed),
            (self._must_go_on(rows, positions), self._forbid_endings),
            (self._has_penalties[rows], self._penalise),
        ):
            chosen = np.flatnonzero(flags)
            if len(chosen):
                apply(logits, to_device(chosen, self._device), rows[chosen])

    def draws(self, rows: Rows, positions: NDArray[np.int64]) -> Draws:
        """How tokens are chosen once logits are edited, for rows and positions [P]."""
        return Draws(
            is_greedy=self.is_greedy[rows],
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            seed=self.seed[rows],
            choice=self.choice[rows],
            positions=positions,
        )

    def _must_go_on(self, rows: Rows, positions: NDArray[np.int64] | None) -> NDArray[np.bool_]:
        num_output = self._num_output[rows] if positions is None else positions - self._num_prompt_tokens[rows]
        return num_output < self._min_tokens[rows]

    def _add_bias(self, logits: torch.Tensor, index: torch.Tensor, rows: Rows) -> None:
        at = (index[:, None], self._bias_ids.gather(rows))
        logits[at] = logits[at] + self._bias.gather(rows)

    def _keep_allowed(self, logits: torch.Tensor, index: torch.Tensor, rows: Rows) -> None:
        at = (index[:, None], self._allowed_ids.gather(rows))
        kept = logits[at]
        logits[index] = -torch.inf
        logits[at] = kept

    def _forbid_endings(self, logits: torch.Tensor, index: torch.Tensor, rows: Rows) -> None:
        logits[index[:, None], self._ending_ids.gather(rows)] = -torch.inf

    def _penalise(self, logits: torch.Tensor, index: torch.Tensor, rows: Rows) -> None:
        assert self._seen is not None
        columns = (self._repetition[rows], self._presence[rows], self._frequency[rows])
        repetition, presence, frequency = (to_device(c, self._device)[:, None] for c in columns)
        self._seen.penalise(logits, index, rows, repetition, presence, frequency)

    def _start_penalties(self, row: int, new: NewRow) -> None:
        sampling = new.sampling
        self._repetition[row] = sampling.repetition_penalty
        self._presence[row] = sampling.presence_penalty
        self._frequency[row] = sampling.frequency_penalty
        self._has_penalties[row] = sampling.has_penalties
        if self._has_penalties[row]:
            if self._seen is None:
                self._seen = SeenTokens(self._max_num_rows, self._vocab_size, self._device)
            self._seen.start(row, new.token_ids, new.num_prompt_tokens)

    def _require_in_vocabulary(self, name: str, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(f"{name}: {token_id} is outside the vocabulary of {self._vocab_size}")
