"""The images install what is tested, and the router's holds no torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deploy" / "images"


def locked(image: str) -> dict[str, str]:
    """Versions by name; every line has a hash."""
    lines = [line for line in (IMAGES / f"{image}.lock").read_text().splitlines() if not line.startswith("#")]
    matches = [re.fullmatch(r"([a-z0-9.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    return {match[1]: match[2] for match in matches if match}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("#")[0].strip().split("==") for line in lines if "==" in line]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


@pytest.mark.parametrize("image", ["router", "engine"])
def test_an_image_holds_the_versions_that_are_tested(image: str) -> None:
    versions = locked(image)
    assert len(versions) > 20
    assert versions.items() <= pinned().items()


def test_the_router_needs_neither_torch_nor_kernels() -> None:
    assert locked("router").keys().isdisjoint({"torch", "triton", "numba", "llvmlite"})


def test_every_stage_stands_on_a_digest_or_another_stage_and_none_runs_as_root() -> None:
    text = (IMAGES / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    stages = {stage for _, stage in bases}
    assert {"router", "engine-cpu", "engine-cuda"} <= stages
    assert all(base in stages or base == "${PYTHON}" for base, _ in bases)
    assert re.search(r"^ARG PYTHON=\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "10001:10001"


@pytest.mark.slow
def test_what_the_router_image_installs_runs_without_torch(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*install, "--require-hashes", "-r", str(IMAGES / "router.lock")], check=True)
    subprocess.run([*install, str(ROOT)], check=True)
    for module in ("rempart_platform", "rempart_engine.fetch", "rempart_engine.manifest"):
        help_text = subprocess.run([python, "-m", module, "--help"], check=True, capture_output=True, text=True).stdout
        assert "usage: rempart" in help_text
    modules = "import rempart_platform.router, rempart_engine.fetch, sys; print('torch' in sys.modules)"
    assert subprocess.run([python, "-c", modules], check=True, capture_output=True, text=True).stdout == "False\n"
