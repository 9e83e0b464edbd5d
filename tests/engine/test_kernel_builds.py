"""What is refused of compiled kernels, and whether the compiler's texts are read right."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rempart_engine.kernels.builds import Build
from rempart_engine.kernels.compile import NoBuildsError, Wanted, builds_of, ends_of, operations
from rempart_engine.kernels.compile_checks import Row, problems, reasons, row_json, table
from rempart_engine.kernels.compile_one import (
    ArgumentsError,
    Compiled,
    Failed,
    alignment_of,
    compile_one,
    signature_of,
)
from rempart_engine.kernels.ptx import UnknownLogError, Usage, read_log, tensor_instructions
from rempart_engine.kernels.target import A100, B200, H100, Target

GOOD = Compiled(Usage(128, 0, ""), 65_536, 0, ("wgmma bf16",), 1.0)


def build(**changes: Any) -> Build:
    kernel = SimpleNamespace(arg_names=["x_ptr", "num_rows", "WIDTH"])
    made = Build("decode", kernel, {"x_ptr": "*bf16", "num_rows": "i32"}, {"WIDTH": 64}, num_warps=4, num_stages=2)
    return replace(made, **changes)


def row(result: Compiled | Failed = GOOD, target: Target = H100, **changes: Any) -> Row:
    return Row("attention", build(**changes), target, result)


@pytest.mark.parametrize("target", [A100, H100, B200])
def test_small_products_may_use_any_instruction(target: Target) -> None:
    for instructions in ((), ("mma.sync bf16",)):
        assert list(problems(row(replace(GOOD, instructions=instructions), target))) == []


@pytest.mark.parametrize(("target", "best"), [(A100, "mma.sync"), (H100, "wgmma"), (B200, "tcgen05")])
def test_large_products_use_the_best_instruction_or_say_why_not(target: Target, best: str) -> None:
    for name in ("mma.sync", "wgmma", "tcgen05"):
        found = replace(GOOD, instructions=(f"{name} bf16",))
        silent = list(problems(row(found, target, has_large_dot=True)))
        explained = list(problems(row(found, target, has_large_dot=True, slow_path_reason="few heads")))
        if name == best:
            assert silent == []
            assert explained == [
                f"attention, decode, sm_{target.capability}: has a slow_path_reason but is on no slow path"
            ]
        else:
            assert silent == [
                f"attention, decode, sm_{target.capability}: its large product uses {name} bf16, not {best}, "
                "without a slow_path_reason"
            ]
            assert explained == []


def test_a_large_product_without_tensor_cores_is_refused() -> None:
    (found,) = problems(row(replace(GOOD, instructions=()), has_large_dot=True))
    assert "uses no tensor core, not wgmma" in found


def test_products_that_wait_for_one_another_are_slow() -> None:
    waiting = replace(GOOD, usage=Usage(255, 0, "insufficient register resources"))
    (found,) = problems(row(waiting, has_large_dot=True))
    assert "wait for one another: insufficient register resources, without a slow_path_reason" in found
    assert list(problems(row(waiting, has_large_dot=True, slow_path_reason="one product only"))) == []


def test_spills_need_a_reason_and_reasons_need_spills() -> None:
    spilling = replace(GOOD, usage=Usage(255, 24, ""))
    assert list(problems(row(spilling))) == ["attention, decode, sm_90: spills 24 bytes without a spill_reason"]
    assert list(problems(row(spilling, spill_reason="once, before the loop"))) == []
    assert list(problems(row(spill_reason="once, before the loop"))) == [
        "attention, decode, sm_90: has a spill_reason but does not spill"
    ]


@pytest.mark.parametrize("target", [A100, H100, B200])
def test_memory_of_one_program_is_bounded_by_the_target(target: Target) -> None:
    at_the_limit = replace(GOOD, shared_bytes=target.shared_bytes, tensor_columns=512)
    assert list(problems(row(at_the_limit, target))) == []
    (found,) = problems(row(replace(GOOD, shared_bytes=target.shared_bytes + 1), target))
    assert "of shared memory" in found
    (found,) = problems(row(replace(GOOD, tensor_columns=544), target))
    assert "544 columns of tensor memory" in found


def test_everything_wrong_is_named_at_once() -> None:
    awful = Compiled(Usage(255, 8, ""), 300_000, 0, (), 1.0)
    assert len(list(problems(row(awful, has_large_dot=True)))) == 3


def test_what_does_not_compile_is_refused_and_shown() -> None:
    failed = row(Failed("CompilationError: at 3:4"))
    assert list(problems(failed)) == ["attention, decode, sm_90: does not compile: CompilationError: at 3:4"]
    assert "does not compile" in table([failed])
    assert row_json(failed)["reason"] == "CompilationError: at 3:4"


def test_the_table_has_a_line_for_each_build() -> None:
    lines = table([row(), row(replace(GOOD, instructions=()), A100)]).splitlines()
    assert lines[0].split()[:4] == ["kernel", "build", "arch", "registers"]
    assert lines[1].split() == ["attention", "decode", "sm_90", "128", "65,536", "0", "wgmma", "bf16", "1.0"]
    assert lines[2].split() == ["attention", "decode", "sm_80", "128", "65,536", "0", "-", "1.0"]


def test_reasons_are_listed() -> None:
    explained = row(spill_reason="a", slow_path_reason="b")
    assert reasons([row(), explained]) == ["attention, decode, sm_90: a", "attention, decode, sm_90: b"]


def test_rows_for_programs_tell_what_is_refused() -> None:
    found = row_json(row(replace(GOOD, usage=Usage(255, 24, ""))))
    assert found["usage"] == {"registers": 255, "spill_bytes": 24, "serialized_wgmma": ""}
    assert found["problems"] == ["attention, decode, sm_90: spills 24 bytes without a spill_reason"]


@pytest.mark.parametrize(
    ("ptx", "expected"),
    [
        ("\twgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%r1}, %rd1;", ("wgmma bf16",)),
        ("@%p1 wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {%r1}, 1;", ("wgmma e4m3",)),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1};", ("mma.sync bf16",)),
        ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1};", ("mma.sync s8",)),
        ("@%p3 tcgen05.mma.cta_group::1.kind::f8f6f4 [%r1], %rd2;", ("tcgen05 f8f6f4",)),
        ("// wgmma.mma_async is not used\n\twgmma.fence.sync.aligned;\n\tfma.rn.f32 %r1;", ()),
        (
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1};\n"
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1};\n"
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1};",
            ("mma.sync bf16", "mma.sync tf32"),
        ),
    ],
)
def test_instructions_are_found_in_ptx(ptx: str, expected: tuple[str, ...]) -> None:
    assert tensor_instructions(ptx) == expected


def test_the_log_of_ptxas_is_read() -> None:
    log = """ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
