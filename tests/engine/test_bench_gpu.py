"""The bench of a GPU, but for the GPU: floors by hand, tables and plots of made-up numbers, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench/ is no installed package

from bench import gpu, gpu_work
from bench.dsa_check import WrongAnswerError
from bench.dsa_points import INDEX_BYTES, LATENT_BYTES, V32
from bench.gpu_attention import layer_works
from bench.gpu_caches import expected_attention, fill_pools, new_tokens, random_selection, room, slots_of
from bench.gpu_model import StepTime, decode_seconds, num_outputs, prompt_seconds
from bench.gpu_model_work import STEP_AIM, SliceTimes, decode_works, project
from bench.gpu_plots import can_plot, plot
from bench.gpu_points import (
    DENSE_ONLY,
    FULL,
    NOT_TIMED,
    PROMPTS,
    TINY,
    WITH_EXPERTS,
    WITHOUT_GRAPHS,
    Aim,
    Measured,
    Point,
    decode_name,
    experts_name,
    measured_from,
)
from bench.gpu_report import Run, kernels_table, model_steps, pairs, projections, results_json, text
from bench.gpu_sampling import _draws, check_token
from bench.gpu_timing import measure
from bench.gpu_weights import RandomFolder
from bench.gpu_work import CACHES, Cache, Rates, Work, floor_s

RATES = Rates(3e12, {"bfloat16": 800e12, "fp8": 1600e12})
CPU = torch.device("cpu")


# --- floors ---


def test_a_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    assert floor_s((Work(800e12, 3e12),), RATES) == 1.0
    assert floor_s((Work(1600e12, 3e12),), RATES) == 2.0
    assert floor_s((Work(1600e12, 3e12, "fp8"),), RATES) == 1.0
    assert floor_s((Work(800e12, 6e12),), RATES) == 2.0


def test_parts_follow_one_another() -> None:
    assert floor_s((Work(0.0, 3e12), Work(800e12, 0.0)), RATES) == 2.0


def test_cards_without_fp8_products_multiply_bfloat16() -> None:
    assert floor_s((Work(800e12, 0.0, "fp8"),), Rates(1e12, {"bfloat16": 400e12})) == 2.0


@pytest.mark.parametrize("cache", CACHES)
def test_records_have_the_published_bytes(cache: Cache) -> None:
    assert gpu_work.latent_bytes(V32, cache) == LATENT_BYTES[cache]
    assert gpu_work.index_bytes(V32, cache) == INDEX_BYTES[cache]


def test_decode_works_are_those_of_the_published_shape() -> None:
    attention = gpu_work.attention(V32, 128 * 2048, 128 * 2048, 128, "fp8")
    assert attention.flop == 128 * 2048 * 278_528
    assert attention.num_bytes == 128 * 2048 * 656 + 128 * 128 * 2 * (512 + 64 + 512)
    scores = gpu_work.scores(V32, 64 * 131_072, 64 * 131_072, 64, "fp8")
    assert scores.flop == 64 * 131_072 * 16_384
    assert scores.num_bytes == 64 * 131_072 * (132 + 4) + 64 * 64 * (2 * 128 + 4)
    assert scores.numbers == "fp8"
    assert gpu_work.top_k(64, 131_072, 2048).num_bytes == 64 * 4 * (131_072 + 2048)


def test_weights_are_read_once() -> None:
    assert gpu_work.fp8_linear(1, 7168, 1536).num_bytes == 7168 * 1536 + 56 * 12 * 4 + 2 * (7168 + 1536)
    experts = gpu_work.experts(V32, num_pairs=8, num_tokens=1, num_hit=8)
    assert experts.flop == 8 * 3 * 2 * 7168 * 2048
    assert experts.num_bytes == 8 * 3 * (7168 * 2048 + 56 * 16 * 4) + 7168 * 6


@pytest.mark.parametrize(("context", "num_new"), [(1, 1), (10, 3), (10, 10)])
@pytest.mark.parametrize("top_k", [1, 4, 8, 100])
def test_pairs_are_those_of_causal_attention(context: int, num_new: int, top_k: int) -> None:
    seen = range(context - num_new + 1, context + 1)
    assert gpu_work.causal_pairs(context, num_new) == sum(seen)
    assert gpu_work.seen_pairs(context, num_new, top_k) == sum(min(top_k, count) for count in seen)


def test_experts_that_are_hit() -> None:
    assert gpu_work.expected_hit(256, 8, 1) == pytest.approx(8)
    assert 255 < gpu_work.expected_hit(256, 8, 1000) <= 256


def test_short_contexts_score_nothing() -> None:
    dense, sparse = layer_works(V32, [(2048, 1)] * 4, "fp8")
    assert dense[1:] == sparse[1:]
    assert sparse[0].num_bytes > dense[0].num_bytes  # index keys are stored all the same
    dense, sparse = layer_works(V32, [(131_072, 1)] * 4, "fp8")
    assert len(sparse) == 4
    assert floor_s(dense, RATES) > 4 * floor_s(sparse, RATES)


def test_a_decode_step_reads_the_weights_of_its_layers() -> None:
    """Against sums over the shapes in the checkpoint: 256 experts are 11.3 GB a layer."""
    without, with_experts = (
        sum(work.num_bytes for work in decode_works(part.config(V32), 1000, 4096, "fp8"))
        for part in (DENSE_ONLY, WITH_EXPERTS)
    )
    assert with_experts - without > 2 * 256 * 3 * 7168 * 2048
    one, two = (
        sum(work.num_bytes for work in decode_works(WITH_EXPERTS.config(V32), batch, 4096, "fp8")) for batch in (1, 2)
    )
    assert one < two < 2 * one


# --- aims ---


@pytest.mark.parametrize(
    ("aim", "limit_s"),
    [
        (Aim("100 µs", at_most_s=100e-6), 100e-6),
        (Aim("400 TFLOPS", flop_per_s=400e12), 2.0),
        (Aim("half the bandwidth", of_bandwidth=0.5), 2.0),
        (Aim("twice the floor", times_floor=2.0), 2.0),
    ],
)
def test_aims_are_limits_of_time(aim: Aim, limit_s: float) -> None:
    works = (Work(800e12, 3e12),)
    assert aim.limit_s(works, RATES) == pytest.approx(limit_s)
    found = Measured("group", "name", works, aim, seconds=(0.99 * limit_s,))
    assert found.reaches_aim(RATES) is True
    assert replace(found, seconds=(1.01 * limit_s,)).reaches_aim(RATES) is False
    assert replace(found, aim=None).reaches_aim(RATES) is None


# --- measuring ---


def _point(check: Callable[[object], None], run: Callable[[], object] = lambda: 1) -> Point:
    return Point("group", "name", (Work(1.0, 1.0),), run, check)


def _fine(_: object) -> None:
    pass


def test_what_is_right_but_not_timed_has_no_number() -> None:
    found = measure(_point(_fine), None)
    assert (found.seconds, found.refusal) == ((), NOT_TIMED)


def test_no_number_for_a_wrong_answer() -> None:
    def wrong(_: object) -> None:
        raise WrongAnswerError("differs")

    def never(_work: Callable[[], object], _at_most_s: float) -> tuple[float, ...]:
        raise AssertionError("timed although wrong")

    found = measure(_point(wrong), never)
    assert (found.seconds, found.refusal) == ((), "wrong: differs")


def test_a_kernel_that_fails_hides_no_other() -> None:
    def fail() -> object:
        raise RuntimeError("out of resources\nand so on")

    assert measure(_point(_fine, fail), None).refusal == "RuntimeError: out of resources"


def test_measurements_survive_their_way_through_json() -> None:
    found = Measured("group", "name", (Work(1.0, 2.0, "fp8"),), STEP_AIM, (1.0, 2.0), (3.0,), "because")
    assert measured_from(json.loads(json.dumps(asdict(found)))) == found


# --- what points are made of ---


@pytest.mark.parametrize("cache", CACHES)
def test_pools_and_selections(cache: Cache) -> None:
    pools = fill_pools(TINY.model, cache, room(2, 100), CPU)
    new = new_tokens(pools, [(100, 3), (40, 1)])
    selection = random_selection(new, 32)
    assert selection.counts.tolist() == [32, 32, 32, 32]
    for row, position in zip(selection.positions, new.step.positions, strict=True):
        assert (row.diff() > 0).all()
        assert 0 <= row[0] <= row[-1] <= position
    assert len(slots_of(new.step, 2)) == 100
    assert expected_attention(pools, new, selection, 3).isfinite().all()


def test_selections_of_short_contexts_are_everything() -> None:
    pools = fill_pools(TINY.model, "fp8", 64, CPU)
    assert random_selection(new_tokens(pools, [(30, 2)]), 32).positions.shape == (2, 0)


def test_random_weights_stand_for_a_folder() -> None:
    source = RandomFolder(TINY.slices[0].config(TINY.model), CPU)
    weights = source.weights()
    assert len(weights) == len(list(weights)) > 50
    expert = weights["layers.1.mlp.experts.3.down_proj.weight"]
    assert expert.data.dtype == torch.float8_e4m3fn
    assert expert.shape == (256, 128)
    assert torch.equal(expert.data.float(), weights["layers.1.mlp.experts.3.down_proj.weight"].data.float())
    assert expert.dequantized(torch.float32).std() == pytest.approx(128**-0.5, rel=0.05)
    assert weights["embed_tokens.weight"].data.dtype == torch.bfloat16


def test_tokens_outside_of_their_share_are_refused() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0])
    check_token(1, logits, _draws(1, is_greedy=True), 0)
    with pytest.raises(WrongAnswerError, match="likeliest"):
        check_token(2, logits, _draws(1, is_greedy=True), 0)
    wrong = 0
    for token_id in range(3):
        try:
            check_token(token_id, logits, _draws(1), 0)
        except WrongAnswerError:
            wrong += 1
    assert wrong == 2


def test_steps_of_prompts_and_of_decoding() -> None:
    steps = [
        StepTime(4096, 2, 0.5),
        StepTime(100, 3, 0.2),
        StepTime(2, 2, 9.0),
        StepTime(2, 2, 0.1),
        StepTime(1, 1, 0.1),
    ]
    assert decode_seconds(steps, 2) == (0.1,)
    assert prompt_seconds(steps, 4096) == (0.5,)
    # 128 prompts of 4096 tokens need 132 steps of 4096 beside the tokens of those that decode already.
    assert num_outputs(FULL, 128) == 133 + FULL.decode_steps


# --- projection ---


def test_the_projection_adds_up() -> None:
    times = SliceTimes(64, dense_s=0.003, with_moe_s=0.007, num_moe_layers=2, experts_s=0.0015, eighth_s=0.0005)
    exchange_s = 64 * 8 * 7168 * 3 / 450e9
    found = project(V32, times)
    assert found.step_s == pytest.approx(0.003 + 58 * (0.002 - 0.0015 + 0.0005 + exchange_s))
    assert found.tokens_per_s == pytest.approx(8 * 64 / found.step_s)
    assert "(7.000 ms - 3.000 ms) / 2 = 2.000 ms" in found.arithmetic[0]
    assert f"{found.tokens_per_s:,.0f} tokens/s" in found.arithmetic[-1]


# --- report ---


def _run() -> Run:
    works = (Work(1e9, 3e6),)
    kernel = Measured("top-k", "[64, 128K]", works, Aim("100 µs", at_most_s=100e-6), (2e-6, 3e-6, 9e-6), (30e-6,))
    layers = [
        Measured("dense layer", "decode 128K x 8", works, seconds=(900e-6,)),
        Measured("sparse layer", "decode 128K x 8", works, seconds=(100e-6,)),
        Measured("dense layer", "decode 2K x 8", works, seconds=(100e-6,)),
        Measured("sparse layer", "decode 2K x 8", works, refusal="wrong: differs by 1"),
    ]
    experts = [
        Measured("experts", experts_name(256, 32), works, seconds=(1.5e-3,)),
        Measured("experts", experts_name(32, 32), works, seconds=(0.5e-3,)),
    ]
    slices = ((DENSE_ONLY, 3e-3), (WITH_EXPERTS, 7e-3), (WITHOUT_GRAPHS, 12e-3))
    model = [
        Measured("model", decode_name(part, 32), decode_works(part.config(V32), 32, 4096, "fp8"), seconds=(seconds,))
        for part, seconds in slices
    ]
    model.append(Measured(PROMPTS, "2 layers with experts, graphs, with 32 sequences", (), seconds=(0.1,)))
    uncaptured = Measured("sample", "greedy", works, None, (4e-6,), (4e-6,), "waits for the GPU")
    return Run("NVIDIA H100 80GB HBM3", RATES, (kernel, *layers, *experts, *model, uncaptured))


def _cells(table: str, start: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_kernels_stand_beside_floor_and_aim() -> None:
    cells = _cells(kernels_table(_run()), "top-k")
    assert cells[2:9] == ["3.0", "2.0", "30.0", "1.2", "42%", "FLOP", "333.3"]
    assert cells[-3:] == ["100 µs", "100.0", "yes"]
    assert _cells(kernels_table(_run()), "sample")[4] == "4.0*"


def test_ratios_need_both_numbers() -> None:
    (pair,) = pairs(_run())
    assert pair.name == "decode 128K x 8"
    assert pair.ratio == pytest.approx(9.0)


def test_steps_and_projections_need_all_their_numbers() -> None:
    run = _run()
    (steps,) = model_steps(run)
    assert (steps.batch, steps.with_graphs_s, steps.without_graphs_s) == (32, 7e-3, 12e-3)
    ((batch, projection),) = projections(run)
    assert batch == 32
    assert projection.step_s == pytest.approx(0.003 + 58 * (0.002 - 0.001 + 32 * 8 * 7168 * 3 / 450e9))
    without_eighth = replace(run, measured=tuple(one for one in run.measured if one.name != experts_name(32, 32)))
    assert list(projections(without_eighth)) == []


def test_prompts_are_in_the_report() -> None:
    cells = _cells(text(_run()), "2 layers with experts, graphs, with 32 sequences")
    assert cells[1:] == ["100.000", f"{FULL.num_queries / 0.1:,.0f}"]


def test_what_was_refused_is_named_and_has_no_number() -> None:
    whole = text(_run())
    before, after = whole.split("No number:")
    assert "sparse layer, decode 2K x 8: wrong: differs by 1" in after
    assert "| sparse layer | decode 2K" not in before
    content = results_json(_run(), {"torch": "2"})
    assert content["refused"] == [{"group": "sparse layer", "name": "decode 2K x 8", "refusal": "wrong: differs by 1"}]
    json.dumps(content)


def test_a_run_without_numbers_is_a_report_too() -> None:
    empty = Run("card", RATES, (Measured("index", "what would follow", (), refusal="ended after 70 s"),))
    assert "index, what would follow: ended after 70 s" in text(empty)
    assert results_json(empty, {})["measured"] == []


def test_plots_are_written_of_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert can_plot()
    written = plot(_run(), tmp_path / "2026-01-01-gpu-card")
    assert [path.name for path in written] == [
        f"2026-01-01-gpu-card-{what}.png" for what in ("floors", "sparse", "steps")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert plot(Run("card", RATES, ()), tmp_path / "empty") == []


def test_names_of_files() -> None:
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert gpu.slug("NVIDIA A100-SXM4-40GB") == "a100-sxm4-40gb"


# --- processes ---


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def write(source: str) -> None:
        (tmp_path / "worker.py").write_text(source)
        monkeypatch.setattr(gpu, "_WORKER", tmp_path / "worker.py")

    return write


def _line(name: str) -> str:
    return json.dumps({"measured": asdict(Measured("group", name, (Work(1.0, 1.0),), seconds=(1.0,)))})


def test_groups_that_crash_or_hang_leave_what_they_found(worker: Callable[[str], None]) -> None:
    worker(f"print('{_line('first')}', flush=True); raise SystemExit('CUDA error: an illegal access')")
    first, rest = gpu.measure_all((gpu.Group("small", 60.0),), 60.0, is_dry=False)
    assert (first.name, first.seconds) == ("first", (1.0,))
    assert rest.refusal == "ended with 1: CUDA error: an illegal access"
    worker(f"import time; print('{_line('first')}', flush=True); time.sleep(1000)")
    first, rest = gpu.measure_all((gpu.Group("small", 4.0),), 60.0, is_dry=False)  # Python starts in less
    assert first.name == "first"
    assert rest.refusal == "ended after 4 s"


def test_lines_that_are_cut_or_of_others_are_left_out(worker: Callable[[str], None]) -> None:
    worker(f"print('a library warns'); print('{_line('first')}'); print('{_line('second')}'[:40], end='')")
    (found,) = gpu.measure_all((gpu.Group("small", 60.0),), 60.0, is_dry=False)
    assert found.name == "first"


def test_groups_without_time_are_named(worker: Callable[[str], None]) -> None:
    worker("")
    assert list(gpu.measure_all((gpu.Group("small", 60.0),), 60.0, is_dry=False)) == []
    (found,) = gpu.measure_all((gpu.Group("small", 60.0),), 0.0, is_dry=False)
    assert found.refusal == "no time was left"


def test_the_whole_run_ends_within_nine_minutes() -> None:
    assert gpu._MOST_S <= 540


def test_a_run_writes_json_and_plots(
    worker: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = json.dumps({"card": "NVIDIA H100 80GB HBM3", "rates": asdict(RATES)})
    worker(f"import sys; print('{limits}' if 'limits' in sys.argv else '{_line('first')}')")
    assert gpu.run((gpu.Group("small", 60.0),), tmp_path / "out") == 0
    (file,) = (tmp_path / "out").glob("*-gpu-h100-80gb-hbm3.json")
    assert [one["name"] for one in json.loads(file.read_text())["measured"]] == ["first"]
    assert "NVIDIA H100 80GB HBM3: memory 3.00 TB/s" in capsys.readouterr().out


def test_the_command_line_refuses_unknown_groups() -> None:
    command = [sys.executable, gpu.__file__, "--groups", "nonsense"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "invalid choice: 'nonsense'" in refused.stderr
