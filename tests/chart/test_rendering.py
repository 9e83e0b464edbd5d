"""Every provider with every model, and what they leave off, is what each version of Kubernetes takes."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from tests.chart.rendering import (
    ALL_CASES,
    CHART,
    EVERY,
    EVERYTHING,
    KUBERNETES,
    MODELS,
    PROVIDERS,
    SCALEWAY,
    Case,
    Manifest,
    helm,
    pods,
)

SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "schemas").glob("*.json")}
"""Of objects that Kubernetes does not know by itself: the fields that we use, as their projects define them."""


@pytest.fixture(scope="module", autouse=True)
def _definitions_are_read_once() -> Iterator[None]:
    """The library reads a megabyte of JSON for each object."""
    with pytest.MonkeyPatch.context() as patch:
        utils = kubernetes_validate.utils
        patch.setattr(utils, "schema_contents", cache(utils.schema_contents))
        yield


def require_valid(manifest: Manifest, kubernetes: str) -> None:
    if manifest["kind"] in SCHEMAS:
        Draft202012Validator(SCHEMAS[manifest["kind"]]).validate(manifest)
    else:
        kubernetes_validate.validate(manifest, kubernetes, strict=True)


def as_template(pod: Manifest) -> Manifest:
    """A pod inside an object that Kubernetes does not know."""
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod}


def test_helm_finds_no_fault() -> None:
    for values in ((), *((path,) for path in (SCALEWAY, MODELS["llama-8b-l4"])), (EVERYTHING,)):
        done = helm("lint", "--strict", str(CHART), *(f"--values={path}" for path in values))
        assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_a_file_for_every_provider_and_model() -> None:
    assert PROVIDERS.keys() == {"exoscale", "kind", "outscale", "ovhcloud", "scaleway", "stackit"}
    assert MODELS.keys() >= {"llama-8b-h100", "llama-8b-l4", "llama-8b-l40s", "small-dsa-gpu"}


@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_every_object_is_one(renderings: Mapping[Case, tuple[Manifest, ...]], kubernetes: str) -> None:
    distinct: dict[str, Manifest] = {}
    for case in ALL_CASES:
        if case.kubernetes == kubernetes:
            distinct |= {json.dumps(manifest): manifest for manifest in renderings[case]}
            for _, pod in pods([each for each in renderings[case] if each["kind"] == "LeaderWorkerSet"]):
                distinct[json.dumps(pod)] = as_template(pod)
    for manifest in distinct.values():
        require_valid(manifest, kubernetes)


def test_every_kind_with_a_schema_of_ours_is_rendered(renderings: Mapping[Case, tuple[Manifest, ...]]) -> None:
    kinds = {manifest["kind"] for manifests in renderings.values() for manifest in manifests}
    assert SCHEMAS.keys() <= kinds


def test_objects_have_names_of_their_own(renderings: Mapping[Case, tuple[Manifest, ...]]) -> None:
    for case, manifests in renderings.items():
        names = [(each["apiVersion"], each["kind"], each["metadata"]["name"]) for each in manifests]
        assert len(names) == len(set(names)), str(case)
        assert all(each["metadata"].get("namespace") in {"llm", None} for each in manifests)


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("ScaledObject", ("spec", "triggers", 0, "metadata", "threshold"), 40000),
        ("ScaledObject", ("spec", "scaleTargetRef"), {}),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0), {"alert": "X", "expr": "up", "for": "5min"}),
        ("HTTPRoute", ("spec", "rules", 0, "timeouts", "request"), "never"),
        ("Certificate", ("spec", "issuerRef"), {"kind": "ClusterIssuer"}),
        ("LeaderWorkerSet", ("spec", "leaderWorkerTemplate", "size"), "2"),
        ("InferencePool", ("spec", "targetPorts"), []),
    ],
)
def test_our_schemas_refuse_what_is_wrong(
    renderings: Mapping[Case, tuple[Manifest, ...]], kind: str, path: tuple[str | int, ...], wrong: object
) -> None:
    everything = renderings[EVERY]
    manifest = json.loads(json.dumps(next(each for each in everything if each["kind"] == kind)))
    assert not list(Draft202012Validator(SCHEMAS[kind]).iter_errors(manifest))
    parent: Any = manifest
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = wrong
    assert list(Draft202012Validator(SCHEMAS[kind]).iter_errors(manifest))
