"""The three commands after an installation exist and name what was installed."""

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from tests.chart.rendering import BY_INGRESS, CHART, EVERY, MODELS, PROVIDERS, SCALEWAY, Case, find, helm, pods, render
from typer.testing import CliRunner

from rempart_platform.cli import app

ON_A_CPU = Case((SCALEWAY, MODELS["smollm2-cpu"]))

IN_KIND = Case((PROVIDERS["kind"], ON_A_CPU.values[1]))


def notes(case: Case, *sets: str) -> str:
    values = [*(f"--values={path}" for path in case.values), *(f"--set-json={each}" for each in sets)]
    done = helm("install", "rempart", str(CHART), "--namespace=llm", "--dry-run=client", "--hide-secret", *values)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2]


def test_there_are_three_and_they_name_what_is_there() -> None:
    text = notes(ON_A_CPU)
    assert re.findall(r"^(\d)\. ", text, re.MULTILINE) == ["1", "2", "3"]
    named = set(re.findall(r"(deployment|service)/(rempart\S*)", text) + re.findall(r"(secret) (rempart\S*) -o", text))
    assert {kind for kind, _ in named} == {"deployment", "service", "secret"}
    for kind, name in named:
        assert find(render(ON_A_CPU), kind.capitalize(), name)
    assert '"model": "SmolLM2-135M-Instruct"' in text


def test_routers_are_waited_for_as_long_as_they_may_take() -> None:
    (timeout_s,) = re.findall(r"rollout status deployment/rempart-router --timeout=(\d+)s", notes(ON_A_CPU))
    assert int(timeout_s) == find(render(ON_A_CPU), "Deployment", "rempart-router")["spec"]["progressDeadlineSeconds"]


def test_the_commands_inside_the_router_are_ours() -> None:
    (inside,) = re.findall(r"sh -c '([^']*)'", notes(ON_A_CPU))
    for command in inside.split(" && "):
        program, *args = shlex.split(command)
        assert program == "rempart"
        shown = CliRunner().invoke(app, [*args[:-1], "--help"])
        assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize("case", [ON_A_CPU, IN_KIND, EVERY, BY_INGRESS], ids=str)
def test_secrets_that_somebody_else_makes_are_asked_for(case: Case) -> None:
    manifests = render(case)
    made = {each["metadata"]["name"] for each in manifests if each["kind"] in {"Secret", "ExternalSecret"}}
    named = re.findall(
        r"'(?:secretName': '|secretKeyRef': \{'name': ')([^']+)'", str([pod for _, pod in pods(manifests)])
    )
    pulled = {each["name"] for _, pod in pods(manifests) for each in pod["spec"].get("imagePullSecrets", [])}
    asked = re.findall(r"get secret ([a-z -]+)$", notes(case), re.MULTILINE)
    assert {name for line in asked for name in line.split()} == {*named, *pulled} - made


def test_what_is_empty_may_be_null() -> None:
    """As it is after a values file took away what one before it gave."""
    needed = {"engines", "machines.cpu", "networkPolicy.objectStorage.to"}
    empty = set(empty_values(yaml.safe_load((CHART / "values.yaml").read_text()))) - needed
    assert {"images.pullSecrets", "tenants.plans"} < empty
    assert notes(IN_KIND, *(f"{path}=null" for path in sorted(empty)), "router.flags=null") == notes(IN_KIND)


def empty_values(values: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Paths of maps and lists without anything in them."""
    for name, value in values.items():
        if value in ({}, []):
            yield f"{at}{name}"
        elif isinstance(value, dict):
            yield from empty_values(value, f"{at}{name}.")


def test_public_names_and_what_is_open_are_told() -> None:
    assert "https://api.example.org/v1/completions" in notes(BY_INGRESS)
    assert "networkPolicy.redis" not in notes(BY_INGRESS)
    assert "narrow them when you know yours: networkPolicy.objectStorage." in notes(BY_INGRESS)
    assert "narrow them" not in notes(EVERY)


def test_requests_that_cannot_wait_for_a_start_from_zero_are_told() -> None:
    assert re.findall(r"^(\w+) starts from none in up to (\d+) s, .* (\d+) s at most", notes(EVERY), re.MULTILINE) == [
        ("llama", "1508", "600")
    ]
    assert "starts from none" not in notes(ON_A_CPU)


def test_the_built_in_redis_is_said_to_be_for_trials() -> None:
    assert "for trials" in notes(IN_KIND)
    assert "for trials" not in notes(ON_A_CPU)
