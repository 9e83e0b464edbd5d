"""Log-probabilities of tokens and of the most likely alternatives, before any sampling parameter."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rempart_engine.candidates import Candidates, at_least, count_thresholds
from rempart_engine.core.step import TokenLogprob

_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities for W of the R rows of a batch."""

    index: NDArray[np.int64]  # [W], which of the R rows
    chosen: torch.Tensor  # [W] float32, of the chosen tokens
    top: Candidates | None  # at least `num_top` alternatives a row, as far as it has them; None when nobody wants any
    num_top: NDArray[np.int64]  # [W]

    def token_logprobs(self, num_rows: int) -> list[tuple[TokenLogprob, ...]]:
        """As values for a step's result, one tuple for each of the R rows, empty for those that want none."""
        result: list[tuple[TokenLogprob, ...]] = [()] * num_rows
        for place, value in zip(self.index.tolist(), self._values(), strict=True):
            result[place] = (value,)
        return result

    def _values(self) -> list[TokenLogprob]:
        chosen = self.chosen.tolist()
        if self.top is None:
            return [TokenLogprob(logprob) for logprob in chosen]
        widest = int(self.num_top.max())
        ids, logprobs = self.top.ids[:, :widest].tolist(), self.top.values[:, :widest].tolist()
        numbers = np.minimum(self.num_top, self.top.counts.cpu().numpy()).tolist()
        return [
            TokenLogprob(logprob, tuple(ids[i][:number]), tuple(logprobs[i][:number]))
            for i, (logprob, number) in enumerate(zip(chosen, numbers, strict=True))
        ]


def row_logprobs(
    index: NDArray[np.int64],  # [W]
    logprobs: torch.Tensor,  # [W, V] float32
    token_ids: torch.Tensor,  # [W] int64
    num_top: NDArray[np.int64],  # [W]
) -> RowLogprobs:
    """Pick from log-probabilities those of the chosen tokens and of the most likely ones."""
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    top = None
    if num_top.any():
        counts = torch.from_numpy(num_top.clip(min=1)).to(logprobs.device)
        top = at_least(logprobs, count_thresholds(logprobs, counts), -torch.inf)
    return RowLogprobs(index, chosen, top, num_top)


def prompt_logprobs(logits: torch.Tensor, next_token_ids: torch.Tensor, num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of the prompt's next tokens [T] under logits [T, V], with `num_top` alternatives each."""
    result: list[TokenLogprob] = []
    for some, ids in zip(torch.split(logits, _ROWS_AT_ONCE), torch.split(next_token_ids, _ROWS_AT_ONCE), strict=True):
        index = np.arange(len(some))
        num_tops = np.full(len(some), min(num_top, some.shape[1]))
        picked = row_logprobs(index, torch.log_softmax(some.float(), dim=1), ids, num_tops)
        result += [value for (value,) in picked.token_logprobs(len(some))]
    return result
