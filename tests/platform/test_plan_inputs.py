"""What a plan reads: configs and machine files, and what is wrong with broken ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from rempart_platform.plan.attention import CacheFormat
from rempart_platform.plan.errors import PlanError
from rempart_platform.plan.fields import read_toml
from rempart_platform.plan.machines import MACHINES_FILE, choose_machines, read_machines, read_support
from rempart_platform.plan.models import PUBLISHED_FILE, find_model, published_names
from rempart_platform.plan.placement import Setup
from rempart_platform.plan.question import ask, known_format
from rempart_platform.plan.weights import WeightFormat

SETUP = Setup(CacheFormat.FP8, overhead_bytes=4e9)
MACHINES = """
[gpus."X"]
memory_gb = 80
bandwidth_gb_per_s = 2000
bf16_tflops = 300
fp8_tflops = 0
int8_tops = "unknown"
host_link_gb_per_s = 25

[[machines]]
name = "x8"
gpu = "X"
num_gpus = 8
"""


def published_config(name: str) -> dict[str, Any]:
    return dict(read_toml(PUBLISHED_FILE).section("models").section(name).section("config").values)


def write_config(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps(published_config("deepseek-v3.2") | changes))
    return folder


def test_a_folder_a_file_and_a_name_are_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write_config(folder)
    from_name, from_folder = find_model("DeepSeek-V3.2"), find_model(str(folder))
    assert (from_name.name, from_folder.name) == ("deepseek-v3.2", "mine")
    assert from_folder.tensors == from_name.tensors
    assert from_folder.attention == from_name.attention
    assert find_model(str(folder / "config.json")) == from_folder


def test_every_published_shape_is_read() -> None:
    for name in published_names():
        assert find_model(name).name == name


def test_an_unquantized_config_is_published_in_bf16(tmp_path: Path) -> None:
    write_config(tmp_path, quantization_config=None)
    assert find_model(str(tmp_path)).published is WeightFormat.BF16


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(PlanError, match="'deepseek-v9'") as refused:
        find_model("deepseek-v9")
    for name in published_names():
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of deepseek_v32, glm_moe_dsa, llama"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "7168"}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers must be an integer"),
        ({"first_k_dense_replace": 61}, "first_k_dense_replace must be less than"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok must be at most"),
        ({"index_topk_pattern": "F" * 60}, "index_topk_pattern must say full or shared for each of 61 layers"),
        ({"index_topk_pattern": "F" * 60 + "X"}, "index_topk_pattern must say"),
        ({"indexer_types": ["shared"] * 61}, "indexer_types must say"),
        ({"indexer_types": "full"}, "indexer_types must be a list"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: quant_method must be fp8"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"quantization_config: weight_block_size must be \[128, 128\]",
        ),
        ({"quantization_config": 3}, "quantization_config must be a table"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_a_broken_config_names_file_and_field(tmp_path: Path, changes: dict[str, object], field: str) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(PlanError, match=field) as refused:
        find_model(str(tmp_path))
    assert str(refused.value).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads must divide"),
        ({"hidden_size": 4097}, "hidden_size must be a multiple"),
    ],
)
def test_a_broken_llama_names_the_field(tmp_path: Path, changes: dict[str, object], field: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_config("llama-3.1-8b") | changes))
    with pytest.raises(PlanError, match=field):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        *((b"{", "is not JSON"), (b"[]", "must hold an object"), (b"\xff\xfe", "cannot be read")),
        *((b"[" * 100_000, "JSON"), (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON")),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(PlanError, match=problem) as refused:
        find_model(str(file))
    assert str(file) in str(refused.value)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"has no config\.json"):
        find_model(str(tmp_path))


def test_the_shipped_machines() -> None:
    machines = read_machines()
    assert {machine.gpu.name for machine in machines} >= {
        *("A100-80", "A100-80-PCIe", "H100", "H100-PCIe", "H200", "B200", "B300", "L40S")
    }
    assert {machine.provider for machine in machines} == {"", "Scaleway", "OVHcloud"}
    for machine in machines:
        assert machine.provider or machine.price is None, "what one owns has no price per hour"
        if machine.price is not None:
            assert machine.price.source
    a100, b300 = choose_machines(machines, ("a100-80-x8", "scaleway-b300-sxm-8"))
    assert not a100.gpu.has_fp8
    assert b300.price is not None
    assert (b300.price.amount, b300.price.currency, b300.price.date) == (60.0, "EUR", "unknown")
    assert b300.num_gpus * b300.gpu.memory_bytes == 2304e9


def test_what_is_unknown_is_none(tmp_path: Path) -> None:
    file = tmp_path / "machines.toml"
    file.write_text(MACHINES)
    (machine,) = read_machines(file)
    assert (machine.gpu.fp8_rate, machine.gpu.int8_rate) == (None, None)
    assert (machine.price, machine.host_memory_bytes, machine.network_bits_per_s) == (None, None, None)


def test_an_unknown_machine_lists_the_known_ones() -> None:
    with pytest.raises(PlanError, match="'h300' is not known") as refused:
        choose_machines(read_machines(), ("h300",))
    for machine in read_machines():
        assert machine.name in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("memory_gb = 80", "memory_gb = ", "is not TOML: .*line 3"),
        ("memory_gb = 80", f"memory_gb = {'9' * 5000}", "is not TOML"),
        ("memory_gb = 80", "", "gpus: X: memory_gb is missing"),
        ("memory_gb = 80", "memory_gb = -1", "gpus: X: memory_gb must be a positive number"),
        ("memory_gb = 80", "memory_gb = inf", "gpus: X: memory_gb must be a positive number"),
        ("memory_gb = 80", "memory_gb = nan", "gpus: X: memory_gb must be a positive number"),
        ("memory_gb = 80", "memory_gb = '80'", "gpus: X: memory_gb must be a positive number"),
        ("memory_gb = 80", "memory = 80", "gpus: X: memory is not a field; known: memory_gb"),
        ("num_gpus = 8", "num_gpus = 0", r"machines\[0\]: num_gpus must be an integer"),
        ("num_gpus = 8", "num_gpus = true", r"machines\[0\]: num_gpus must be an integer"),
        ("num_gpus = 8", "num_gpus = 8\nprice = 3", r"machines\[0\]: price is not a field"),
        ("num_gpus = 8", "num_gpus = 8\nprice_per_hour = 3", r"machines\[0\]: currency is missing"),
        ("num_gpus = 8", "num_gpus = 8\nprice_per_hour = 'much'", r"machines\[0\]: price_per_hour must be a positive"),
        ('gpu = "X"', 'gpu = "Y"', r"machines\[0\]: gpu 'Y' is not known; known: X"),
        ('name = "x8"', "", r"machines\[0\]: name is missing"),
        ("[[machines]]", "[machines]", "machines must be a list of tables"),
        ('[gpus."X"]', '[cards."X"]', "cards is not a field; known: gpus, machines"),
    ],
)
def test_a_broken_machine_file_names_file_and_field(tmp_path: Path, old: str, new: str, problem: str) -> None:
    file = tmp_path / "machines.toml"
    file.write_text(MACHINES.replace(old, new, 1))
    with pytest.raises(PlanError, match=problem) as refused:
        read_machines(file)
    assert str(refused.value).startswith(str(file))


def test_machines_that_share_a_name(tmp_path: Path) -> None:
    file = tmp_path / "machines.toml"
    file.write_text(MACHINES + MACHINES[MACHINES.index("[[machines]]") :])
    with pytest.raises(PlanError, match="machines has 'x8' twice"):
        read_machines(file)


def test_a_machine_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        read_machines(tmp_path / "gone.toml")


def test_the_shipped_file_lists_only_gpus_that_a_machine_has() -> None:
    listed = read_toml(MACHINES_FILE).section("gpus").values
    assert set(listed) == {machine.gpu.name for machine in read_machines()}


def test_support_names_only_known_gpus() -> None:
    support = read_support()
    assert support.note
    assert set(support.gpus) <= {machine.gpu.name for machine in read_machines()}


@pytest.mark.parametrize(("flag", "formats"), [("--weights", WeightFormat), ("--cache", CacheFormat)])
def test_an_unknown_format_lists_the_known_ones(flag: str, formats: Any) -> None:
    with pytest.raises(PlanError, match=f"{flag} 'fp4' is not known; known: {', '.join(formats)}"):
        known_format(formats, "fp4", flag)


def test_contexts_are_those_that_the_model_takes() -> None:
    asked = ask("llama-3.1-8b", SETUP, weight_format=None, contexts=(9, 5, 9), utilisation=0.5)
    assert asked.contexts == (5, 9)
    assert ask("deepseek-v3.2", SETUP, weight_format=None, utilisation=0.5).contexts == (8_192, 131_072)
    with pytest.raises(PlanError, match=r"--context 131073: llama-3\.1-8b takes at most 131072"):
        ask("llama-3.1-8b", SETUP, weight_format=None, contexts=(131_073,), utilisation=0.5)


def test_a_short_model_is_planned_at_its_length(tmp_path: Path) -> None:
    write_config(tmp_path, max_position_embeddings=4096)
    assert ask(str(tmp_path), SETUP, weight_format=None, utilisation=0.5).contexts == (4096,)


@pytest.mark.parametrize("overhead_bytes", [-1.0, float("nan"), float("inf")])
def test_an_overhead_that_is_no_amount(overhead_bytes: float) -> None:
    with pytest.raises(PlanError, match="--overhead-gb"):
        Setup(CacheFormat.FP8, overhead_bytes)


@pytest.mark.parametrize("utilisation", [0.0, 1.5, float("nan")])
def test_a_utilisation_that_is_no_share(utilisation: float) -> None:
    with pytest.raises(PlanError, match="--utilisation"):
        ask("llama-3.1-8b", SETUP, weight_format=None, utilisation=utilisation)
