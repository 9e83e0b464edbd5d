"""Rules, dashboards and autoscalers: what is rendered is what the files say, and Prometheus understands it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.chart.rendering import CHART, EVERY, EVERYTHING, KUBERNETES, Case, Manifest, find, render
from tests.observe.rule_files import promtool

RULES = sorted((CHART / "rules").glob("*.yaml"))
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
EXCLUDED = "RempartCertificateExpiry"


def rules_of(manifests: tuple[Manifest, ...]) -> dict[str, Any]:
    """The groups of every PrometheusRule, by its name."""
    return {each["metadata"]["name"]: each["spec"]["groups"] for each in manifests if each["kind"] == "PrometheusRule"}


def require_rules(groups: list[Any], path: Path) -> None:
    """Prometheus itself takes them."""
    path.write_text(yaml.safe_dump({"groups": groups}))
    promtool("check", "rules", path)


def test_each_file_of_rules_is_an_object_and_keeps_what_it_says() -> None:
    rendered = rules_of(render(EVERY))
    assert len(rendered) == len(RULES) - 1
    for path in RULES:
        if path.stem == EXCLUDED:
            continue
        expected = yaml.safe_load(path.read_text())["groups"]
        for group in expected:
            for rule in group["rules"]:
                if "runbook" in rule.get("annotations", {}):
                    page = rule["annotations"]["runbook"]
                    rule["annotations"]["runbook_url"] = f"https://wiki.example.org/runbook/{page}.md"
        assert rendered[f"rempart-{path.stem.lower()}"] == expected


def test_every_alert_has_a_page(tmp_path: Path) -> None:
    groups = [group for groups in rules_of(render(EVERY)).values() for group in groups]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert alerts
    assert all(rule["annotations"]["runbook_url"].startswith("https://wiki.example.org/") for rule in alerts)
    require_rules(groups, tmp_path / "rules.yaml")


def test_each_dashboard_is_a_config_map_that_grafana_finds() -> None:
    maps = [each for each in render(EVERY) if each["metadata"].get("labels", {}).get("grafana_dashboard") == "1"]
    rendered = {name: text for each in maps for name, text in each["data"].items()}
    assert rendered == {
        path.name: path.read_text().replace("docs/runbook/", "https://wiki.example.org/runbook/") for path in DASHBOARDS
    }
    assert all(json.loads(text)["uid"] for text in rendered.values())
    assert all(len(json.dumps(each)) < 1_000_000 for each in maps)


@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_scaling_asks_what_prometheus_understands(kubernetes: str, tmp_path: Path) -> None:
    triggers = find(render(Case((EVERYTHING,), kubernetes)), "ScaledObject")["spec"]["triggers"]
    rules = [{"record": f"x:{each['name']}", "expr": each["metadata"]["query"]} for each in triggers]
    require_rules([{"name": "scaling", "rules": rules}], tmp_path / "rules.yaml")


def test_scaling_to_zero_is_driven_by_what_routers_tell() -> None:
    spec = find(render(EVERY), "ScaledObject")["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 6)
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "rempart-engine-llama"}
    waking = [each for each in spec["triggers"] if each["metadata"].get("activationThreshold") == "0"]
    of_llama = '{namespace="llm",model="llama-3.1-8b"}'
    assert [each["metadata"]["query"] for each in waking] == [
        f"sum(rempart_model_waiting_tokens{of_llama}) + sum(rempart_model_running_tokens{of_llama})",
        f"sum(rempart_requests_held{of_llama})",
    ]
    # Routers that cannot be asked must not look like routers without work.
    assert all(each["metadata"]["ignoreNullValues"] == "false" for each in waking)
    (tokens, _, cache) = spec["triggers"]
    assert tokens["metadata"]["threshold"] == "40000"
    assert cache["metadata"]["threshold"] == "0.85"
    # Another engine of the model must neither grow this one nor keep it from zero.
    assert 'engine="llama"' in cache["metadata"]["query"]
    assert find(render(EVERY), "PodMonitor")["spec"]["podMetricsEndpoints"][0]["relabelings"] == [
        {"sourceLabels": ["__meta_kubernetes_pod_label_rempart_engine"], "targetLabel": "engine"}
    ]
    assert cache["metadata"]["ignoreNullValues"] == "true"


def test_a_horizontal_autoscaler_divides_sums_and_compares_means() -> None:
    """Its `AverageValue` is the metric by the replicas: of a mean, that would shrink with every replica."""
    metrics = find(render(EVERY), "HorizontalPodAutoscaler")["spec"]["metrics"]
    targets = {each["external"]["metric"]["name"]: each["external"]["target"] for each in metrics}
    assert targets == {
        "rempart_model_tokens": {"type": "AverageValue", "averageValue": "100000"},
        "rempart_model_cache_use": {"type": "Value", "value": "700m"},
    }
    recorded = {rule["record"]: rule["expr"] for rule in _recordings("recording-autoscaling")}
    assert recorded["rempart:model_tokens:sum"].startswith("sum by (namespace, model)")
    assert recorded["rempart:kv_usage:avg"].startswith("avg by (namespace, model)")


def _recordings(name: str) -> list[dict[str, str]]:
    (group,) = yaml.safe_load((CHART / "rules" / f"{name}.yaml").read_text())["groups"]
    return list(group["rules"])


@pytest.mark.parametrize("name", ["", "llm"])
def test_the_alert_on_certificates_finds_ours_whatever_the_release_is_called(name: str) -> None:
    certificate = find(render(EVERY, f'fullnameOverride="{name}"'), "Certificate")
    (group,) = yaml.safe_load((CHART / "rules" / f"{EXCLUDED}.yaml").read_text())["groups"]
    (pattern,) = re.findall(r'name=~"([^"]*)"', group["rules"][0]["expr"])
    assert re.fullmatch(pattern, certificate["metadata"]["name"])


def test_monitors_find_the_ports_of_routers_and_engines() -> None:
    manifests = render(EVERY)
    service = find(manifests, "Service", "rempart-router-metrics")
    monitor = find(manifests, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert [each["port"] for each in monitor["endpoints"]] == [each["name"] for each in service["spec"]["ports"]]
    others = [each for each in manifests if each["kind"] == "Service" and each is not service]
    for other in others:
        assert not monitor["selector"]["matchLabels"].items() <= other["metadata"]["labels"].items()
    pod = find(manifests, "Deployment", "rempart-engine-llama")["spec"]["template"]
    monitor = find(manifests, "PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    assert {each["port"] for each in monitor["podMetricsEndpoints"]} <= ports
