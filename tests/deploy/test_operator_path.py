"""The README's way from an empty cluster to the first token: every command is run, as far as that needs no cluster.

`rempart`, helm and kubectl are the real ones: `helm install` renders what it would install, `kubectl create` what it
would create. What asks the cluster for something by name must name what was rendered; what runs in a pod must be a
command line that the program takes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Writes its own call down, as one JSON line; kubectl and helm also what they would have sent to the cluster.
RECORD = """#!{python}
import json, os, subprocess, sys
name, args = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, *args]) + "\\n")
if name == "kubectl" and "create" in args and "exec" not in args:
    command = ["{bin}/kubectl", *args, "--dry-run=client", "-o", "yaml"]
elif name == "helm" and args[0] == "install":
    command = ["{bin}/helm", "template", *args[1:]]
else:
    sys.exit(0)
with open(os.environ["SENT"], "ab") as sent:
    sent.write(b"---\\n")
    sent.write(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
"""


def operator_path() -> str:
    """The block of commands."""
    section = (ROOT / "README.md").read_text().partition("## On a cluster")[2]
    return section.partition("```sh\n")[2].partition("```")[0]


class Run:
    """What the commands did.

    Args:
        calls: each, by its words.
        sent: objects that would be in the cluster.
    """

    def __init__(self, calls: list[list[str]], sent: list[dict[str, Any]]) -> None:
        self._calls = calls
        self.sent = sent

    def of(self, *words: str) -> list[list[str]]:
        """Calls that hold these words, in this order."""
        pattern = re.compile(".*".join(rf"\b{re.escape(word)}\b" for word in words))
        return [call for call in self._calls if pattern.search(" ".join(call))]

    def names(self, kind: str) -> set[str]:
        return {each["metadata"]["name"] for each in self.sent if each["kind"] == kind}


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("operator")
    programs = folder / "bin"
    programs.mkdir()
    for name in ("docker", "kind", "aws", "kubectl", "helm", "curl"):
        (programs / name).write_text(RECORD.format(python=sys.executable, bin=BIN))
        (programs / name).chmod(0o755)
    (folder / "weights").mkdir()
    shutil.copy(smollm2, folder / "weights" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    commands = operator_path().replace("WEIGHTS=./weights", f"WEIGHTS={folder}/weights").replace(".venv/bin", str(BIN))
    environ = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(folder / "calls"),
        "SENT": str(folder / "sent.yaml"),
        **{name: "secret-of-the-operator" for name in ("S3_KEY", "S3_SECRET", "REMPART_API_KEY")},
    }
    subprocess.run(["bash", "-euc", commands + "\nwait"], check=True, cwd=ROOT, env=environ, stdout=subprocess.PIPE)
    calls = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    sent = [each for each in yaml.safe_load_all((folder / "sent.yaml").read_text()) if each]
    assert (folder / "weights" / "manifest.json").exists()
    return Run(calls, sent)


def test_the_images_that_are_built_are_pushed_and_run(run: Run) -> None:
    dockerfile = (ROOT / "deploy" / "images" / "Dockerfile").read_text()
    built = {call[call.index("-t") + 1]: call[call.index("--target") + 1] for call in run.of("docker", "build")}
    assert set(built) == {call[-1] for call in run.of("kind", "load", "docker-image")}
    assert all(f" AS {target}\n" in dockerfile for target in built.values())
    text = json.dumps(run.sent)
    assert all(json.dumps(image) in text for image in built)


def test_the_weights_are_where_the_engine_fetches_them_from(run: Run) -> None:
    (sync,) = run.of("aws", "sync")
    (target,) = (word for word in sync if word.startswith("s3://"))
    (engine,) = (each for each in run.sent if each["kind"] == "Deployment" and "engine" in each["metadata"]["name"])
    (fetch,) = engine["spec"]["template"]["spec"]["initContainers"]
    assert fetch["args"][0] == target
    assert "--model=/weights/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" in str(engine)


def test_the_secrets_that_pods_need_are_made(run: Run) -> None:
    text = json.dumps(run.sent, sort_keys=True)
    needed = set(re.findall(r'"secretKeyRef": {"key": "\w+", "name": "([\w-]+)"', text))
    assert needed <= run.names("Secret")
    assert "rempart-object-storage" in needed
    (made,) = (each for each in run.sent if each["metadata"]["name"] == "rempart-object-storage")
    assert set(made["data"]) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def test_what_is_asked_of_the_cluster_is_there(run: Run) -> None:
    assert run.names("Namespace") == {"rempart"}
    asked = {word for call in run.of("kubectl") for word in call if word.startswith(("deployment/", "service/"))}
    assert asked == {"deployment/rempart-router", "service/rempart-router"}
    assert "rempart-router" in run.names("Deployment") & run.names("Service")
    assert all("rempart" in call for call in run.of("helm"))
    assert [each for each in run.sent if "helm.sh/hook" in each["metadata"].get("annotations", {})]


def test_what_is_run_in_the_router_is_a_command_line_that_it_takes(run: Run) -> None:
    lines = [call[call.index("--") + 1 :] for call in run.of("kubectl", "exec")]
    assert [line[:3] for line in lines] == [["rempart", "tenant", "create"], ["rempart", "key", "issue"]]
    for line in lines:
        nowhere = ["--address", "127.0.0.1:1", "--admin-key", "k" * 16]
        done = subprocess.run(
            [BIN / line[0], *line[1:], *nowhere], check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1, done.stderr  # 2 would be a command line that it does not take
        assert "127.0.0.1:1" in done.stderr


def test_the_first_token_is_asked_for_by_the_name_that_is_served(run: Run) -> None:
    ((*_, body),) = run.of("curl")
    assert f"--served-model-name={json.loads(body)['model']}" in str(run.sent)
    assert "http://127.0.0.1:8000/v1/completions" in run.of("curl")[0]
    assert run.of("kubectl", "port-forward", "8000")
