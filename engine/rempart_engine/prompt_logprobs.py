"""Log-probabilities of prompts, for the rows that asked for them."""

from collections.abc import Callable

import numpy as np
import torch

from rempart_engine.core.step import NewRow, StepPlan, TokenLogprob
from rempart_engine.host_copies import to_device
from rempart_engine.inputs import IntArray
from rempart_engine.logprobs import prompt_logprobs
from rempart_engine.results import first_outputs


class PromptLogprobs:
    """Which rows want how many alternatives."""

    def __init__(self, token_ids: Callable[[int, int, int], IntArray]) -> None:
        """`token_ids(row, start, stop)` are prompt tokens of a row, as far as it has them."""
        self._token_ids = token_ids
        self._num_top: dict[int, int] = {}

    def start(self, new: NewRow) -> None:
        """A sequence takes a row."""
        if new.sampling.prompt_logprobs is not None:
            self._num_top[new.row] = new.sampling.prompt_logprobs

    def forget(self, row: int) -> None:
        """The row is free."""
        self._num_top.pop(row, None)

    def of_step(self, plan: StepPlan, logits: torch.Tensor) -> dict[int, tuple[TokenLogprob, ...]]:
        """By row, of the prompt tokens that follow this step's new tokens; logits [O, V]. Waits for a GPU."""
        if not self._num_top:
            return {}
        result: dict[int, tuple[TokenLogprob, ...]] = {}
        for row, first in zip(plan.rows, first_outputs(plan.rows), strict=True):
            if row.wants_prompt_logprobs:
                following = self._token_ids(row.row, row.start + 1, row.start + row.num_new_tokens + 1)
                ids = to_device(np.ascontiguousarray(following), logits.device)
                wanted = logits[first : first + len(following)]
                result[row.row] = tuple(prompt_logprobs(wanted, ids, self._num_top[row.row]))
        return result
