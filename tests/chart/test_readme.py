"""The chart's README says what values.yaml says."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from deploy.chart_readme import README, with_table
from tests.chart.rendering import CHART


def test_the_table_is_current() -> None:
    readme = README.read_text()
    assert readme == with_table(readme, (CHART / "values.yaml").read_text()), "run `python deploy/chart_readme.py`"


def test_every_value_is_explained() -> None:
    rows = [line.split("`")[1] for line in (CHART / "README.md").read_text().splitlines() if line.startswith("| `")]
    explained = {row for row in rows if not row.startswith("weights.")}
    for path in leaves(yaml.safe_load((CHART / "values.yaml").read_text())):
        assert any(path == row or path.startswith(f"{row}.") for row in explained), path


def leaves(values: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for name, value in values.items():
        path = f"{at}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path
