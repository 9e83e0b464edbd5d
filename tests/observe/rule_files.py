"""The rule files of the chart, and what of Prometheus they are checked with."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm/rempart/rules"
RULE_TESTS = Path(__file__).with_name("rules_tests")
RUNBOOK = ROOT / "docs/runbook"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; `name` is the alert's or the record's."""

    file: Path
    name: str
    expr: str
    is_alert: bool
    labels: dict[str, str]
    annotations: dict[str, str]


def rules() -> list[Rule]:
    """All rules of all files."""
    return [
        Rule(
            file,
            rule["alert"] if "alert" in rule else rule["record"],
            rule["expr"],
            "alert" in rule,
            rule.get("labels", {}),
            rule.get("annotations", {}),
        )
        for file in sorted(RULES.glob("*.yaml"))
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    ]


def alerts() -> list[Rule]:
    return [rule for rule in rules() if rule.is_alert]


def tool(name: str) -> Path:
    """promtool or prometheus, where the set-up puts them: beside Python."""
    return Path(sys.executable).with_name(name)


def promtool(*args: str | Path) -> str:
    """Runs it to its end, and gives what it said. Fails when it does."""
    ended = subprocess.run([tool("promtool"), *args], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
