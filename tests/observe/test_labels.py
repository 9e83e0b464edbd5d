"""Labels of ours and those that scraping adds do not take each other's place."""

import yaml
from tests.observe.metrics_page import documented
from tests.observe.rule_files import ROOT

_OF_SCRAPING = {"instance", "job", "namespace", "pod", "container", "endpoint", "service", "node"}
"""What Prometheus and its operator add to every series of a target."""


def test_a_label_that_scraping_would_take_is_kept() -> None:
    taken = {metric.name for metric in documented() if metric.labels & _OF_SCRAPING}
    assert taken
    assert all(name.startswith("rempart_router_endpoint_") for name in taken)
    (router,) = [
        document
        for document in yaml.safe_load_all((ROOT / "tests/chart/golden/everything.yaml").read_text())
        if document["kind"] == "ServiceMonitor"
    ]
    assert all(endpoint["honorLabels"] for endpoint in router["spec"]["endpoints"])
