"""From a folder to a model: nothing left out, nothing held twice."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rempart_engine.core.request import SamplingParams
from rempart_engine.core.step import NewRow, ScheduledRow, StepPlan
from rempart_engine.inputs import RowTable
from rempart_engine.kernels.fp8_linear import Fp8Linear
from rempart_engine.kernels.int8_linear import Int8Linear
from rempart_engine.kernels.packed_linear import PackedLinear
from rempart_engine.kv_storage import KVStorage
from rempart_engine.model.deepseek.config import DeepseekConfig, Fp8Blocks
from rempart_engine.model.deepseek.kv_pools import kv_pools
from rempart_engine.model.deepseek.loading import load_deepseek
from rempart_engine.model.deepseek.names import expected_tensors
from rempart_engine.model.deepseek.testing import TINY, TINY_GLM, oracle, write_checkpoint
from rempart_engine.model.errors import ModelError
from rempart_engine.model.precision import precision_named
from rempart_engine.model.weights.deepseek_folder import DeepseekFolder


def numbers_of(config: DeepseekConfig) -> int:
    return sum(torch.Size(spec.shape).numel() for spec in expected_tensors(config).values())


@pytest.mark.parametrize("config", [TINY, TINY_GLM, replace(TINY, num_mtp_layers=0)], ids=["deepseek", "glm", "no-mtp"])
@pytest.mark.parametrize("load_mtp", [True, False])
def test_every_weight_is_read_and_progress_ends_at_the_whole(
    tmp_path: Path, config: DeepseekConfig, load_mtp: bool
) -> None:
    write_checkpoint(tmp_path, config, num_shards=3)
    told: list[float] = []
    model = load_deepseek(DeepseekFolder(tmp_path), precision_named("float32"), 64, told.append, load_mtp=load_mtp)
    assert told[-1] == 1.0
    assert told == sorted(told)
    has_mtp = load_mtp and config.num_mtp_layers == 1
    assert (model.mtp is not None) is has_mtp
    specs = expected_tensors(config)
    assert len(set(told)) == sum(1 for name in specs if has_mtp or not name.startswith("layers.3."))
    assert len(model.layers) == config.num_layers


@pytest.mark.parametrize(
    ("precision", "keep_fp8", "kind"),
    [
        ("float32", False, PackedLinear),
        ("bfloat16", False, PackedLinear),
        ("int8", False, Int8Linear),
        ("bfloat16", True, Fp8Linear),
    ],
)
def test_projections_are_held_as_asked_for(
    tmp_path: Path, precision: str, keep_fp8: bool, kind: type[nn.Module]
) -> None:
    write_checkpoint(tmp_path, TINY)
    source = DeepseekFolder(tmp_path)
    numbers = replace(precision_named(precision), keeps_fp8=keep_fp8)
    model = load_deepseek(source, numbers, 64, lambda fraction: None)
    kinds = {name: module for name, module in model.named_modules() if not list(module.children())}
    for name in (
        "layers.0.attention.q_a",
        "layers.0.mlp.down",
        "layers.2.mlp.experts.each.5.up",
        "layers.2.mlp.shared.gate",
    ):
        assert isinstance(kinds[name], kind), name
    assert isinstance(kinds["layers.2.mlp.router.gate"], PackedLinear)


@pytest.mark.parametrize("config", [TINY, TINY_GLM], ids=["deepseek", "glm"])
@pytest.mark.parametrize("keep_fp8", [False, True])
def test_what_is_loaded_computes_the_numbers_of_the_checkpoint(
    tmp_path: Path, config: DeepseekConfig, keep_fp8: bool
) -> None:
    write_checkpoint(tmp_path, config, num_shards=3)
    source, precision = DeepseekFolder(tmp_path), replace(precision_named("float32"), keeps_fp8=keep_fp8)
    model = load_deepseek(source, precision, 64, lambda fraction: None)
    token_ids = [(7 * position + 3) % config.vocab_size for position in range(50)]
    rows = RowTable(1, 64)
    rows.start(NewRow(0, tuple(token_ids), len(token_ids), SamplingParams(), 0, (0,)))
    plan = StepPlan(0, (), (ScheduledRow(0, 0, len(token_ids), (), samples=True),))
    step = rows.inputs(rows.arrays(plan))
    with torch.inference_mode():
        hidden = model(step, KVStorage(kv_pools(config, 0, torch.float32), 1))
        expected = oracle(tmp_path)(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(model.logits(hidden), expected, atol=1e-4, rtol=0)


def test_a_bad_scale_ends_the_load_with_its_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_checkpoint(tmp_path, TINY)
    name = "model.layers.2.mlp.experts.4.down_proj.weight_scale_inv"
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())["weight_map"]
    file = tmp_path / weight_map[name]
    tensors = load_file(file)
    tensors[name][0, 0] = -1.0
    save_file(tensors, file)
    with pytest.raises(ModelError, match=rf"{file.name}: tensor {name} must hold positive numbers, got -1"):
        load_deepseek(DeepseekFolder(tmp_path), precision_named("float32"), 64, lambda fraction: None)


BIG = replace(
    TINY,
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1024,
    num_heads=8,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    moe=replace(TINY.moe, intermediate_size=4096),
    indexer=replace(TINY.indexer, head_dim=64),
    fp8=Fp8Blocks(128, 128),
)
"""About 125 MB in fp8, its experts' weights of 2 MiB each and equal, as in the real model."""

LOAD = """
import json, sys
from dataclasses import replace
from pathlib import Path
import psutil, torch
from rempart_engine.model.deepseek.loading import load_deepseek
from rempart_engine.model.precision import precision_named
from rempart_engine.model.weights.deepseek_folder import DeepseekFolder

def load(folder):
    source, precision = DeepseekFolder(Path(folder)), precision_named(sys.argv[3])
    return load_deepseek(source, replace(precision, keeps_fp8=sys.argv[4] == "fp8"), 64, lambda fraction: None)

def peak():
    # Not ru_maxrss, which begins with what the parent held.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
load(sys.argv[1])  # compiles the kernels
before = psutil.Process().memory_info().rss
model = load(sys.argv[2])
held = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
print(json.dumps({"model": held, "peak": peak() - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts peak memory as Linux does")
@pytest.mark.parametrize(
    ("precision", "kept"), [("bfloat16", "fp8"), ("bfloat16", "converted"), ("float32", "converted")]
)
def test_a_load_holds_the_model_and_less_than_one_shard(tmp_path: Path, precision: str, kept: str) -> None:
    """The process's largest resident set, file pages included, over what it was before."""
    write_checkpoint(tmp_path / "tiny", TINY)
    write_checkpoint(tmp_path / "big", BIG, num_shards=8)
    shard = max(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors"))
    command = [sys.executable, "-c", LOAD, str(tmp_path / "tiny"), str(tmp_path / "big"), precision, kept]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    measured = json.loads(ended.stdout)
    numbers = numbers_of(BIG)
    bytes_per_number = {"fp8": 1.0, "converted": 2.0 if precision == "bfloat16" else 4.0}[kept]
    assert measured["model"] == pytest.approx(numbers * bytes_per_number, rel=0.1), "the measure is of the whole model"
    assert measured["peak"] <= measured["model"] + shard, measured
