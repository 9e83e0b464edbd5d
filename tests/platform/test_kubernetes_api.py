"""Where the Kubernetes API is, and what its failures are called."""

import json
from pathlib import Path

import aiohttp
import pytest
from kubernetes_asyncio.client.exceptions import ApiException

from rempart_platform.cluster.kubernetes_api import KubernetesError, connect_kubernetes, reason_of


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither in a pod nor at home."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


async def test_a_kubeconfig_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:7"}}],
        "users": [{"name": "u", "user": {"token": "word"}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    async with connect_kubernetes() as client:
        assert client.configuration.host == "http://127.0.0.1:7"
        assert client.configuration.api_key["BearerToken"] == "Bearer word"


async def test_nothing_that_says_where_is_said_so() -> None:
    with pytest.raises(ValueError, match="no service account and no kubeconfig"):
        async with connect_kubernetes():
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", "current-context: none"])
async def test_a_kubeconfig_that_is_none_is_said_so(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(ValueError, match="kubeconfig"):
        async with connect_kubernetes():
            pass


async def test_a_pod_without_a_token_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(ValueError, match="token file does not exist"):
        async with connect_kubernetes():
            pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KubernetesError("garbage", ""), "garbage"),
        (ApiException(status=403), "403"),
        (TimeoutError(), "timeout"),
        (aiohttp.ClientConnectionError(), "connection"),
        (OSError(), "connection"),
    ],
)
def test_a_failure_has_one_of_few_reasons(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
