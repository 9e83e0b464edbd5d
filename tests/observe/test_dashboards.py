"""Dashboards are what their source says, and Prometheus can parse all that they ask."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.observe.dashboards import documents, expressions, panels, variables
from tests.observe.rule_files import ROOT, RUNBOOK, promtool

DOCUMENTS = documents()


def test_files_are_current() -> None:
    command = [sys.executable, "deploy/dashboards/generate.py", "--check"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_there_is_one_for_each_question() -> None:
    assert {file.stem for file in DOCUMENTS} == {"fleet", "engine", "tenant", "batch", "cost", "slo"}
    assert {document["uid"] for document in DOCUMENTS.values()} == {f"rempart-{file.stem}" for file in DOCUMENTS}


def test_prometheus_can_parse_every_expression(tmp_path: Path) -> None:
    wrapped = [{"record": f"expression:{number}", "expr": each.expr} for number, each in enumerate(expressions())]
    file = tmp_path / "expressions.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": wrapped}]}))
    promtool("check", "rules", file)


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=lambda document: document["uid"])
def test_whoever_opens_one_can_find_his_way(document: Any) -> None:
    used = str(document["panels"])
    for name in variables(document):
        assert f"${name}" in used, f"nothing uses the variable {name}"
    for panel in panels(document):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        for link in panel["links"]:
            assert (RUNBOOK / link["url"].removeprefix("docs/runbook/")).is_file(), link


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=lambda document: document["uid"])
def test_panels_lie_beside_each_other(document: Any) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_a_model_that_no_engine_serves_can_be_chosen_all_the_same() -> None:
    """Endpoints are there only while engines are; what autoscalers read, always."""
    chosen = [each for document in DOCUMENTS.values() for each in document["templating"]["list"]]
    assert {each["definition"] for each in chosen if each["name"] == "model"} == {
        "label_values(rempart_requests_held, model)"
    }