insufficient register resources for the wgmma pipeline in the function 'mm' in line 999
ptxas info    : Compiling entry function 'mm' for 'sm_90a'
ptxas info    : Function properties for mm
    1032 bytes stack frame, 2328 bytes spill stores, 1816 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1032 bytes cumulative stack size
"""
    assert read_log(log) == Usage(255, 2328 + 1816, "insufficient register resources for the wgmma pipeline")
    with pytest.raises(UnknownLogError):
        read_log("")


def test_each_argument_is_named_once() -> None:
    assert signature_of(build()) == {"x_ptr": "*bf16", "num_rows": "i32", "WIDTH": "constexpr"}
    wrong: tuple[Mapping[str, Any], ...] = (
        {"constants": {}},
        {"constants": {"WIDTH": 64, "x_ptr": 0}},
        {"constants": {"WIDTH": 64, "HEIGHT": 64}},
    )
    for changes in wrong:
        with pytest.raises(ArgumentsError, match="the kernel has x_ptr, num_rows, WIDTH"):
            signature_of(build(**changes))


def test_pointers_are_aligned_unless_the_build_says_otherwise() -> None:
    by_16 = [["tt.divisibility", 16]]
    assert alignment_of(build()) == {(0,): by_16}
    assert alignment_of(build(aligned=frozenset({"x_ptr", "num_rows"}))) == {(0,): by_16, (1,): by_16}
    assert alignment_of(build(aligned=frozenset())) == {}
    with pytest.raises(ArgumentsError, match="WIDTH"):
        alignment_of(build(aligned=frozenset({"WIDTH"})))


def test_kernels_are_found_by_their_folders(tmp_path: Path) -> None:
    for name in ("second/kernel.py", "first/kernel.py", "first/cpu.py", "third/cpu.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert operations(tmp_path) == ["first", "second"]


@pytest.mark.parametrize(
    ("builds", "message"),
    [(None, "no builds"), ([], "no builds"), ([build(), build()], "several builds are called decode")],
)
def test_a_module_without_builds_is_refused(
    builds: list[Build] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace() if builds is None else SimpleNamespace(builds=lambda target: iter(builds))
    monkeypatch.setattr("rempart_engine.kernels.compile.importlib.import_module", lambda name: module)
    with pytest.raises(NoBuildsError, match=message):
        builds_of("attention", H100)


def test_the_ends_of_builds_are_of_each_kernel_each_type_and_each_target() -> None:
    kernels = [SimpleNamespace(arg_names=["x_ptr"]) for _ in range(2)]
    wanted = [
        Wanted("attention", build(name=f"{kind} {size}", kernel=kernels[number], arguments={"x_ptr": kind}), target, 0)
        for number in range(2)
        for target in (A100, H100)
        for size in (16, 32, 64, 128)
        for kind in ("*bf16", "*u8")
    ]
    kept = ends_of(wanted)
    assert kept == [one for one in wanted if one.build.name.endswith((" 16", " 128"))]
    assert len({(id(one.build.kernel), one.build.name, one.target) for one in kept}) == 2 * 2 * 2 * 2
    assert ends_of(wanted[:1]) == wanted[:1]
    assert ends_of([]) == []


KERNELS = """
import triton
import triton.language as tl
from rempart_engine.kernels.builds import Build

