"""Secrets are made once: what is in the cluster is found by an upgrade and left as it is."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from tests.chart.rendering import BY_INGRESS, CHART, Manifest, find, helm, render

SETS = ('redis.mode="builtIn"', 'redis.existingSecret=""', 'secrets.existingSecret=""')


def known_kinds() -> dict[str, Manifest]:
    """Answers that let helm find every kind of the chart, by path."""
    resources: dict[str, dict[str, Manifest]] = {"v1": {}}
    for each in render(BY_INGRESS, *SETS):
        kind = each["kind"]
        resources.setdefault(each["apiVersion"], {})[kind] = {
            "name": f"{kind.lower()}s",
            "kind": kind,
            "namespaced": "namespace" in each["metadata"],
            "verbs": ["get"],
        }
    groups = [
        {"name": group, "versions": [{"groupVersion": f"{group}/{version}", "version": version}]}
        for group, _, version in (name.partition("/") for name in resources if name != "v1")
    ]
    answers: dict[str, Manifest] = {
        "/version": {"major": "1", "minor": "35", "gitVersion": "v1.35.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
    }
    return answers | {
        f"/{'api' if name == 'v1' else 'apis'}/{name}": {
            "kind": "APIResourceList",
            "groupVersion": name,
            "resources": list(kinds.values()),
        }
        for name, kinds in resources.items()
    }


class Cluster(ThreadingHTTPServer):
    """Holds Secrets of one namespace."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.known = known_kinds()
        self.secrets: dict[str, Manifest] = {}

    def install(self, secrets: dict[str, Manifest]) -> None:
        """Keeps them as helm does, with a note of who owns them; they stay when the release is uninstalled."""
        owner = {"meta.helm.sh/release-name": "rempart", "meta.helm.sh/release-namespace": "llm"}
        for name, secret in secrets.items():
            annotations = secret["metadata"]["annotations"] | owner
            self.secrets[name] = secret | {"metadata": secret["metadata"] | {"annotations": annotations}}


class _Answer(BaseHTTPRequestHandler):
    server: Cluster

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        found = self.server.known.get(path) or self.server.secrets.get(
            path.removeprefix("/api/v1/namespaces/llm/secrets/")
        )
        body = json.dumps(found or {"kind": "Status", "apiVersion": "v1", "reason": "NotFound", "code": 404}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing to say."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        serving = threading.Thread(target=cluster.serve_forever)
        serving.start()
        yield cluster
        cluster.shutdown()
        serving.join()


def secrets_made_in(cluster: Cluster, tmp_path: Path) -> dict[str, Manifest]:
    """What `helm upgrade` would send to this cluster."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{cluster.server_port}"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        "users": [{"name": "c", "user": {}}],
        "current-context": "c",
    }
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config))
    done = helm(
        *(
            "template",
            "rempart",
            str(CHART),
            "--namespace=llm",
            "--dry-run=server",
            "--disable-openapi-validation",
            f"--kubeconfig={kubeconfig}",
        ),
        *(f"--values={path}" for path in BY_INGRESS.values),
        *(f"--set-json={each}" for each in SETS),
    )
    assert done.returncode == 0, done.stderr
    manifests = [each for each in yaml.safe_load_all(done.stdout) if each]
    return {name: find(manifests, "Secret", name) for name in ("rempart", "rempart-redis")}


def test_an_upgrade_keeps_every_secret(cluster: Cluster, tmp_path: Path) -> None:
    installed = secrets_made_in(cluster, tmp_path)
    assert secrets_made_in(cluster, tmp_path)["rempart"]["data"] != installed["rempart"]["data"]
    cluster.install(installed)
    upgraded = secrets_made_in(cluster, tmp_path)
    assert {name: each["data"] for name, each in upgraded.items()} == {
        name: each["data"] for name, each in installed.items()
    }


def test_secrets_are_long_apart_and_kept_when_the_release_goes(cluster: Cluster, tmp_path: Path) -> None:
    made = secrets_made_in(cluster, tmp_path)
    values = [base64.b64decode(each).decode() for each in made["rempart"]["data"].values()]
    values.append(base64.b64decode(made["rempart-redis"]["data"]["password"]).decode())
    assert len(set(values)) == 4
    assert all(len(value) >= 43 for value in values)
    assert all(each["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for each in made.values())


def test_a_secret_that_lacks_a_key_is_completed(cluster: Cluster, tmp_path: Path) -> None:
    installed = secrets_made_in(cluster, tmp_path)
    pepper = installed["rempart"]["data"].pop("REMPART_KEY_PEPPER")
    cluster.install(installed)
    completed = secrets_made_in(cluster, tmp_path)["rempart"]["data"]
    assert completed.keys() == {"REMPART_ADMIN_KEY", "REMPART_KEY_PEPPER", "REMPART_CACHE_SECRET"}
    assert completed["REMPART_KEY_PEPPER"] != pepper
    assert completed["REMPART_ADMIN_KEY"] == installed["rempart"]["data"]["REMPART_ADMIN_KEY"]
