"""What the chart starts, and the files that it gives to it, are taken by what is started."""

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2
from redis.asyncio import Redis
from redis.exceptions import RedisError
from tests.chart.rendering import CHART, EVERY, MODELS, ROOT, SCALEWAY, Case, Manifest, find, pods, render

from rempart_engine import fetch
from rempart_engine.config import EngineConfig
from rempart_engine.manifest import write_manifest
from rempart_platform.config import RouterConfig
from rempart_platform.local.testing import FAKE_ENGINE, PlatformUnderTest, write_byte_model
from rempart_platform.tenancy.embedded import find_server
from rempart_platform.tenancy.tenants_file import read_seed
from rempart_protos.v1 import admin_pb2, batch_pb2, engine_pb2, inference_pb2

Renderings = Mapping[Case, tuple[Manifest, ...]]


def commands(renderings: Renderings, container: str) -> dict[tuple[str, ...], Manifest]:
    """Distinct command lines of containers of that name, and the pods that they are from."""
    found = {}
    for manifests in renderings.values():
        for _, pod in pods(manifests):
            for each in (*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]):
                if each["name"].startswith(container):
                    found[*each["command"], *each["args"]] = pod
    return found


def test_engines_take_their_command_lines(renderings: Renderings) -> None:
    lines = commands(renderings, "engine")
    assert len(lines) > len(MODELS)
    for line in lines:
        assert line[:3] == ("python", "-m", "rempart_engine")
        config = EngineConfig.from_args([arg.replace("$(ENGINE_CPUS)", "4") for arg in line[3:]])
        assert (config.port, config.metrics_port) == (50051, 50052)
        assert config.host in {"0.0.0.0", "::"}
        assert config.num_threads == 4


def test_routers_take_their_command_lines(renderings: Renderings) -> None:
    lines = commands(renderings, "router")
    assert len(lines) > len(MODELS)
    for line in lines:
        assert line[:3] == ("python", "-m", "rempart_platform")
        config = RouterConfig.from_args(line[3:])
        assert (config.http_port, config.grpc_port, config.metrics_port) == (8000, 8001, 8002)
        assert config.models


