"""What surrounds a model on a GPU: copies, rows, shapes of small steps, graphs, memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rempart_engine.config import EngineConfig
from rempart_engine.core.request import SamplingParams
from rempart_engine.core.step import NewRow, ScheduledRow, StepPlan
from rempart_engine.gpu.buckets import Bucket, bucket_for, buckets, flattened
from rempart_engine.gpu.copies import Download, Layout, upload
from rempart_engine.gpu.graphs import Outputs, capture
from rempart_engine.gpu.loading import trial_plans
from rempart_engine.gpu.memory import MemoryUse, bytes_for_blocks
from rempart_engine.gpu.rows import DeviceRows
from rempart_engine.inputs import StepArrays, StepInputs


def new_row(row: int, token_ids: tuple[int, ...], block_ids: tuple[int, ...]) -> NewRow:
    return NewRow(row, token_ids, len(token_ids), SamplingParams(), 0, block_ids)


def started(device: torch.device) -> tuple[DeviceRows, StepArrays]:
    """Row 2 decodes after 70 tokens, row 0 is at the last two of 5."""
    rows = DeviceRows(4, 300, device)
    rows.start(new_row(2, tuple(range(100, 171)), (7, 3)))
    rows.start(new_row(0, (11, 12, 13, 14, 15), (5,)))
    plan = StepPlan(1, (), (ScheduledRow(2, 70, 1, (), samples=True), ScheduledRow(0, 3, 2, (), samples=True)))
    return rows, rows.arrays(plan)


def test_arrays_of_several_types_travel_in_one_buffer(device: torch.device) -> None:
    arrays = {
        "bytes": np.arange(3, dtype=np.int64),
        "flags": np.array([True, False, True]),
        "numbers": np.linspace(0, 1, 7).astype(np.float32).reshape(7, 1),
        "none": np.zeros((0, 4), np.int32),
        "strided": np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
    }
    uploaded = upload(arrays, device)
    for name, array in arrays.items():
        assert uploaded[name].device.type == device.type
        np.testing.assert_array_equal(uploaded[name].cpu().numpy(), array)
    assert all(start % 16 == 0 for start, _, _ in Layout.of(arrays).places.values())


def test_a_download_brings_what_was_there_when_it_began(device: torch.device) -> None:
    tensor = torch.arange(5, device=device)
    download = Download({"x": tensor.clone()})
    tensor.zero_()
    np.testing.assert_array_equal(download.wait()["x"], np.arange(5))


def test_inputs_hold_tokens_that_only_the_device_knows(device: torch.device) -> None:
    rows, arrays = started(device)
    rows.write_drafts(np.array([2]), np.array([70]), torch.tensor([999], device=device))
    inputs = rows.inputs(arrays)
    assert inputs.token_ids.tolist() == [999, 14, 15]
    assert inputs.positions.tolist() == [70, 3, 4]
    assert inputs.slots.tolist() == [3 * 64 + 6, 5 * 64 + 3, 5 * 64 + 4]
    assert inputs.token_rows.tolist() == [0, 1, 1]
    assert inputs.output_tokens.tolist() == [0, 2]
    assert inputs.max_context == 71


def test_shapes_cover_every_number_of_tokens_and_every_context() -> None:
    shapes = buckets(6, 20_000)
    assert {shape.num_tokens for shape in shapes} == {1, 2, 4, 6}
    assert {shape.max_context for shape in shapes} == {2048, 16_384, 20_000}
    assert buckets(0, 20_000) == ()
    assert {shape.max_context for shape in buckets(4, 512)} == {512}


def test_a_step_takes_the_least_shape_that_holds_it(device: torch.device) -> None:
    _, arrays = started(device)
    shapes = buckets(8, 300)
    assert bucket_for(arrays, shapes) == Bucket(4, 300)
    assert bucket_for(arrays, buckets(2, 300)) is None
    assert bucket_for(arrays, (Bucket(4, 64), Bucket(8, 64))) is None, "71 tokens are seen"


def test_every_token_of_a_flattened_step_is_a_sequence_and_the_rest_store_nothing(device: torch.device) -> None:
    _, arrays = started(device)
    flat = flattened(arrays, Bucket(4, 300))
    assert flat.token_rows.tolist() == [0, 1, 2, 3]
    assert flat.positions.tolist() == [70, 3, 4, 0]
    assert flat.slots.tolist() == [3 * 64 + 6, 5 * 64 + 3, 5 * 64 + 4, -1]
    assert flat.block_tables[:, :2].tolist() == [[7, 3], [5, 0], [5, 0], [0, 0]]
    assert flat.block_tables.shape == (4, 5)
    assert flat.tile_sizes.tolist() == [1, 1, 1, 1]


def test_a_graph_computes_what_the_model_computes(device: torch.device) -> None:
    rows, arrays = started(device)

    def compute(inputs: StepInputs) -> Outputs:
        blocks = inputs.block_tables[inputs.token_rows.long(), inputs.positions.long() // 64]
        hidden = torch.stack((inputs.token_ids, inputs.positions.long(), inputs.slots, blocks.long()), 1).double()
        return hidden, hidden * 2

    graphs = capture(buckets(4, 300), rows.tokens, compute)
    for change in (0, 1):
        rows.write_drafts(np.array([2]), np.array([70]), torch.tensor([999 + change], device=device))
        outputs = graphs.run(arrays)
        assert outputs is not None
        expected, _ = compute(rows.inputs(arrays))
        assert torch.equal(outputs[0], expected)
        assert torch.equal(outputs[1], expected * 2)
    long = StepPlan(2, (), (ScheduledRow(2, 0, 5, (), samples=False),))
    assert graphs.run(rows.arrays(long)) is None, "five tokens fit no shape"


@pytest.mark.parametrize(
    ("fraction", "graphs", "expected"), [(0.9, 0, 90 - 10 - 40 - 5), (0.9, 5, 90 - 10 - 40 - 10), (0.5, 0, 0)]
)
def test_kv_blocks_get_what_all_else_leaves(fraction: float, graphs: int, expected: int) -> None:
    assert bytes_for_blocks(MemoryUse(total=100, others=10, kept=40, step=5), fraction, graphs) == expected


def test_trial_steps_are_the_largest_there_can_be() -> None:
    prompt, decoding = trial_plans(EngineConfig(model=Path("m"), max_num_rows=5, max_step_tokens=128), 1000)
    assert (prompt.num_tokens, decoding.num_tokens) == (128, 5)
    assert prompt.rows[0].start + prompt.rows[0].num_new_tokens == 1000
    assert {block for new in (*prompt.new_rows, *decoding.new_rows) for block in new.block_ids} == {0}
