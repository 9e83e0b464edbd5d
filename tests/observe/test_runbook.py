"""Every alert has a page, and what a page says to type exists."""

import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from tests.observe.metrics_page import documented
from tests.observe.promql import metric_of, selectors
from tests.observe.rule_files import ROOT, RUNBOOK, alerts, promtool, rules, tool
from typer.core import TyperGroup
from typer.main import get_command

from rempart_platform.cli import app
from rempart_platform.local.testing import run_cli

PAGES = sorted(path for path in RUNBOOK.glob("*.md") if path.name != "README.md")
DOCUMENTS = [*PAGES, RUNBOOK / "README.md", *(ROOT / "docs" / name for name in ("slo.md", "capacity.md", "metrics.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:rempart|kubectl|helm) [^`]+)`")
_LINK = re.compile(r"\]\(([^)#]+)\)")
_OF_OTHERS = {"up", "certmanager_certificate_expiration_timestamp_seconds"}
_SOURCES = [*(ROOT / "platform").rglob("*.py"), *(ROOT / "engine").rglob("*.py")]
_LOGGED = re.compile(r"""log(?:ger)?\.(?:info|warning|error|critical|exception)\(\s*f?"([^"]*)\"""")
_PASSED_ON = {"engine", "router", "fetch", "verify"}
"""Commands of rempart that hand their options on to another program."""


def blocks(page: Path, language: str) -> list[str]:
    """Lines of a page's blocks of code."""
    return [line for kind, text in _BLOCK.findall(page.read_text()) if kind == language for line in text.splitlines()]


def commands(page: Path) -> list[list[str]]:
    """All that the page says to type, up to a pipe; in blocks and in sentences."""
    lines = [*blocks(page, "sh"), *_INLINE.findall(page.read_text())]
    return [shlex.split(line.partition(" | ")[0]) for line in lines]


def test_every_alert_has_a_page_and_every_page_an_alert() -> None:
    assert {page.stem for page in PAGES} == {alert.name for alert in alerts()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_tells_what_it_means_how_to_look_what_to_do_and_when_it_is_over(page: Path) -> None:
    text = page.read_text()
    (alert,) = [alert for alert in alerts() if alert.name == page.stem]
    assert text.startswith(f"# {page.stem}\n\n**{alert.labels['severity'].capitalize()}.** ")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Look", "Likely causes", "Do", "Over when"]
    assert blocks(page, "promql")
    assert blocks(page, "sh")


def test_the_list_says_of_all_alerts_what_they_say() -> None:
    text = (RUNBOOK / "README.md").read_text()
    assert re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| (\w+) \| (.*) \|$", text, re.MULTILINE) == sorted(
        (alert.name, alert.labels["severity"], _without_values(alert.annotations["summary"])) for alert in alerts()
    )


def _without_values(template: str) -> str:
    return re.sub(r"{{[^}]*}}", "…", re.sub(r"{{ with .*?{{ end }}", "", template))


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        assert target.startswith("https://") or (page.parent / target).is_file(), target


def test_prometheus_can_parse_every_expression(tmp_path: Path) -> None:
    exprs = [expr for page in DOCUMENTS for expr in blocks(page, "promql")]
    wrapped = [{"record": f"expression:{number}", "expr": expr} for number, expr in enumerate(exprs)]
    file = tmp_path / "expressions.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "runbook", "rules": wrapped}]}))
    promtool("check", "rules", file)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_metrics_that_are_named_exist(page: Path) -> None:
    known = {metric.name for metric in documented()} | {rule.name for rule in rules()} | _OF_OTHERS
    for expr in blocks(page, "promql"):
        for selector in selectors(expr):
            name = metric_of(selector)
            assert name in known or re.sub(r"_(bucket|sum|count)$", "", name) in known or name.startswith("kube_"), name


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_commands_exist(page: Path) -> None:
    for program, *words in commands(page):
        match program:
            case "rempart":
                _require_rempart(words)
            case "kubectl" | "helm":
                assert _help_of(program, _verb(words)), words
            case _:
                pytest.fail(f"{page.name}: {program} is not on every operator's machine")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_of_logs_that_are_looked_for_are_written(page: Path) -> None:
    written = [message for file in _SOURCES for message in _LOGGED.findall(file.read_text())]
    for line in blocks(page, "sh"):
        for flags, pattern in re.findall(r" \| grep ((?:-\w )*)(\S.*)$", line):
            (searched,) = shlex.split(pattern)
            found = [each for each in written if re.search(searched, each, re.IGNORECASE if "i" in flags else 0)]
            assert found or "v" in flags, line


def _require_rempart(words: list[str]) -> None:
    """The command is there, and its help names the options that are given."""
    command, path, rest = get_command(app), [], list(words)
    while isinstance(command, TyperGroup):
        assert rest[0] in command.commands, words
        path.append(rest.pop(0))
        command = command.commands[path[-1]]
    known = {name for parameter in command.params for name in parameter.opts}
    if command.name in _PASSED_ON:
        known = set(re.findall(r"--[a-z-]+", run_cli(*path, "--help", environ=os.environ).stdout))
    assert {word for word in rest if word.startswith("--")} <= known, words


def _verb(words: list[str]) -> tuple[str, ...]:
    """What kubectl is to do: the first words that are neither flags nor their values."""
    rest = [
        word for at, word in enumerate(words) if not word.startswith("-") and words[at - 1] not in ("-n", "-l", "-c")
    ]
    return tuple(rest[:2]) if rest[0] in ("rollout", "auth", "top") else (rest[0],)


@cache
def _help_of(program: str, verb: tuple[str, ...]) -> bool:
    command = [str(tool(program)), *verb, "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    # For a verb that it does not know, kubectl shows its own help and is content.
    return ended.returncode == 0 and f"{program} {verb[0]}" in ended.stdout
