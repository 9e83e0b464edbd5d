"""Writes the chart's table of values from the comments of values.yaml: `python deploy/chart_readme.py`.

A comment that begins with `# -- ` says what the key below it is for. The table goes between the two marks in
helm/rempart/README.md; what is around them is written by hand.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[1] / "helm" / "rempart"
README = CHART / "README.md"
BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->\n"
_MAX_DEFAULT_CHARS = 70


def described(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every key with such a comment: its path, and the comment."""
    path: list[tuple[int, str]] = []
    comment = ""
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            comment = stripped.removeprefix("# -- ")
        elif stripped and not stripped.startswith(("#", "-")):
            depth = len(line) - len(line.lstrip())
            path = [step for step in path if step[0] < depth] + [(depth, stripped.partition(":")[0])]
            if comment:
                yield tuple(name for _, name in path), comment
            comment = ""


def default_of(values: Any, path: tuple[str, ...]) -> str:
    """The default as JSON, or where to read it."""
    for name in path:
        values = values[name]
    default = json.dumps(values, ensure_ascii=False)
    return f"`{default}`" if len(default) <= _MAX_DEFAULT_CHARS else "see `values.yaml`"


def table(text: str) -> str:
    """The table of a values.yaml, in Markdown."""
    values = yaml.safe_load(text)
    rows = [
        f"| `{'.'.join(path)}` | {default_of(values, path)} | {comment.replace('|', chr(92) + '|')} |"
        for path, comment in described(text)
    ]
    return "\n".join(["| value | default | what it is for |", "|---|---|---|", *rows]) + "\n"


def with_table(readme: str, text: str) -> str:
    """The README with the table as it should be now."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(text)}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(), (CHART / "values.yaml").read_text()))
