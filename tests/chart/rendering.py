"""Runs the real helm over the chart."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "rempart"
PROVIDERS, MODELS = (
    {path.stem: path for path in sorted((ROOT / "deploy" / folder).glob("*.yaml"))}
    for folder in ("providers", "models")
)
"""By name."""
SCALEWAY = PROVIDERS["scaleway"]
EVERYTHING, INGRESS, IMAGE_VOLUME = (
    Path(__file__).parent / "values" / f"{name}.yaml" for name in ("everything", "ingress", "image-volume")
)
"""Values that turn on what the providers and models leave off."""
KUBERNETES = ("1.29", "1.32", "1.35")
HELM = Path(sys.executable).with_name("helm")

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """Values files over one another, for one version of Kubernetes."""

    values: tuple[Path, ...]
    kubernetes: str = KUBERNETES[-1]

    def __str__(self) -> str:
        return "+".join(path.stem for path in self.values) + f"@{self.kubernetes}"


EVERY = Case((EVERYTHING,))
BY_INGRESS = Case((SCALEWAY, INGRESS))
BY_IMAGE = Case((IMAGE_VOLUME,))
_FILES = (*product(PROVIDERS.values(), MODELS.values()), EVERY.values, BY_INGRESS.values)
ALL_CASES = (*(Case(files, version) for files in _FILES for version in KUBERNETES), BY_IMAGE)


def helm(*args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(HELM), *args], capture_output=True, text=True, timeout=60, check=False)


def _template(case: Case, sets: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    values = [f"--values={path}" for path in case.values]
    overrides = [f"--set-json={assignment}" for assignment in sets]
    version = f"--kube-version={case.kubernetes}.0"
    return helm("template", "rempart", str(CHART), "--namespace=llm", version, *values, *overrides)


@cache
def render(case: Case, *sets: str) -> tuple[Manifest, ...]:
    """Every object, of hooks too. `sets` are helm's --set-json: `router.replicas=3`."""
    done = _template(case, sets)
    assert done.returncode == 0, f"{case}: {done.stderr}"
    return tuple(document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if document)


def refusal(case: Case, *sets: str) -> str:
    """What helm says when it refuses."""
    done = _template(case, sets)
    assert done.returncode != 0, f"{case} was rendered with {sets}"
    return done.stderr


def find(manifests: Sequence[Manifest], kind: str, name: str = "") -> Manifest:
    """The only object of a kind, or that of a name."""
    (found,) = (each for each in manifests if each["kind"] == kind and (not name or each["metadata"]["name"] == name))
    return found


def pods(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod, with its metadata, and the kind and name of what makes it."""
    for manifest in manifests:
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        match manifest["kind"]:
            case "Deployment" | "StatefulSet":
                yield name, manifest["spec"]["template"]
            case "LeaderWorkerSet":
                template = manifest["spec"]["leaderWorkerTemplate"]
                yield f"{name} leader", template["leaderTemplate"]
                yield f"{name} worker", template["workerTemplate"]
            case "Pod":
                yield name, manifest
            case _:
                continue


def servers(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod that is meant to run on."""
    return ((name, pod) for name, pod in pods(manifests) if pod["spec"].get("restartPolicy") != "Never")
