"""What a runner keeps per row, when the device may know more tokens than the host."""

from dataclasses import fields

import numpy as np
import torch

from rempart_engine.core.scheduler_config import MAX_SPECULATIVE_TOKENS
from rempart_engine.core.step import NewRow, StepPlan
from rempart_engine.gpu.copies import upload
from rempart_engine.host_copies import to_device
from rempart_engine.inputs import IntArray, RowTable, StepArrays, StepInputs


class DeviceRows:
    """Tokens of all rows on the device, where sampled ones are written first; block tables and prompts on the host."""

    def __init__(self, max_num_rows: int, max_model_len: int, device: torch.device) -> None:
        self._host = RowTable(max_num_rows, max_model_len)
        self._device = device
        self.tokens = torch.zeros(
            max_num_rows, max_model_len + MAX_SPECULATIVE_TOKENS, dtype=torch.int64, device=device
        )
        """[rows, positions]: what is written last in each place."""

    def start(self, new: NewRow) -> None:
        """Write a row anew."""
        self._host.start(new)
        tokens = to_device(np.array(new.token_ids, np.int64), self._device)
        self.tokens[new.row, : len(new.token_ids)] = tokens

    def prompt_token_ids(self, row: int, start: int, stop: int) -> IntArray:
        """Tokens [start, stop) of those that the row started with, as far as it had them."""
        return self._host.token_ids(row, start, stop)

    def token_ids_at(self, rows: IntArray, positions: IntArray) -> torch.Tensor:
        """What is written in these places [R]."""
        places = upload({"rows": rows, "positions": positions.astype(np.int64)}, self._device)
        return self.tokens[places["rows"], places["positions"]]

    def write_drafts(self, rows: IntArray, positions: IntArray, token_ids: torch.Tensor) -> None:
        """Sampled tokens or guesses [R]."""
        places = upload({"rows": rows, "positions": positions.astype(np.int64)}, self._device)
        self.tokens[places["rows"], places["positions"]] = token_ids

    def arrays(self, plan: StepPlan) -> StepArrays:
        """Numbers of the plan; new rows must have been started."""
        return self._host.arrays(plan)

    def single_arrays(self, rows: IntArray, positions: IntArray) -> StepArrays:
        """Numbers for one token of each of the rows [R]; all of them are outputs."""
        return self._host.single_arrays(rows, positions)

    def inputs(self, arrays: StepArrays) -> StepInputs:
        """Tensors of a step."""
        return step_inputs(upload(as_mapping(arrays), self._device), self.tokens, arrays.max_context)


def as_mapping(arrays: StepArrays) -> dict[str, IntArray]:
    """The arrays of a step by name."""
    return {field.name: getattr(arrays, field.name) for field in fields(arrays) if field.name != "max_context"}


def step_inputs(uploaded: dict[str, torch.Tensor], tokens: torch.Tensor, max_context: int) -> StepInputs:
    """A step's tensors from those of its arrays and the tokens of all rows."""
    others = {name: tensor for name, tensor in uploaded.items() if name != "rows"}
    token_ids = tokens[uploaded["rows"], uploaded["positions"].long()]
    return StepInputs(token_ids=token_ids, max_context=max_context, **others)