def test_a_router_finds_the_tokenizer_where_it_was_fetched_to(renderings: Renderings) -> None:
    for line, pod in commands(renderings, "router").items():
        mounts = [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
        fetched = [each["args"][1] for each in pod["spec"].get("initContainers", [])]
        for model in RouterConfig.from_args(line[3:]).models:
            assert str(model.path).startswith((*fetched, *(mount for mount in mounts if mount != "/models")))


@pytest.mark.parametrize(
    ("container", "files"),
    [
        ("fetch", {"config.json", "model.safetensors", "original/consolidated.00.pth", "model-q4.gguf"}),
        ("tokenizer", {"config.json"}),
    ],
)
def test_fetching_brings_what_the_container_needs(
    container: str, files: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    (source / "original").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "original/consolidated.00.pth", "model-q4.gguf"):
        (source / name).write_text(name)
    write_manifest(source, source / "manifest.json")
    case = Case((SCALEWAY, MODELS["llama-8b-l4"]))
    lines = commands({case: render(case)}, container)
    ((_, _, module, url, folder, *flags),) = lines
    assert (module, url) == ("rempart_engine.fetch", "s3://models/llama-3.1-8b")
    to = tmp_path / folder.lstrip("/")
    assert fetch.main([f"file://{source}", str(to), *flags]) == 0
    found = {path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file()}
    assert found == files | {"manifest.json"}


def test_the_tenants_file_is_one_and_reads_keys_from_files_that_are_mounted(tmp_path: Path) -> None:
    manifests = render(EVERY)
    text = find(manifests, "ConfigMap", "rempart-tenants")["data"]["tenants.json"]
    (router,) = find(manifests, "Deployment", "rempart-router")["spec"]["template"]["spec"]["containers"]
    (mounted,) = (mount["mountPath"] for mount in router["volumeMounts"] if mount["name"] == "secret-keys-of-tenants")
    key = f"rk_{'0' * 16}_{'1' * 64}"
    (tmp_path / "acme-ci").write_text(key + "\n")
    path = tmp_path / "tenants.json"
    path.write_text(text.replace(mounted, str(tmp_path)))
    seed = read_seed(path)
    assert seed.tenants["acme"].plan == "gold"
    assert seed.tenants["acme"].keys == {"ci": key}
    assert seed.tenants["acme"].limits.own.tokens_per_day == 5_000_000
    assert seed.plans.keys() == {"gold"}


async def test_the_built_in_redis_starts_with_its_files_and_lets_only_the_url_in(tmp_path: Path) -> None:
    manifests = render(EVERY, 'redis={"mode": "builtIn"}', 'externalSecrets.redisKey=""')
    secret = find(manifests, "Secret", "rempart-redis")
    (container,) = find(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    password = tmp_path / "password.conf"
    password.write_bytes(_decoded(secret["data"]["password.conf"]))
    configuration = tmp_path / "server.conf"
    text = find(manifests, "ConfigMap", "rempart-redis")["data"]["server.conf"]
    configuration.write_text(
        text.replace("/run/secrets/redis/password.conf", str(password)).replace("dir /data", f"dir {tmp_path}")
    )
    assert container["command"][1] == "/etc/redis/server.conf"
    socket = tmp_path / "s"
    server = await asyncio.create_subprocess_exec(
        find_server(), configuration, "--port", "0", "--unixsocket", socket, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        while b"Ready to accept connections" not in (line := await server.stdout.readline()):
            assert line, "the server has ended"
        url = _decoded(secret["data"]["REMPART_REDIS_URL"]).decode()
        redis = Redis(unix_socket_path=str(socket), password=url.split(":")[2].split("@")[0])
        settings = await redis.config_get("append*", "maxmemory*")
        assert settings | {"appendonly": "yes", "maxmemory-policy": "noeviction", "maxmemory": "805306368"} == settings
        await redis.aclose()
        stranger = Redis(unix_socket_path=str(socket))
        with pytest.raises(RedisError, match=r"(?i)authenticat"):
            await stranger.ping()
        await stranger.aclose()
    finally:
        server.terminate()
        await server.communicate()


def _decoded(text: str) -> bytes:
    return base64.b64decode(text)


def test_the_public_grpc_services_exist_and_admin_is_not_among_them() -> None:
    (rule,) = find(render(EVERY), "GRPCRoute")["spec"]["rules"]
    public = {match["method"]["service"] for match in rule["matches"]}
    ours = {
        service.full_name
        for file in (inference_pb2, batch_pb2, admin_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    }
    admin = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
    assert public == ours - {admin} | {health_pb2.DESCRIPTOR.services_by_name["Health"].full_name}


def test_every_public_path_has_a_route_and_health_is_for_the_cluster() -> None:
    (rule,) = find(render(EVERY), "HTTPRoute")["spec"]["rules"]
    public = tuple(match["path"]["value"] for match in rule["matches"])
    routes = re.findall(r'Route\("(/[^"{]*)', (ROOT / "platform/rempart_platform/apis/openai.py").read_text())
    assert {path for path in routes if not path.startswith(public)} == {"/health", "/readyz", "/livez"}


def test_probes_ask_for_services_that_exist(renderings: Renderings) -> None:
    known = {engine_pb2.DESCRIPTOR.services_by_name["Engine"].full_name}
    known.add(inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name)
    asked = {
        container[probe]["grpc"].get("service", "")
        for manifests in renderings.values()
        for _, pod in pods(manifests)
        for container in pod["spec"]["containers"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        if "grpc" in container.get(probe, {})
    }
    assert asked == known | {""}


@pytest.mark.e2e
def test_helm_test_gets_a_token_from_a_platform(tmp_path: Path) -> None:
    """Against an engine that speaks at once: what is tested is the script."""
    (container,) = find(render(EVERY), "Pod")["spec"]["containers"]
    assert container["command"] == ["python", "/test/first_token.py"]
    script = find(render(EVERY), "ConfigMap", "rempart-test")["data"]["first_token.py"]
    assert script == (CHART / "files" / "first_token.py").read_text()
    wanted = {variable["name"] for variable in container["env"]} - {"HOME"}
    path = tmp_path / "first_token.py"
    path.write_text(script)
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with PlatformUnderTest(
        *("--model", str(write_byte_model(tmp_path)), "--served-model-name", "smol", "--engine-module", FAKE_ENGINE),
        environ={**os.environ, "PATH": search},
        log_path=tmp_path / "log",
    ) as platform:
        platform.wait_until_ready()
        environ = {**platform.environ, "REMPART_HTTP": platform.http, "REMPART_MODEL": "smol"}
        assert wanted <= environ.keys()
        for _ in range(2):  # the tenant is there the second time
            done = subprocess.run(
                [sys.executable, str(path)], env=environ, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["usage"]["completion_tokens"] == 1
        refused = subprocess.run(
            [sys.executable, str(path)],
            env=environ | {"REMPART_MODEL": "none"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert refused.returncode == 1
        assert "none" in refused.stderr
