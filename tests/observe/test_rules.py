"""Every rule is sound, and every alert fires when it should and is silent when it should."""

from itertools import groupby

import pytest
import yaml
from tests.observe.rule_files import RULE_TESTS, RULES, Rule, alerts, promtool, rules

ALERTS = alerts()


def test_prometheus_takes_all_rules() -> None:
    promtool("check", "rules", *sorted(RULES.glob("*.yaml")))


def test_names_are_given_once() -> None:
    names = [rule.name for rule in rules()]
    assert len(set(names)) == len(names)


def test_there_are_tests_for_alerts_alone() -> None:
    assert {path.stem for path in RULE_TESTS.glob("*.yaml")} == {alert.name for alert in ALERTS}


def test_tests_of_alerts_pass() -> None:
    promtool("test", "rules", *sorted(RULE_TESTS.glob("*.yaml")))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_is_seen_to_fire_and_to_stay_silent(alert: Rule) -> None:
    tests = yaml.safe_load((RULE_TESTS / f"{alert.name}.yaml").read_text())["tests"]
    asked = [each for test in tests for each in test["alert_rule_test"]]
    assert {each["alertname"] for each in asked} == {alert.name}
    assert {bool(each.get("exp_alerts")) for each in asked} == {True, False}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_says_what_whoever_is_woken_must_know(alert: Rule) -> None:
    assert alert.file.stem == alert.name
    assert alert.labels["severity"] in ("critical", "warning")
    assert alert.annotations.keys() == {"runbook", "summary", "description"}
    assert alert.annotations["runbook"] == alert.name


def test_a_file_holds_one_alert_or_recordings_alone() -> None:
    for file, of_file in groupby(rules(), lambda rule: rule.file):
        are_alerts = [rule.is_alert for rule in of_file]
        assert are_alerts == [True] or not any(are_alerts)
        assert file.name.startswith("recording-") != are_alerts[0]
