"""The dashboards of the chart, as Grafana would ask Prometheus for them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.observe.rule_files import ROOT

DASHBOARDS = ROOT / "helm/rempart/dashboards"
_OF_GRAFANA = {"__rate_interval": "10s", "__range": "1h"}


@dataclass(frozen=True, slots=True)
class Expression:
    """One query of one panel, its variables replaced by "All"."""

    dashboard: str
    panel: str
    expr: str


def documents() -> dict[Path, Any]:
    return {file: json.loads(file.read_text()) for file in sorted(DASHBOARDS.glob("*.json"))}


def panels(document: Any) -> list[Any]:
    """Without the rows' titles."""
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def expressions() -> list[Expression]:
    return [
        Expression(file.stem, panel["title"], _with_values(target["expr"], document))
        for file, document in documents().items()
        for panel in panels(document)
        for target in panel["targets"]
    ]


def variables(document: Any) -> dict[str, str]:
    """Values with which all is shown."""
    chosen = {each["name"]: each for each in document["templating"]["list"]}
    return {
        name: each.get("allValue") or each["query"] for name, each in chosen.items() if each["type"] != "datasource"
    }


def _with_values(expr: str, document: Any) -> str:
    values = variables(document) | _OF_GRAFANA
    return re.sub(r"\$(\w+)", lambda found: values[found.group(1)], expr)
