"""A whole platform with the real model, in use, and a real Prometheus that watches it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from tests.observe.metrics_page import Metric, told
from tests.observe.prometheus import Prometheus, running_prometheus

from rempart_platform.demo_model import DEMO_MODEL_NAME
from rempart_platform.local_testing import PlatformUnderTest

_LONG_PROMPT = "The archive keeps what was decided, by whom, and why. " * 40
"""Of several KV blocks, so that a second request finds some in the prefix cache."""


@pytest.fixture(scope="session")
def platform(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlatformUnderTest]:
    """`rempart up` as people run it."""
    folder = tmp_path_factory.mktemp("up")
    (folder / "tmp").mkdir()
    environ = {**os.environ, "TMPDIR": str(folder / "tmp")}
    with PlatformUnderTest(environ=environ, log_path=folder / "up.log") as platform:
        platform.wait_until_ready()
        yield platform


@pytest.fixture(scope="session")
def prometheus(platform: PlatformUnderTest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Watches the platform before, while and after it is used."""
    targets = {"router": urlsplit(platform.metrics).netloc, "engine": urlsplit(platform.engine_metrics_url()).netloc}
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), targets) as prometheus:
        _use(platform)
        assert not prometheus.without_data(['sum(rempart_router_requests_total{outcome="ok"}) > 1'], within_s=20)
        _use(platform)  # growth is seen only of series that were there before
        yield prometheus


@pytest.fixture(scope="session")
def exposed(platform: PlatformUnderTest, prometheus: Prometheus) -> list[Metric]:
    """What router and engine tell after some use."""
    return [*told(platform.metrics), *told(platform.engine_metrics_url())]


def _use(platform: PlatformUnderTest) -> None:
    """Answers to two tenants, one of whom soon has no quota left."""
    if "limited" not in platform.cli("tenant", "list", "--json").stdout:
        platform.cli("tenant", "create", "limited", "--requests-per-minute", "1")
    key = json.loads(platform.cli("key", "issue", "limited", "--json").stdout)["key"]
    statuses = [_ask(platform, each) for each in (platform.api_key, platform.api_key, key, key)]
    assert statuses[:2] == [200, 200]
    assert statuses[3] == 429


def _ask(platform: PlatformUnderTest, key: str) -> int:
    body = {"model": DEMO_MODEL_NAME, "prompt": _LONG_PROMPT, "max_tokens": 4}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{platform.http}/v1/completions", json=body, headers=headers, timeout=60).status_code
