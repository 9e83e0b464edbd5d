"""Everything that dashboards, alerts and documents speak of is there on a platform in use."""

import tomllib
from pathlib import Path

import pytest
from tests.observe.dashboards import expressions
from tests.observe.metrics_page import Metric, documented
from tests.observe.prometheus import Prometheus
from tests.observe.promql import metric_of, selectors
from tests.observe.rule_files import rules

pytestmark = pytest.mark.e2e

NO_DATA = tomllib.loads(Path(__file__).with_name("no_data.toml").read_text())
_WITHIN_S = 60.0


def _is_excused(expr: str) -> bool:
    return any(selector in NO_DATA or metric_of(selector) in NO_DATA for selector in selectors(expr))


def test_every_expression_of_every_dashboard_gives_data(prometheus: Prometheus) -> None:
    asked = {each.expr: f"{each.dashboard}, {each.panel}" for each in expressions() if not _is_excused(each.expr)}
    missing = prometheus.without_data(list(asked), _WITHIN_S)
    assert not missing, "\n".join(f"{asked[expr]}: {expr}" for expr in missing)


def test_every_rule_reads_what_is_there(prometheus: Prometheus) -> None:
    asked = {selector: rule.name for rule in rules() for selector in selectors(rule.expr) if not _is_excused(selector)}
    missing = prometheus.without_data([f"last_over_time({each}[1h])" for each in asked], _WITHIN_S)
    assert not missing, missing


def test_every_recording_gives_data(prometheus: Prometheus) -> None:
    names = [rule.name for rule in rules() if not rule.is_alert]
    assert not prometheus.without_data(names, _WITHIN_S)


def test_no_alert_fires_on_a_healthy_platform(prometheus: Prometheus) -> None:
    # How fast first tokens come is up to the machine that tests.
    firing = prometheus.series('ALERTS{alertstate="firing", alertname!~"RempartFirstToken.+"}')
    assert [each["metric"] for each in firing] == []


def test_what_gives_data_is_no_exception(prometheus: Prometheus) -> None:
    listed = [each for each in NO_DATA if not each.startswith("ALERTS")]
    assert [each for each in listed if prometheus.series(f"last_over_time({each}[1h])")] == []
    assert all(each["reason"].endswith(".") for each in NO_DATA.values())


def test_the_page_of_metrics_names_what_is_exposed_and_nothing_else(exposed: list[Metric]) -> None:
    kinds = {metric.name: metric.kind for metric in exposed}
    page = {metric.name: metric.kind for metric in documented() if not NO_DATA.get(metric.name, {}).get("is_off")}
    assert page == kinds


def test_the_page_of_metrics_names_their_labels(exposed: list[Metric]) -> None:
    page = {metric.name: metric.labels for metric in documented()}
    told = {metric.name: metric.labels for metric in exposed if metric.has_samples}
    assert {name: page[name] for name in told} == told
