"""A plan as tables for people, or as one JSON document for programs."""

import json
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from rempart_platform.plan.lines import Line, Section, write


def to_json(model_name: str, sections: Sequence[Section]) -> str:
    """`{"model", "sections": [{"key", "title", "machine", "lines": [{"key", "label", "value", ...}]}]}`."""
    document = {
        "model": model_name,
        "sections": [
            {
                "key": section.key,
                "title": section.title,
                "machine": section.machine,
                "lines": [_line_document(line) for line in section.lines],
            }
            for section in sections
        ],
    }
    return json.dumps(document)


def print_tables(console: Console, sections: Sequence[Section]) -> None:
    for section in sections:
        table = Table("", "", "formula", title=section.title, title_justify="left", box=box.SIMPLE, title_style="bold")
        for line in section.lines:
            table.add_row(_label(section, line), write(line.value, line.unit), _explained(line))
        console.print(table)


def _label(section: Section, line: Line) -> str:
    return f"{line.key}: {line.label}" if section.key == "machines" else line.label


def _explained(line: Line) -> str:
    return "\n".join(part for part in (line.formula, f"({line.note})" if line.note else "") if part)


def _line_document(line: Line) -> dict[str, object]:
    return {
        "key": line.key,
        "label": line.label.strip(),
        "value": line.value,
        "unit": line.unit.value,
        "formula": line.formula,
        "note": line.note,
    }
