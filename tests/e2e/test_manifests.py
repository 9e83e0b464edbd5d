"""Router, engine and Redis, started with exactly what the chart's manifests say: they get ready, serve and drain."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELM = Path(sys.executable).with_name("helm")
IN_ITS_OWN_NETWORK = ("unshare", "--user", "--map-root-user", "--net", "--mount")
VALUES = ("deploy/providers/kind.yaml", "deploy/models/smollm2-cpu.yaml")

pytestmark = pytest.mark.timeout(600)


def rendered(path: Path) -> Path:
    """What `helm install` would send to a cluster."""
    files = [word for values in VALUES for word in ("-f", str(ROOT / values))]
    files += ["--set", "objectStorage.endpoint=http://127.0.0.1:9000"]  # one that knows buckets by path
    for component in ("router", "engineDefaults"):  # a busy machine may take minutes for streams of some words
        files += ["--set", f"{component}.drain.timeoutS=200"]
    command = [str(HELM), "template", "rempart", str(ROOT / "helm" / "rempart"), "--namespace", "rempart", *files]
    path.write_bytes(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return path


@pytest.fixture(scope="module")
def report(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of the pods; see node.py."""
    if subprocess.run([*IN_ITS_OWN_NETWORK, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this system lets nobody make a network and mounts of their own (unshare), as pods have them")
    folder = tmp_path_factory.mktemp("node")
    manifests = rendered(folder / "manifests.yaml")
    node = [sys.executable, "-m", "tests.e2e.node", str(manifests), str(smollm2), str(folder)]
    with (folder / "node.log").open("wb") as log:
        done = subprocess.run(
            [*IN_ITS_OWN_NETWORK, *node], check=False, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, timeout=580
        )
    assert done.returncode == 0, (folder / "node.log").read_text()[-6000:]
    return dict(json.loads(done.stdout))


def test_the_pods_get_ready_by_their_own_probes_and_serve(report: dict[str, Any]) -> None:
    assert set(report["ready_s"]) == {"engine", "router", "second-router"}
    assert "Paris" in report["answer"]


def test_helms_own_test_passes(report: dict[str, Any]) -> None:
    assert report["helm_test_exit_code"] == 0, report["logs"]


@pytest.mark.parametrize("pod", ["router", "engine"])
def test_a_pod_that_is_ended_fails_no_stream(report: dict[str, Any], pod: str) -> None:
    assert report["num_streams_at_sigterm"][pod] > 0, "otherwise this shows nothing"
    assert report["stream_tokens"][pod] == [96] * 4
    assert report["exit_codes"][pod] == 0
    assert report["was_unready_while_draining"][pod]
    assert report["within_grace"][pod]


def test_a_router_still_serves_before_it_is_terminated(report: dict[str, Any]) -> None:
    assert report["answered_in_pre_stop"]["router"]
