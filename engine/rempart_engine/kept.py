"""What sampling brought for the places of a step, on the host."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rempart_engine.core.step import TokenLogprob
from rempart_engine.places import Places


class PlaceLogprobs(Protocol):
    """Log-probabilities of those places that asked for them."""

    def token_logprobs(self, num_places: int, /) -> list[tuple[TokenLogprob, ...]]:
        """One tuple for each place, empty for those that want none."""
        ...


SampledRow = tuple[bool, tuple[int, ...], tuple[TokenLogprob, ...]]
"""Whether the row failed, its new tokens, and their log-probabilities."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Tokens for P places of R rows, and which of them go on their sequences."""

    token_ids: NDArray[np.int64]  # [P]
    is_kept: NDArray[np.bool_]  # [P]
    is_bad: NDArray[np.bool_]  # [R]
    logprobs: PlaceLogprobs | None

    def by_row(self, places: Places) -> Iterator[SampledRow]:
        """Row by row, in the order of the plan."""
        ids = self.token_ids.tolist()
        logprobs = self.logprobs.token_logprobs(len(ids)) if self.logprobs else [()] * len(ids)
        firsts = np.flatnonzero(places.is_first).tolist()
        counts = np.bincount(places.row_numbers, self.is_kept, len(firsts)).astype(np.int64).tolist()
        for first, count, is_bad in zip(firsts, counts, self.is_bad.tolist(), strict=True):
            end = first + count
            yield is_bad, tuple(ids[first:end]), tuple(value for entry in logprobs[first:end] for value in entry)
