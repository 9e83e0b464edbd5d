"""Values that cannot work are refused before anything is sent to a cluster, and the message names the value."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from tests.chart.rendering import BY_INGRESS, CHART, EVERY, IMAGE_VOLUME, Case, find, helm, refusal, render

from rempart_platform.chat.format import CHAT_FORMATS

BASE = BY_INGRESS
FULL = EVERY
OLD = Case((IMAGE_VOLUME,), "1.32")
SMALL = "engines.smollm2"


def claim(access_mode: str, source: str = "s3://models/smollm2") -> str:
    weights = {"from": "claim", "source": source, "claim": {"name": "models", "accessMode": access_mode}}
    return f"{SMALL}.weights={json.dumps(weights)}"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ('routr={"replicas": 2}', "'routr' not allowed"),
        ("router.replica=2", "'replica' not allowed"),
        ('router.replicas="2"', "/router/replicas"),
        ("router.replicas=0", "/router/replicas"),
        ('router.discovery="static"', "/router/discovery"),
        ("router.holdWithoutEngineS=-1", "/router/holdWithoutEngineS"),
        ('router.flags={"Host": "x"}', "/router/flags"),
        ('router.flags={"max-attempts": [1]}', "/router/flags/max-attempts"),
        ('router.service.type="ExternalName"', "/router/service/type"),
        ('router.service.sourceRanges=["everybody"]', "/router/service/sourceRanges/0"),
        ('router.batchStore="https://s3"', "/router/batchStore"),
        ('router.aliases={"a": "smollm2:0.5"}', "/router/aliases/a"),
        ('router.oidc.issuer="http://plain"', "/router/oidc/issuer"),
        ('router.tolerations=[{"operator": "Maybe"}]', "/router/tolerations/0/operator"),
        ('images.router.tag="latest"', "/images/router/tag"),
        ('images.router.digest="sha256:short"', "/images/router/digest"),
        ('images.pullPolicy="Sometimes"', "/images/pullPolicy"),
        ('listenAddress="127.0.0.1"', "/listenAddress"),
        ('engines={"Big_Model": {"model": {"name": "x"}}}', "'Big_Model' not allowed"),
        ('engines.other={"machine": "cpu"}', "/engines/other"),
        (f'{SMALL}.model.name="two words"', "/engines/smollm2/model/name"),
        (f'{SMALL}.model.chatFormat="alpaca"', "/engines/smollm2/model/chatFormat"),
        (f"{SMALL}.replicas=-1", "/engines/smollm2/replicas"),
        (f"{SMALL}.nodes=0", "/engines/smollm2/nodes"),
        (f'{SMALL}.role="both of them"', "/engines/smollm2/role"),
        (f"{SMALL}.parallel.tensors=2", "/engines/smollm2/parallel"),
        (f'{SMALL}.weights.from="nfs"', "/engines/smollm2/weights/from"),
        (f'{SMALL}.weights.source="http://x"', "/engines/smollm2/weights/source"),
        (f"{SMALL}.weights.sizeGiB=0", "/engines/smollm2/weights/sizeGiB"),
        (f'{SMALL}.weights.hostPath="relative"', "/engines/smollm2/weights/hostPath"),
        (f'{SMALL}.weights.claim.accessMode="RWX"', "/engines/smollm2/weights/claim/accessMode"),
        (f'{SMALL}.resources.limits.memory="4 GB"', "/engines/smollm2/resources/limits/memory"),
        (f"{SMALL}.drain.timeoutS=0", "/engines/smollm2/drain/timeoutS"),
        (f"{SMALL}.autoscaling.cacheUse=85", "/engines/smollm2/autoscaling/cacheUse"),
        (f"{SMALL}.autoscaling.maxReplicas=0", "/engines/smollm2/autoscaling/maxReplicas"),
        ('machines.l4.image="rocm"', "/machines/l4/image"),
        ("startupBudget.loadMiBPerS=0", "/startupBudget/loadMiBPerS"),
        ('redis.mode="cluster"', "/redis/mode"),
        ('redis.builtIn.maxMemory="1 GB"', "/redis/builtIn/maxMemory"),
        ('secrets.adminKey="hunter2hunter2hunter2"', "'adminKey' not allowed"),
        ('tenants.plans.gold={"request_per_minute": 1}', "/tenants/plans/gold"),
        ('tenants.tenants.acme={"money_per_day": 3}', "/tenants/tenants/acme/money_per_day"),
        ('tenants.tenants.acme.keys={"ci": "rk_0123456789abcdef"}', "/tenants/tenants/acme/keys/ci"),
        ('tenants.tenants.acme.keys.ci.from_file="/tmp/key"', "/tenants/tenants/acme/keys/ci/from_file"),
        ('hosts.http="https://api.example.org"', "/hosts/http"),
        ('metrics.interval="often"', "/metrics/interval"),
        ("networkPolicy.clients=[{}]", "/networkPolicy/clients/0"),
        ("networkPolicy.redis.ports=[0]", "/networkPolicy/redis/ports/0"),
        ("networkPolicy.objectStorage.ports=[]", "/networkPolicy/objectStorage/ports"),
        ('topologySpread.zone="Never"', "/topologySpread/zone"),
    ],
)
def test_the_schema_refuses(wrong: str, named: str) -> None:
    assert named in refusal(BASE, wrong)


@pytest.mark.parametrize(
    ("case", "wrong", "named"),
    [
        (BASE, ("engines=null",), "engines: name at least one"),
        (BASE, ('images.registry=""',), "images.registry:"),
        (BASE, (f'{SMALL}.machine="tpu"',), "engines.smollm2.machine:"),
        (BASE, (f'engines.{"x" * 45}={{"model": {{"name": "x"}}}}',), "52 characters"),
        (BASE, ('router.aliases={"a": "smollm2:9,other:1"}',), 'router.aliases.a: no engine serves "other"'),
        (BASE, ('router.aliases={"smollm2": "smollm2"}',), "router.aliases.smollm2: is the name of a model"),
        (FULL, ('tenants.prices.models.canary={"input": "1"}',), 'tenants: "canary" is an alias'),
        (FULL, ('tenants.plans.gold.models.canary={"concurrency": 1}',), 'tenants: "canary" is an alias'),
        (
            FULL,
            ('tenants.tenants.acme.keys.ci.from_file="/run/secrets/rempart/nowhere/ci"',),
            "tenants.tenants.acme.keys.ci.from_file: router.secretFiles has no nowhere",
        ),
        (BASE, ('router.flags={"grpc-port": 9}',), "router.flags.grpc-port: the chart sets it"),
        (BASE, ('router.flags={"drain-delay-s": 60}',), "router.flags.drain-delay-s: the chart sets it"),
        (BASE, (f'{SMALL}.flags={{"model": "/else"}}',), "engines.smollm2.flags.model: the chart sets it"),
        (BASE, (f"{SMALL}.nodes=2",), "engines.smollm2.nodes: no engine of this version runs on several nodes"),
        (BASE, (f"{SMALL}.parallel.tensor=2",), "engines.smollm2.parallel.tensor:"),
        (BASE, (f'{SMALL}.role="prefill"',), "engines.smollm2.role:"),
        (BASE, (f'{SMALL}.weights.source=""',), "engines.smollm2.weights.source: an emptyDir is empty"),
        (BASE, (f'{SMALL}.weights.from="image"',), "engines.smollm2.weights.source: an image volume"),
        (OLD, (), "engines.smollm2.weights.from: image volumes need Kubernetes 1.33"),
        (OLD, (f'{SMALL}.weights.image="a/b"',), "engines.smollm2.weights.image: needs a digest"),
        (OLD, (f'{SMALL}.weights.image="a/b:latest"',), "engines.smollm2.weights.image: needs a digest"),
        (BASE, (f'{SMALL}.weights.from="claim"',), "engines.smollm2.weights.claim: give a name"),
        (
            BASE,
            (f'{SMALL}.weights={{"from": "claim", "source": "", "claim": {{"create": true}}}}',),
            "a new claim is empty",
        ),
        (BASE, (claim("ReadWriteOnce"), f"{SMALL}.replicas=2"), "accessMode: ReadWriteOnce lets one node in"),
        (BASE, (claim("ReadWriteOnce"), f"{SMALL}.autoscaling.enabled=true"), "accessMode: ReadWriteOnce lets one"),
        (BASE, (claim("ReadWriteOnce", source=""),), "accessMode: ReadWriteOnce keeps routers from the tokenizer"),
        (BASE, (claim("ReadOnlyMany"),), "engines.smollm2.weights.source: a ReadOnlyMany claim cannot be fetched into"),
        (BASE, ("networkPolicy.objectStorage.to=[]",), "networkPolicy.objectStorage.to:"),
        (BASE, ("engineDefaults.resources.limits.cpu=null",), "engines.smollm2.resources.limits.cpu: is required"),
        (BASE, (f"{SMALL}.autoscaling.enabled=true",), "metrics.monitors: engines.smollm2.autoscaling needs"),
        (BASE, (f"{SMALL}.autoscaling.enabled=true", "metrics.monitors=true"), "metrics.prometheusAddress:"),
        (FULL, ("router.holdWithoutEngineS=0",), "router.holdWithoutEngineS: must be above 0"),
        (FULL, ("engines.smollm2.autoscaling.minReplicas=0",), "a HorizontalPodAutoscaler cannot go to 0"),
        (FULL, (f'{SMALL}.model.name="acme/smollm2"',), "engines.smollm2.autoscaling.by: a HorizontalPodAutoscaler"),
        (FULL, ("engines.llama.autoscaling.minReplicas=7",), "engines.llama.autoscaling.minReplicas: is above"),
        (
            FULL,
            ("engines.llama.autoscaling.fallbackReplicas=7",),
            "engines.llama.autoscaling.fallbackReplicas: is above",
        ),
        (FULL, ('engines.smollm2.model.name="llama-3.1-8b"',), "both would answer the same work"),
        (
            FULL,
            ('engines.smollm2.model={"name": "deepseek-v3.2", "chatFormat": "chatml"}',),
            "engines.v32.model.chatFormat: another engine of deepseek-v3.2",
        ),
        (BASE, ('redis.existingSecret=""',), "redis.existingSecret:"),
        (BASE, ("networkPolicy.redis.to=[]",), "networkPolicy.redis.to:"),
        (BASE, ('redis.mode="builtIn"',), "redis.existingSecret: is for redis.mode external"),
        (FULL, ('redis.mode="builtIn"',), "externalSecrets.redisKey: is for redis.mode external"),
        (FULL, ('externalSecrets.store.name=""',), "externalSecrets.store.name:"),
        (FULL, ('secrets.existingSecret="mine"',), "secrets.existingSecret:"),
        (BASE, ("router.service.sourceRanges=[]",), "router.service.sourceRanges:"),
        (BASE, ('router.service.type="NodePort"', "networkPolicy.enabled=false"), "router.service.type: a NodePort"),
        (BASE, ('router.oidc.issuer="https://login.example.org"',), "router.oidc.audience:"),
        (FULL, ("networkPolicy.oidc.to=[]",), "networkPolicy.oidc.to:"),
        (BASE, ('hosts={"http": "", "grpc": ""}',), "hosts: name at least one"),
        (BASE, ('tls.secretName=""',), "tls.secretName:"),
        (BASE, ('hosts.grpc="api.example.org"',), "hosts.grpc: needs another name"),
        (FULL, ('hosts.grpc="api.example.org"',), "hosts.grpc: needs another name"),
        (BASE, ("gateway.enabled=true",), "gateway: give className"),
        (FULL, ('gateway.parent.name="shared"',), "gateway.parent:"),
        (FULL, ('tls.certManager.issuer=""',), "tls: certManager needs"),
        (FULL, ('inferencePool.endpointPicker.name=""',), "inferencePool.endpointPicker.name:"),
        (FULL, ("networkPolicy.engine.clients=[]",), "networkPolicy.engine.clients:"),
        (FULL, ('metrics.rules.runbookBase=""',), "metrics.rules.runbookBase: alerts and dashboards lead there"),
        (FULL, ('metrics.rules={"enabled": false, "runbookBase": ""}',), "metrics.rules.runbookBase:"),
        (
            FULL,
            ('metrics.rules.exclude=["RempartNothing"]',),
            "metrics.rules.exclude: there is no rules/RempartNothing",
        ),
        (
            FULL,
            (
                'engines.llama.weights.claim.name="models"',
                claim("ReadWriteMany"),
                f"{SMALL}.weights.claim.create=true",
            ),
            'engines.smollm2.weights.claim: llama makes "models" too',
        ),
    ],
)
def test_what_cannot_work_together_is_refused(case: Case, wrong: tuple[str, ...], named: str) -> None:
    assert named in refusal(case, *wrong)


@pytest.mark.parametrize("release", ["1llm", "llm.de"])
def test_a_release_that_no_service_can_be_called_after_is_refused(release: str) -> None:
    values = [f"--values={path}" for path in BASE.values]
    assert "fullnameOverride: " in helm("template", release, str(CHART), *values).stderr
    assert helm("template", release, str(CHART), *values, "--set=fullnameOverride=llm").returncode == 0


def test_older_kubernetes_is_refused() -> None:
    assert "requires kubeVersion" in refusal(Case(BASE.values, "1.28"))


def test_every_level_of_the_schema_is_closed_and_nothing_lies_elsewhere() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    for at, part in objects_of(schema):
        if "$ref" in part:
            assert part["$ref"].startswith("#/$defs/"), at
        elif part.get("type") == "object" and at != "/properties/global":
            assert part.get("additionalProperties") is not None, at
            assert part["additionalProperties"] is not True, at


def test_the_schema_knows_the_values_that_there_are_and_no_others() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for at, part, given in beside(schema, values, schema["$defs"]):
        assert part.get("properties", {}).keys() - {"global"} == given.keys(), at


def test_the_schema_knows_the_chat_formats_that_there_are() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    (engine,) = schema["properties"]["engines"]["patternProperties"].values()
    assert set(engine["properties"]["model"]["properties"]["chatFormat"]["enum"]) == {"", *CHAT_FORMATS}


def beside(part: Any, given: Any, definitions: Any, at: str = "values") -> Iterator[tuple[str, Any, Any]]:
    """Each object of fixed names in the schema, and the defaults at the same place."""
    part = definitions[part["$ref"].rpartition("/")[2]] if "$ref" in part else part
    if "properties" in part and given:  # an empty default stands for any
        yield at, part, given
        for name in given.keys() & part["properties"].keys():
            yield from beside(part["properties"][name], given[name], definitions, f"{at}.{name}")


def objects_of(schema: Any, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if not at.endswith(("/properties", "/$defs")):
            yield at, schema
        for key, value in schema.items():
            yield from objects_of(value, f"{at}/{key}")
    elif isinstance(schema, list):
        for number, value in enumerate(schema):
            yield from objects_of(value, f"{at}/{number}")


def test_zero_and_false_of_an_engine_win_over_the_defaults() -> None:
    manifests = render(FULL, "engines.llama.weights.verify=false")
    assert find(manifests, "ScaledObject")["spec"]["minReplicaCount"] == 0
    (engine,) = find(manifests, "Deployment", "rempart-engine-llama")["spec"]["template"]["spec"]["containers"]
    assert not any(flag.startswith("--require-manifest") for flag in engine["args"])
