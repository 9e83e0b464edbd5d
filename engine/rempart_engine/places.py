"""Where a step samples: after the last token of a row, and after each draft that follows it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rempart_engine.core.step import ScheduledRow


@dataclass(frozen=True, slots=True)
class Places:
    """Places of R sampling rows, in the order of the plan: one each, and one more for each draft; P altogether."""

    rows: NDArray[np.int64]  # [P], the runner's row
    row_numbers: NDArray[np.int64]  # [P], which of the R rows, ascending
    positions: NDArray[np.int64]  # [P], of the token to be sampled, in its sequence
    is_first: NDArray[np.bool_]  # [P], of its row
    is_last: NDArray[np.bool_]  # [P], of its row

    @property
    def is_only(self) -> NDArray[np.bool_]:  # [P]
        """The row has no drafts."""
        return self.is_first & self.is_last

    @property
    def has_drafts(self) -> bool:
        return not self.is_last.all()


def sampling_places(scheduled_rows: Sequence[ScheduledRow]) -> Places:
    """The places of a plan's rows."""
    table = [
        (scheduled.row, scheduled.start + scheduled.num_new_tokens, scheduled.num_draft_tokens)
        for scheduled in scheduled_rows
        if scheduled.samples
    ]
    rows, ends, num_drafts = np.array(table, np.int64).reshape(-1, 3).T
    counts = num_drafts + 1
    row_numbers = np.repeat(np.arange(len(rows)), counts)
    place_ends = counts.cumsum()
    numbers = np.arange(len(row_numbers)) - (place_ends - counts)[row_numbers]  # of a place in its row
    return Places(
        rows=rows[row_numbers],
        row_numbers=row_numbers,
        positions=(ends - num_drafts)[row_numbers] + numbers,
        is_first=numbers == 0,
        is_last=numbers == num_drafts[row_numbers],
    )