@triton.jit
def product(a_ptr, b_ptr, c_ptr, width, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, width, K):
        a = tl.load(a_ptr + m[:, None] * width + (start + k)[None, :])
        b = tl.load(b_ptr + n[None, :] * width + (start + k)[:, None])
        sums = tl.dot(a, b, sums)
    tl.store(c_ptr + m[:, None] * N + n[None, :], sums)

def builds(target):
    types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "width": "i32"}
    for m, n in ((64, 64), (128, 256)):
        constants = {"M": m, "N": n, "K": 64}
        yield Build(f"{m} x {n}", product, types, constants, 4, 2, has_large_dot=True, aligned=frozenset(types))
    yield Build("incomplete", product, types, {}, num_warps=4, num_stages=2)
"""


def test_the_compiler_tells_good_from_spilling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a made-up kernel whose larger tile needs all registers of a thread for its sums alone."""
    pytest.importorskip("triton")
    (tmp_path / "made_up_kernels.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    small, large, incomplete = (compile_one("made_up_kernels", index, H100) for index in range(3))
    assert isinstance(small, Compiled)
    assert isinstance(large, Compiled)
    assert list(problems(row(small, has_large_dot=True))) == []
    assert small.instructions == ("wgmma bf16",)
    assert small.shared_bytes >= 2 * (64 + 64) * 64 * 2  # two stages of both tiles
    spilled, waiting = problems(row(large, has_large_dot=True))
    assert "without a spill_reason" in spilled
    assert "wait for one another" in waiting
    assert isinstance(incomplete, Failed)
    assert "the build names" in incomplete.reason
