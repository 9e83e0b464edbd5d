"""A DeepSeek model computed step by step as told, without scheduler and sampler: for tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rempart_engine.config import BLOCK_SIZE, DeviceName
from rempart_engine.core.request import SamplingParams
from rempart_engine.core.step import NewRow, ScheduledRow, StepPlan
from rempart_engine.gpu.rows import DeviceRows
from rempart_engine.inputs import RowTable, StepInputs
from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.kv_storage import KVStorage
from rempart_engine.model.deepseek.indexer import Indexer
from rempart_engine.model.deepseek.kv_pools import CacheDtype, kv_pools
from rempart_engine.model.deepseek.loading import load_deepseek
from rempart_engine.model.deepseek.model import Deepseek
from rempart_engine.model.precision import precision_named
from rempart_engine.model.weights.deepseek_folder import DeepseekFolder
from rempart_engine.placement import placement_named

Chosen = dict[int, list[torch.Tensor]]
"""By row, of each indexer: which positions [S, S] bool each position's attention sees."""


class Stepper:
    """A model with its KV storage, and sequences in rows that advance by as many tokens as they are told to."""

    def __init__(
        self,
        folder: Path,
        *,
        precision: str = "float32",
        cache_dtype: CacheDtype | None = None,
        num_rows: int = 4,
        max_model_len: int = 1024,
        device: DeviceName = "cpu",
    ) -> None:
        """
        Args:
            precision: a name as in `EngineConfig.dtype`.
            cache_dtype: of the pools; by default the precision's.
            max_model_len: of each row; the pools have room for so many tokens in all rows.
        """
        source, placement = DeepseekFolder(folder), placement_named(device)
        numbers = precision_named(precision, placement)
        self.model: Deepseek = load_deepseek(source, numbers, max_model_len, lambda fraction: None)
        self._blocks_per_row = -(-max_model_len // BLOCK_SIZE)
        pools = kv_pools(source.config, int(self.model.mtp is not None), cache_dtype or numbers.dtype)
        self.storage = KVStorage(pools, num_rows * self._blocks_per_row, placement.device)
        self.hidden = torch.empty(0)
        """[T, W] of the last step."""
        self.chosen: Chosen = {}
        """Since the rows were started."""
        self._rows: RowTable | DeviceRows
        if placement.uses_triton:
            self._rows = DeviceRows(num_rows, max_model_len, placement.device)
        else:
            self._rows = RowTable(num_rows, max_model_len)
        self._ends: dict[int, int] = {}
        self._numbers: list[int] = []
        self._indexers = [module for module in self.model.layers.modules() if isinstance(module, Indexer)]
        for indexer in self._indexers:
            indexer.register_forward_hook(self._note_chosen)

    def start(self, row: int, token_ids: Sequence[int], shared: int = 0, of_row: int = 0) -> None:
        """Give a row a sequence. Its first `shared` blocks are those of another row, which have been computed."""
        own, other = self.block_ids(row), self.block_ids(of_row)
        block_ids = (*other[:shared], *own[shared:])
        self._rows.start(NewRow(row, tuple(token_ids), len(token_ids), SamplingParams(), 0, block_ids))
        self._ends[row] = shared * BLOCK_SIZE
        length = len(token_ids)
        self.chosen[row] = [torch.zeros(length, length, dtype=torch.bool) for _ in self._indexers]

    def block_ids(self, row: int) -> tuple[int, ...]:
        """KV blocks that are a row's own; neighbours are far apart in the sequence."""
        return tuple(range(row * self._blocks_per_row, (row + 1) * self._blocks_per_row))[::-1]

    @torch.inference_mode()
    def step(self, counts: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Compute so many more tokens of these rows, together: by row, logits [n, V] of all of them."""
        inputs = self.inputs(counts)
        self.hidden = self.model(inputs, self.storage)
        for row, count in counts.items():
            self._ends[row] += count
        logits = torch.split(self.model.logits(self.hidden).cpu(), list(counts.values()))
        return dict(zip(counts, logits, strict=True))

    def inputs(self, counts: Mapping[int, int]) -> StepInputs:
        """Tensors of the step that computes so many more tokens of these rows."""
        rows = tuple(ScheduledRow(row, self._ends[row], count, (), samples=False) for row, count in counts.items())
        self._numbers = list(counts)
        return self._rows.inputs(self._rows.arrays(StepPlan(0, (), rows)))

    def run(self, row: int, token_ids: Sequence[int], pieces: Sequence[int]) -> torch.Tensor:
        """Logits [T, V] of a sequence by itself, computed in pieces."""
        assert sum(pieces) == len(token_ids), "pieces cover the sequence"
        self.start(row, token_ids)
        return torch.cat([self.step({row: count})[row] for count in pieces])

    def _note_chosen(self, indexer: Indexer, args: tuple[object, ...], selection: Selection) -> None:
        number = next(number for number, other in enumerate(self._indexers) if other is indexer)
        step = next(arg for arg in args if isinstance(arg, StepInputs))
        places = zip(step.token_rows.tolist(), step.positions.tolist(), selection.counts.tolist(), strict=True)
        for token, (sequence, position, count) in enumerate(places):
            chosen = slice(count) if count > position else selection.positions[token, :count].long().cpu()
            self.chosen[self._numbers[sequence]][number][position, chosen] = True
