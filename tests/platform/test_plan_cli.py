"""`rempart plan`, as a shell calls it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rempart_platform.local.testing import run_cli
from rempart_platform.plan.machines import MACHINES_FILE, read_machines


def plan(*args: str) -> Any:
    """The document of a run with --json, its lines by machine, section and key."""
    ended = run_cli("plan", *args, "--json", environ=os.environ)
    assert ended.returncode == 0, ended.stderr
    found: dict[tuple[str | None, str], dict[str, Any]] = {}
    for section in json.loads(ended.stdout)["sections"]:
        found[section["machine"], section["key"]] = {line["key"]: line for line in section["lines"]}
    return found


def test_a_models_figures_and_every_machine() -> None:
    sections = plan("deepseek-v3.2")
    assert sections[None, "cache"]["fp8"]["value"] == 48_068
    assert sections[None, "cache"]["bf16"]["value"] == 78_324
    assert sections[None, "weights"]["fp8"]["value"] == pytest.approx(689.5e9, rel=1e-4)
    assert sections[None, "parameters"]["tensors"]["value"] == 92_425
    assert sections[None, "parameters"]["total"]["value"] == pytest.approx(685.35e9, rel=1e-4)
    assert list(sections[None, "machines"]) == [machine.name for machine in read_machines()]


def test_people_get_tables_with_formulas_that_a_pipe_does_not_cut() -> None:
    ended = run_cli("plan", "deepseek-v3.2", "--machine", "h200-x8", environ=os.environ)
    assert ended.returncode == 0, ended.stderr
    for text in (
        "61 layers * 656 B latent + 61 index layers * 132 B index keys",
        "48,068 B",
        "689.47 GB",
        "were attention dense",
    ):
        assert text in ended.stdout
    assert (
        "floor((141 GB - 4 GB overhead - 19.962 GB weights - 81.759 GB routed experts) / 6.3004 GB cache)"
        in ended.stdout
    )
    assert "has run on none yet" in ended.stdout.splitlines()[-1], "nobody takes a bound for a measurement"


def test_one_a100_is_told_what_it_would_need() -> None:
    sections = plan("deepseek-v3.2", "--machine", "a100-80-x1", "--machine", "a100-80-x8")
    one, eight = (sections[name, "fit"] for name in ("a100-80-x1", "a100-80-x8"))
    assert [one[each]["value"] for each in ("bf16", "int8", "fp8", "int4")] == [0, 0, 0, 0]
    assert "no fp8 hardware" in one["fp8"]["note"]
    assert eight["bf16"]["value"] == eight["int8"]["value"] == 0
    assert eight["int4"]["value"] > 0
    assert eight["int8-machines"]["value"] == 2
    offload = sections["a100-80-x1", "offload"]
    ceilings = [offload[f"int4-decode-{rate}-host"] for rate in (200, 400)]
    assert [round(line["value"]) for line in ceilings] == [19, 38]
    assert all("assumed" in line["note"] for line in ceilings)
    assert offload["int4-pass"]["value"] == pytest.approx(13.5, rel=2e-3)
    assert ("a100-80-x8", "offload") not in sections, "it holds the model"
    for name in ("a100-80-x1", "a100-80-x8"):
        today = sections[name, "machine"]["today"]
        assert (today["value"], today["note"] != "") == ("no", True)


def test_costs_need_a_price() -> None:
    sections = plan("deepseek-v3.2", "--machine", "scaleway-b300-sxm-8", "--machine", "b300-x8", "--batch", "64")
    priced = sections["scaleway-b300-sxm-8", "decode"]["131072-64-cost"]
    unpriced = sections["b300-x8", "decode"]["131072-64-cost"]
    rate = sections["scaleway-b300-sxm-8", "decode"]["131072-64-rate"]["value"]
    assert priced["value"] == pytest.approx(60 / (rate * 0.3 * 3600) * 1e6)
    assert "EUR" in priced["label"]
    assert unpriced["value"] is None
    assert "no price is known" in unpriced["note"]


def test_loads_that_do_not_fit_say_how_many_would() -> None:
    args = ("--machine", "h200-x8", "--batch", "8", "--batch", "41", "--context", "131072")
    decode = plan("deepseek-v3.2", *args)["h200-x8", "decode"]
    assert decode["131072-8"]["value"] > 0
    assert decode["131072-41"]["value"] is None
    assert decode["131072-41"]["note"] == "does not fit: at most 40 sequences at once"


def test_formats_and_mtp_are_taken() -> None:
    def contexts(*args: str) -> int:
        section = plan("deepseek-v3.2", "--machine", "scaleway-b300-sxm-8", *args)["scaleway-b300-sxm-8", "layout"]
        return int(section["expert-contexts"]["value"])

    default = contexts()
    assert contexts("--weights", "bf16") < contexts("--cache", "bf16") < default
    assert contexts("--mtp") <= contexts("--overhead-gb", "5") <= default


def test_a_machine_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    shutil.copy(MACHINES_FILE, file)
    with file.open("a") as more:
        more.write('\n[[machines]]\nname = "mine"\ngpu = "H200"\nnum_gpus = 16\n')
    sections = plan("glm-5.2", "--machines", str(file), "--machine", "mine")
    assert sections["mine", "fit"]["bf16"]["value"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("deepseek-v9",), "known: deepseek-v3.2, "),
        (("deepseek-v3.2", "--machine", "h300"), "known: a100-80-x1, "),
        (("deepseek-v3.2", "--weights", "fp4"), "--weights 'fp4' is not known; known: fp8, bf16, int8, int4"),
        (("deepseek-v3.2", "--cache", "int4"), "--cache 'int4' is not known; known: fp8, bf16"),
        (("deepseek-v3.2", "--context", "200000"), "takes at most 163840"),
        (("deepseek-v3.2", "--machines", "/no/such.toml"), "/no/such.toml: cannot be read"),
        (("deepseek-v3.2", "--overhead-gb", "nan"), "--overhead-gb must be"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(args: tuple[str, ...], message: str) -> None:
    ended = run_cli("plan", *args, environ=os.environ)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert ended.stderr.startswith("rempart plan: ")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


def test_help_says_how_to_read_it() -> None:
    asked = run_cli("plan", "--help", environ=os.environ)
    assert asked.returncode == 0
    for text in ("formula", "Nothing here is", "--machines", "--utilisation"):
        assert text in asked.stdout
    assert " plan " in run_cli("--help", environ=os.environ).stdout


def test_naming_the_command_loads_nothing_heavy() -> None:
    program = "import sys, rempart_platform.plan.command; print({'rich.table', 'grpc', 'tomllib'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "grpc" not in loaded.stdout
    assert "tomllib" not in loaded.stdout
