"""The benches' arithmetic: what they say about speed must be right before the speed is."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench/ is no installed package

from bench.points import Comparison, Limits, ModelSize, Point, bound, compare, prompts
from bench.report import percentile, table, this_machine

DECODE, PREFILL = Point(8, 128, 64), Point(1, 1024, 1)
SIZE = ModelSize(
    num_layer_parameters=1_000_000,
    num_head_parameters=200_000,
    num_layers=2,
    attention_width=64,
    bytes_per_parameter=2.0,
)


def test_a_point_counts_output_tokens_and_in_prefill_prompt_tokens() -> None:
    assert DECODE.num_counted_tokens == 8 * 64
    assert PREFILL.num_counted_tokens == 1024


def test_prompts_differ_and_stay_in_the_vocabulary_past_the_special_tokens() -> None:
    found = prompts(Point(32, 128, 64), vocab_size=1000)
    assert {len(prompt) for prompt in found} == {128}
    assert len({tuple(prompt) for prompt in found}) == 32
    assert all(100 <= token_id < 1000 for prompt in found for token_id in prompt)


def test_decode_of_few_is_bound_by_reading_the_weights() -> None:
    limits = Limits(stream_bytes_per_s=2.4e6, gemm_flop_per_s=1e18)  # all weights once a second
    assert bound(Point(1, 128, 64), SIZE, limits) == pytest.approx(1.0)
    assert bound(Point(8, 128, 64), SIZE, limits) == pytest.approx(8.0)


def test_prefill_is_bound_by_arithmetic() -> None:
    limits = Limits(stream_bytes_per_s=1e18, gemm_flop_per_s=1e9)
    flop = 2 * 1_000_000 * 1024 + 2 * 200_000 + 4 * 2 * 64 * 1024**2 / 2
    assert bound(PREFILL, SIZE, limits) == pytest.approx(1024 / (flop / 1e9))


def test_the_ratio_is_taken_within_rounds_against_the_fastest_of_each() -> None:
    rates = {"ours": [10.0, 30.0, 20.0], "slow": [5.0, 10.0, 5.0], "mostly fast": [4.0, 15.0, 20.0]}
    assert compare("ours", rates) == Comparison("mostly fast", 2.0)
    assert compare("ours", {"ours": [1.0]}) is None


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (0, 50, 99, 100)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 99) == 7.0


def test_a_table_lines_up() -> None:
    assert table(["what", "rate"], [["a", "1,000"], ["longer", "2"]]).splitlines() == [
        "| what   |  rate |",
        "|--------|------:|",
        "| a      | 1,000 |",
        "| longer |     2 |",
    ]


def test_the_machine_is_named_with_the_features_that_matter(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx512_bf16 avx2\n\n"
        "processor\t: 1\nmodel name\t: Other\n"
    )
    machine = this_machine(cpuinfo)
    assert (machine.cpu, machine.features) == ("Some CPU", ("avx2", "avx512_bf16"))
