"""What is packed for a cluster without the Internet is all that its pods name; what is pushed is what was packed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "airgap.sh"
FLAGS = ("-f", str(ROOT / "deploy/providers/kind.yaml"), "-f", str(ROOT / "deploy/models/smollm2-cpu.yaml"))
# Stand-ins for the programs that would reach a registry and a bucket: they write down what they were asked for.
SKOPEO = """#!/bin/sh
echo "skopeo $*" >>"$CALLS"
for target; do :; done
case $target in dir:*) mkdir -p "${target#dir:}" && echo "image of $*" >"${target#dir:}/manifest.json" ;; esac
"""
REMPART = """#!/bin/sh
echo "rempart $*" >>"$CALLS"
mkdir -p "$3" && echo weights >"$3/model.gguf"
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("skopeo", SKOPEO), ("rempart", REMPART)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (programs / "helm").symlink_to(Path(sys.executable).with_name("helm"))
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}


def airgap(environ: dict[str, str], *args: str, exit_code: int = 0) -> str:
    done = subprocess.run([SCRIPT, *args], check=False, capture_output=True, text=True, env=environ)
    assert done.returncode == exit_code, done.stderr
    return done.stdout


@pytest.mark.parametrize("model", sorted(path.stem for path in (ROOT / "deploy" / "models").glob("*.yaml")))
def test_every_image_of_every_pod_is_listed(environ: dict[str, str], model: str) -> None:
    flags = ("-f", str(ROOT / "deploy/providers/kind.yaml"), "-f", str(ROOT / f"deploy/models/{model}.yaml"))
    command = ["helm", "template", "rempart", str(ROOT / "helm" / "rempart"), *flags]
    manifests = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environ).stdout
    images: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, dict):
            images.update(str(value[key]) for key in ("image", "reference") if isinstance(value.get(key), str))
            for part in value.values():
                collect(part)
        elif isinstance(value, list):
            for part in value:
                collect(part)

    for manifest in yaml.safe_load_all(manifests):
        collect(manifest)
    listed = airgap(environ, "list", *flags).splitlines()
    assert len(images) >= 3
    assert {line.removeprefix("image ") for line in listed if line.startswith("image ")} == images
    assert [line for line in listed if line.startswith("model s3://")]


def test_what_was_packed_is_pushed_to_the_cluster_registry(environ: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    airgap(environ, "pack", str(folder), *FLAGS)
    assert (folder / "models" / "models" / "SmolLM2-135M-Instruct" / "model.gguf").exists()
    said = airgap(environ, "push", str(folder), "registry.local:5000/ai")
    assert "--set images.registry=registry.local:5000/ai" in said
    assert pushed(environ) == {
        "docker://registry.local:5000/ai/rempart-router:0.1.0",
        "docker://registry.local:5000/ai/rempart-engine:0.1.0-cpu",
        "docker://registry.local:5000/ai/valkey/valkey:8.1.1",
    }


def pushed(environ: dict[str, str]) -> set[str]:
    """Where images went; each as it was, or a digest that the values name would be another's."""
    calls = [call.split() for call in Path(environ["CALLS"]).read_text().splitlines() if call.startswith("skopeo copy")]
    assert calls
    assert all({"--all", "--preserve-digests"} <= set(call) for call in calls)
    return {call[-1] for call in calls if call[-1].startswith("docker://")}


def test_an_image_that_is_named_by_its_digest_is_pushed_by_it(environ: dict[str, str], tmp_path: Path) -> None:
    digest = f"sha256:{'ab' * 32}"
    airgap(environ, "pack", str(tmp_path / "packed"), *FLAGS, "--set", f"images.router.digest={digest}")
    airgap(environ, "push", str(tmp_path / "packed"), "registry.local:5000/ai")
    assert f"docker://registry.local:5000/ai/rempart-router@{digest}" in pushed(environ)


def test_models_of_the_same_last_name_lie_apart(environ: dict[str, str], tmp_path: Path) -> None:
    other = '{"model": {"name": "x"}, "weights": {"source": "s3://models/x/v1"}}'
    more = ("--set", "engines.smollm2.weights.source=s3://models/smollm2/v1", "--set-json", f"engines.other={other}")
    airgap(environ, "pack", str(tmp_path / "packed"), *FLAGS, *more)
    found = {path.parent.relative_to(tmp_path / "packed").as_posix() for path in tmp_path.glob("packed/**/model.gguf")}
    assert found == {"models/models/x/v1", "models/models/smollm2/v1"}


def test_a_folder_that_was_changed_on_its_way_is_not_pushed(environ: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    airgap(environ, "pack", str(folder), *FLAGS)
    next((folder / "images").glob("*/manifest.json")).write_text("something else")
    calls = Path(environ["CALLS"]).read_text()
    airgap(environ, "push", str(folder), "registry.local:5000", exit_code=1)
    assert Path(environ["CALLS"]).read_text() == calls


def test_values_that_the_chart_refuses_are_not_packed(environ: dict[str, str], tmp_path: Path) -> None:
    wrong = (*FLAGS, "--set", "router.replica=2")
    airgap(environ, "list", *wrong, exit_code=1)
    airgap(environ, "pack", str(tmp_path / "packed"), *wrong, exit_code=1)
    assert not list(tmp_path.glob("packed/**/*.*"))


def test_it_says_how_it_is_used(environ: dict[str, str]) -> None:
    for args in ((), ("send",), ("push", "folder")):
        airgap(environ, *args, exit_code=2)
