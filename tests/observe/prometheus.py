"""A real Prometheus for tests: on a free port, in a folder of its own, bounded, gone when the block is left."""

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from tests.observe.rule_files import RULES, tool
from tests.ports import free_ports

_START_S = 60.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running one."""

    url: str

    def series(self, expr: str) -> list[dict[str, object]]:
        """The series that an expression gives now. Fails when it is no expression."""
        query = urllib.parse.urlencode({"query": expr})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=60) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        result = answer["data"]["result"]
        assert isinstance(result, list)
        return result

    def without_data(self, exprs: Sequence[str], within_s: float) -> list[str]:
        """Those that give nothing, although asked again and again for that long."""
        missing, deadline = list(exprs), time.monotonic() + within_s
        while True:
            missing = [expr for expr in missing if not self.series(expr)]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(_POLL_S)

    def wait_for_scrapes(self, num_targets: int) -> None:
        """Returns when all targets have been scraped that were there when this was called."""
        scraped = f"count(timestamp(up == 1) > {time.time()}) == {num_targets}"
        assert not self.without_data([scraped], _START_S)


@contextmanager
def running_prometheus(folder: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """Scrapes and evaluates all rules every second.

    Args:
        folder: gets its files.
        targets: job -> host:port.
    """
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES / "*.yaml")],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{next(free_ports())}"
    command = [
        str(tool("prometheus")),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--storage.tsdb.retention.time=1h",
        "--storage.tsdb.retention.size=64MB",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with (folder / "prometheus.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            _wait_until_ready(f"http://{address}/-/ready", folder / "prometheus.log")
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()


def _wait_until_ready(url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:  # it does not listen yet, or it answers 503
            time.sleep(_POLL_S)
    raise AssertionError(f"it is not ready: {log.read_text()}")
