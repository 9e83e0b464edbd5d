"""What processes tell, and what docs/metrics.md says that they do."""

import re
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from tests.observe.rule_files import ROOT

PAGE = ROOT / "docs/metrics.md"
_ROW = re.compile(r"^\| `(?P<name>[\w:]+)` \| (?P<kind>counter|gauge|histogram) \| (?P<labels>[^|]*) \|", re.MULTILINE)
_OF_BUCKETS = {"le"}


@dataclass(frozen=True, slots=True)
class Metric:
    """One family, by the name that queries use; of a histogram without `_bucket`, `_sum` and `_count`."""

    name: str
    kind: str
    labels: frozenset[str]
    has_samples: bool = True


def told(url: str) -> list[Metric]:
    """What a process tells now, but for when its counters began."""
    with urllib.request.urlopen(url, timeout=60) as response:
        text = response.read().decode()
    return [
        Metric(
            f"{family.name}_total" if family.type == "counter" else family.name,
            family.type,
            frozenset(label for sample in family.samples for label in sample.labels) - _OF_BUCKETS,
            bool(family.samples),
        )
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    ]


def documented() -> list[Metric]:
    """The rows of the page's tables."""
    return [
        Metric(row["name"], row["kind"], frozenset(re.findall(r"\w+", row["labels"])))
        for row in _ROW.finditer(PAGE.read_text())
    ]
