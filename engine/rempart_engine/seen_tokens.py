"""Which tokens a sequence has had, kept per row, and the penalties on having them again."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rempart_engine.host_copies import to_device


class RowLists:
    """A list per row in one tensor [rows, width], so that one gather reads those of a whole batch.

    A shorter list goes on with its last entry: whoever scatters by such lists writes the same value once more.
    """

    def __init__(self, max_num_rows: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._entries = torch.zeros((max_num_rows, 0), dtype=dtype, device=device)
        self._lengths = np.zeros(max_num_rows, np.int64)

    def write(self, row: int, entries: Sequence[int] | Sequence[float]) -> None:
        """Replace a row's list."""
        self._lengths[row] = len(entries)
        if not entries:
            return
        self._widen(len(entries))
        values = torch.tensor(entries, dtype=self._entries.dtype)
        self._entries[row, : len(entries)] = to_device(values, self._entries.device)
        self._entries[row, len(entries) :] = entries[-1]

    def append(self, rows: NDArray[np.int64], entries: torch.Tensor) -> None:
        """One more entry [R] for each of the rows; what follows it in a row's tail is some entry of an older list."""
        columns = self._lengths[rows]
        self._widen(int(columns.max()) + 1)
        device = self._entries.device
        self._entries[to_device(rows, device), to_device(columns, device)] = entries
        self._lengths[rows] += 1

    def gather(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Lists of the rows, as wide as the longest of them: [R, width]."""
        width = int(self._lengths[rows].max())
        return self._entries[to_device(rows, self._entries.device), :width]

    def _widen(self, width: int) -> None:
        have = self._entries.shape[1]
        if width <= have:
            return
        more = max(width, 2 * have) - have
        last = self._entries[:, -1:] if have else self._entries.new_zeros((len(self._entries), 1))
        self._entries = torch.cat((self._entries, last.expand(-1, more)), dim=1)


class SeenTokens:
    """Counts of a row's tokens. Penalties touch only the tokens that a sequence has had, not the whole vocabulary."""

    def __init__(self, max_num_rows: int, vocab_size: int, device: torch.device | str) -> None:
        self._in_prompt = torch.zeros((max_num_rows, vocab_size), dtype=torch.bool, device=device)
        self._num_output = torch.zeros((max_num_rows, vocab_size), dtype=torch.int32, device=device)
        # Every token seen, some twice. An entry that was not seen does no harm: its penalty is none.
        self._ids = RowLists(max_num_rows, torch.int64, device)

    def start(self, row: int, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Replace what the row has seen."""
        tokens = np.asarray(token_ids, np.int64)
        outputs, counts = np.unique(tokens[num_prompt_tokens:], return_counts=True)
        device = self._in_prompt.device
        self._in_prompt[row] = False
        self._in_prompt[row, to_device(tokens[:num_prompt_tokens], device)] = True
        self._num_output[row] = 0
        self._num_output[row, to_device(outputs, device)] = to_device(counts.astype(np.int32), device)
        self._ids.write(row, np.unique(tokens).tolist())

    def append(self, rows: NDArray[np.int64], token_ids: torch.Tensor, is_kept: torch.Tensor | None = None) -> None:
        """One output token [R] for each of the rows, as far as it is kept [R]; no row twice."""
        more = 1 if is_kept is None else is_kept.to(torch.int32)
        self._num_output[to_device(rows, token_ids.device), token_ids] += more
        self._ids.append(rows, token_ids)

    def penalise(
        self,
        logits: torch.Tensor,  # [R, V], changed in place
        index: torch.Tensor,  # [P], which of its rows
        rows: NDArray[np.int64],  # [P], whose tokens
        repetition: torch.Tensor,  # [P, 1]
        presence: torch.Tensor,  # [P, 1]
        frequency: torch.Tensor,  # [P, 1]
    ) -> None:
        ids = self._ids.gather(rows)  # [P, W]
        device_rows = to_device(rows, ids.device)[:, None]
        num_output = self._num_output[device_rows, ids]
        is_output = num_output > 0
        at = (index[:, None], ids)
        value = logits[at]
        repeated = torch.where(value > 0, value / repetition, value * repetition)
        value = torch.where(is_output | self._in_prompt[device_rows, ids], repeated, value)
        logits[at] = value - presence * is_output - frequency * num_output
