"""What is rendered, line by line, so that a change is seen in its review.

After a change that is meant: `UPDATE_GOLDEN=1 python -m pytest tests/chart/test_golden.py`, then read `git diff`.
"""

import os
from pathlib import Path

import pytest
import yaml
from tests.chart.rendering import EVERYTHING, MODELS, PROVIDERS, SCALEWAY, Case, Manifest, render

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "scaleway-llama-8b-h100": Case((SCALEWAY, MODELS["llama-8b-h100"])),
    "kind-smollm2-cpu": Case((PROVIDERS["kind"], MODELS["smollm2-cpu"]), "1.29"),
    "everything": Case((EVERYTHING,), "1.32"),
}


def written(manifests: tuple[Manifest, ...]) -> str:
    """YAML in a steady order, without what is drawn by lot and what has tests of its own."""
    documents = []
    for manifest in sorted(manifests, key=lambda each: (each["kind"], each["metadata"]["name"])):
        kept = dict(manifest)
        if kept["kind"] == "PrometheusRule" or "-dashboard-" in kept["metadata"]["name"]:
            continue
        if kept["kind"] == "Secret":
            kept["data"] = dict.fromkeys(kept["data"], "drawn by lot")
        documents.append(yaml.safe_dump(kept, sort_keys=False, width=120))
    return "---\n".join(documents)


@pytest.mark.parametrize("name", CASES)
def test_nothing_has_changed_unseen(name: str) -> None:
    path = GOLDEN / f"{name}.yaml"
    now = written(render(CASES[name]))
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(now)
    assert now == path.read_text()
