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

from rempart_platform.local.demo_model import DEMO_MODEL_NAME
from rempart_platform.local.testing import PlatformUnderTest

_LONG_PROMPT = "The archive keeps what was decided, by whom, and why. " * 16
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
    folder, limited_key = tmp_path_factory.mktemp("prometheus"), _limited_key(platform)
    targets = {"router": urlsplit(platform.metrics).netloc, "engine": urlsplit(platform.engine_metrics_url()).netloc}
    with running_prometheus(folder, targets) as prometheus:
        _use(platform, limited_key)
        prometheus.wait_for_scrapes(len(targets))
        _use(platform, limited_key)  # growth is seen only of series that were there before
        _run_a_batch(platform, folder / "batch.jsonl")
        yield prometheus


@pytest.fixture(scope="session")
def exposed(platform: PlatformUnderTest, prometheus: Prometheus) -> list[Metric]:
    """What router and engine tell after some use."""
    return [*told(platform.metrics), *told(platform.engine_metrics_url())]


def _limited_key(platform: PlatformUnderTest) -> str:
    """Of a tenant that has one request a minute."""
    platform.cli("tenant", "create", "limited", "--requests-per-minute", "1")
    return str(json.loads(platform.cli("key", "issue", "limited", "--json").stdout)["key"])


def _use(platform: PlatformUnderTest, limited_key: str) -> None:
    """Two tenants ask, one of whom soon has no quota left."""
    assert [_ask(platform, platform.api_key) for _ in range(2)] == [200, 200]
    assert [_ask(platform, limited_key) for _ in range(2)][-1] == 429


def _run_a_batch(platform: PlatformUnderTest, file: Path) -> None:
    """Of one line."""
    body = {"model": DEMO_MODEL_NAME, "prompt": "Hello", "max_tokens": 1}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    file.write_text(json.dumps(line) + "\n")
    ran = platform.cli("batch", "run", str(file), "--output", str(file.with_suffix(".out")))
    assert ran.returncode == 0, ran.stderr


def _ask(platform: PlatformUnderTest, key: str) -> int:
    body = {"model": DEMO_MODEL_NAME, "prompt": _LONG_PROMPT, "max_tokens": 4}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{platform.http}/v1/completions", json=body, headers=headers, timeout=60).status_code
