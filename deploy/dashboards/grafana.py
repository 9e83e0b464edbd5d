"""A dashboard as a value, read from TOML, and the JSON that Grafana reads of it.

Dashboard ── Row ── Panel ── Query        placed left to right, top to bottom, on a grid 24 wide
         ├── Variable
         └── filters: names for label matchers that queries share
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

Json = dict[str, object]

RUNBOOKS = "docs/runbook"
"""Where pages of the runbook are, for links. Whoever publishes them elsewhere replaces it in the JSON."""
_SCHEMA_VERSION = 39
_WIDTH = 24
_DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a panel shows. `expr` may name filters, `legend` labels in {{ }}."""

    expr: str
    legend: str = "__auto"


class Panel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question and its answer. `unit` is Grafana's name of it, `runbook` the alert whose page helps."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat", "bargauge", "table"] = "timeseries"
    width: int = 8
    bad_above: float | None = None
    """From here upwards values are red."""
    bad_below: float | None = None
    runbook: str = ""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    title: str
    panels: tuple[Panel, ...]


class Variable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A choice at the top: values of a label of a metric; or, without a metric, a number that is typed in."""

    name: str
    metric: str = ""
    label: str = ""
    value: str = ""
    text: str = ""


class Dashboard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it."""

    name: str
    title: str
    span: str
    """What is looked at first, such as "now-6h"."""
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]
    filters: dict[str, str] = {}

    @staticmethod
    def read(file: Path) -> "Dashboard":
        """Raises ValueError when something in the file is unknown or malformed."""
        return msgspec.convert(tomllib.loads(file.read_text()), Dashboard)

    def to_json(self) -> Json:
        return {
            "uid": f"rempart-{self.name}",
            "title": f"Rempart / {self.title}",
            "tags": ["rempart"],
            "editable": False,
            "graphTooltip": 1,
            "schemaVersion": _SCHEMA_VERSION,
            "timezone": "utc",
            "refresh": "30s",
            "time": {"from": self.span, "to": "now"},
            "links": [{"type": "dashboards", "title": "Rempart", "tags": ["rempart"], "asDropdown": True}],
            "templating": {"list": [_datasource(), *(_variable(each) for each in self.variables)]},
            "panels": list(self._placed()),
        }

    def _placed(self) -> Iterator[Json]:
        number, top = 1, 0
        for row in self.rows:
            yield {"id": number, "type": "row", "title": row.title, "gridPos": _at(0, top, _WIDTH, 1), "panels": []}
            number, top, left, height = number + 1, top + 1, 0, 0
            for panel in row.panels:
                if left + panel.width > _WIDTH:
                    top, left, height = top + height, 0, 0
                tall = 4 if panel.kind == "stat" else 8
                yield {"id": number, "gridPos": _at(left, top, panel.width, tall), **self._panel(panel)}
                number, left, height = number + 1, left + panel.width, max(height, tall)
            top += height

    def _panel(self, panel: Panel) -> Json:
        return {
            "type": panel.kind,
            "title": panel.title,
            "description": panel.description,
            "datasource": _DATASOURCE,
            "links": [_link(panel.runbook)] if panel.runbook else [],
            "fieldConfig": {
                "defaults": {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": _steps(panel)}},
                "overrides": [],
            },
            "options": _OPTIONS[panel.kind],
            "targets": [self._target(chr(ord("A") + at), each, panel) for at, each in enumerate(panel.queries)],
        }

    def _target(self, letter: str, query: Query, panel: Panel) -> Json:
        expr = query.expr
        for name, matchers in self.filters.items():
            expr = re.sub(rf"\b{name}\b", matchers.replace("\\", r"\\"), expr)
        return {
            "refId": letter,
            "datasource": _DATASOURCE,
            "expr": expr,
            "legendFormat": query.legend,
            "instant": panel.kind != "timeseries",
            "range": panel.kind == "timeseries",
            "format": "table" if panel.kind == "table" else "time_series",
        }


def _datasource() -> Json:
    return {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}


def _variable(variable: Variable) -> Json:
    if not variable.metric:
        return {
            "type": "textbox",
            "name": variable.name,
            "label": variable.text,
            "query": variable.value,
            "current": {"text": variable.value, "value": variable.value},
        }
    query = f"label_values({variable.metric}, {variable.label})"
    return {
        "type": "query",
        "name": variable.name,
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": variable.name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _at(x: int, y: int, w: int, h: int) -> Json:
    return {"x": x, "y": y, "w": w, "h": h}


def _link(alert: str) -> Json:
    return {"title": f"Runbook: {alert}", "url": f"{RUNBOOKS}/{alert}.md", "targetBlank": True}


def _steps(panel: Panel) -> list[Json]:
    """Colours, each from its value upwards; the first holds from the beginning."""
    if panel.bad_below is not None:
        return [{"color": "red", "value": None}, {"color": "green", "value": panel.bad_below}]
    steps: list[Json] = [{"color": "green", "value": None}]
    return steps if panel.bad_above is None else [*steps, {"color": "red", "value": panel.bad_above}]


_REDUCED: Json = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[str, Json] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": _REDUCED, "colorMode": "value", "graphMode": "none", "textMode": "auto"},
    "bargauge": {"reduceOptions": _REDUCED, "orientation": "horizontal", "displayMode": "basic"},
    "table": {"showHeader": True},
}
