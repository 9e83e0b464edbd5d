"""What holds for every pod and every network policy, whatever the values."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from tests.chart.rendering import (
    BY_IMAGE,
    BY_INGRESS,
    EVERY,
    EVERYTHING,
    IMAGE_VOLUME,
    INGRESS,
    Case,
    Manifest,
    find,
    pods,
    render,
    servers,
)

Renderings = Mapping[Case, tuple[Manifest, ...]]
MARGIN_S = 5
"""Between the end of a drain and the kill."""


def containers(pod: Manifest) -> Iterator[Manifest]:
    yield from pod["spec"].get("initContainers", [])
    yield from pod["spec"]["containers"]


def all_pods(renderings: Renderings) -> Iterator[tuple[str, Manifest]]:
    for case, manifests in renderings.items():
        for name, pod in pods(manifests):
            yield f"{case} {name}", pod


def all_containers(renderings: Renderings) -> Iterator[tuple[str, Manifest]]:
    for name, pod in all_pods(renderings):
        for container in containers(pod):
            yield f"{name} {container['name']}", container


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def test_each_server_has_three_different_probes(renderings: Renderings) -> None:
    for case, manifests in renderings.items():
        for name, pod in servers(manifests):
            (container,) = pod["spec"]["containers"]
            probes = [container[probe] for probe in ("startupProbe", "livenessProbe", "readinessProbe")]
            assert all(probes[i] != probes[j] for i, j in ((0, 1), (0, 2), (1, 2))), f"{case} {name}"
            starting, alive, ready = (probe["failureThreshold"] * probe["periodSeconds"] for probe in probes)
            assert ready < alive < starting, f"{case} {name}"


def test_readiness_asks_for_the_service_and_liveness_for_the_event_loop(renderings: Renderings) -> None:
    for name, container in all_containers(renderings):
        if container["name"] == "engine":
            assert container["livenessProbe"]["grpc"] == {"port": 50051}, name
            assert container["readinessProbe"]["grpc"] == {"port": 50051, "service": "rempart.v1.Engine"}, name
        elif container["name"] == "router":
            assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}, name
            assert container["readinessProbe"]["grpc"] == {"port": 8001, "service": "rempart.v1.Inference"}, name


def test_each_container_asks_for_what_it_may_use(renderings: Renderings) -> None:
    for name, container in all_containers(renderings):
        for bound in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][bound].keys(), name


def test_pods_are_restricted(renderings: Renderings) -> None:
    for name, pod in all_pods(renderings):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] >= 999, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["enableServiceLinks"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        for container in containers(pod):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["privileged"] is False, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert not any("hostPort" in port for port in container.get("ports", [])), name


def test_root_file_systems_are_read_only_but_where_a_value_says_otherwise(renderings: Renderings) -> None:
    writable = [
        name
        for name, container in all_containers(renderings)
        if not container["securityContext"]["readOnlyRootFilesystem"]
    ]
    assert writable
    assert all("everything" in name and name.endswith(" engine") for name in writable)


def test_volumes_are_of_restricted_kinds_but_where_a_value_says_otherwise(renderings: Renderings) -> None:
    for case, manifests in renderings.items():
        chosen = {EVERYTHING: {"hostPath"}, IMAGE_VOLUME: {"image"}}.get(case.values[0], set())
        kinds = {
            kind
            for _, pod in pods(manifests)
            for volume in pod["spec"].get("volumes", [])
            for kind in volume
            if kind != "name"
        }
        assert kinds - {"emptyDir", "configMap", "secret", "persistentVolumeClaim"} == chosen, str(case)


def test_scratch_volumes_are_bounded(renderings: Renderings) -> None:
    for name, pod in all_pods(renderings):
        for volume in pod["spec"].get("volumes", []):
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], name


def test_engines_cannot_write_their_weights(renderings: Renderings) -> None:
    for name, container in all_containers(renderings):
        for mount in container["volumeMounts"]:
            if mount["name"].startswith(("weights", "models")) and container["name"] in {"engine", "router"}:
                assert mount["readOnly"] is True, name


def test_every_image_is_pinned(renderings: Renderings) -> None:
    for name, container in all_containers(renderings):
        image = container["image"]
        assert re.search(r"/[a-z-]+(:[0-9][A-Za-z0-9._-]*|@sha256:[0-9a-f]{64})$", image), f"{name}: {image}"


def test_no_secret_is_a_plain_value(renderings: Renderings) -> None:
    for name, container in all_containers(renderings):
        for variable in container.get("env", []):
            if re.search(r"KEY|SECRET|PEPPER|PASSWORD|TOKEN|REDIS_URL", variable["name"]):
                assert "value" not in variable, f"{name} {variable['name']}"
                assert "secretKeyRef" in variable["valueFrom"], f"{name} {variable['name']}"
        assert not container.get("envFrom"), name
        assert not any(re.search(r"(key|secret|password)=(?!/)", arg) for arg in container.get("args", [])), name


def test_drains_end_before_the_kill(renderings: Renderings) -> None:
    for case, manifests in renderings.items():
        for name, pod in servers(manifests):
            (container,) = pod["spec"]["containers"]
            hook = container["lifecycle"]["preStop"]
            pause_s = hook["sleep"]["seconds"] if "sleep" in hook else int(hook["exec"]["command"][1])
            flags = [arg for arg in container.get("args", []) if arg.startswith("--drain-timeout-s=")]
            drain_s = sum(float(flag.partition("=")[2]) for flag in flags)
            assert len(flags) == (container["name"] != "redis"), f"{case} {name}"
            assert pod["spec"]["terminationGracePeriodSeconds"] >= pause_s + drain_s + MARGIN_S, f"{case} {name}"


def test_kubernetes_sleeps_itself_where_it_can(renderings: Renderings) -> None:
    for case, manifests in renderings.items():
        for name, pod in servers(manifests):
            (hook,) = pod["spec"]["containers"][0]["lifecycle"]["preStop"]
            assert hook == ("exec" if case.kubernetes == "1.29" else "sleep"), f"{case} {name}"


def test_only_routers_that_watch_have_a_token(renderings: Renderings) -> None:
    for case, manifests in renderings.items():
        for manifest in manifests:
            if manifest["kind"] == "ServiceAccount":
                assert manifest["automountServiceAccountToken"] is False, str(case)
        for name, pod in pods(manifests):
            watches = name.endswith("-router") and INGRESS not in case.values
            assert pod["spec"]["automountServiceAccountToken"] is watches, f"{case} {name}"
            assert pod["spec"]["serviceAccountName"] != "default", f"{case} {name}"


def test_routers_may_read_endpoints_and_hold_one_lease_and_no_more(renderings: Renderings) -> None:
    for case, manifests in renderings.items():
        roles = [each for each in manifests if each["kind"] in {"Role", "ClusterRole"}]
        assert len(roles) == (INGRESS not in case.values), str(case)
        for role in roles:
            assert role["kind"] == "Role"
            allowed = {
                (resource, verb, *rule.get("resourceNames", []))
                for rule in role["rules"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
            }
            assert allowed == {
                *(("endpointslices", verb) for verb in ("get", "list", "watch")),
                *(("leases", verb, "rempart-router") for verb in ("get", "update", "patch")),
                ("leases", "create"),
            }


def test_every_server_has_a_disruption_budget_that_lets_nodes_drain(renderings: Renderings) -> None:
    for case, manifests in renderings.items():
        budgets = [each["spec"] for each in manifests if each["kind"] == "PodDisruptionBudget"]
        for name, pod in servers(manifests):
            matching = [each for each in budgets if selects(each["selector"], pod["metadata"]["labels"])]
            assert [budget["maxUnavailable"] for budget in matching] == [1], f"{case} {name}"


def test_servers_are_spread_and_have_a_priority(renderings: Renderings) -> None:
    for case, manifests in renderings.items():
        for name, pod in servers(manifests):
            keys = {each["topologyKey"] for each in pod["spec"]["topologySpreadConstraints"]}
            assert keys == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}, f"{case} {name}"
            for each in pod["spec"]["topologySpreadConstraints"]:
                assert selects(each["labelSelector"], pod["metadata"]["labels"]), f"{case} {name}"
            classes = {each["metadata"]["name"] for each in manifests if each["kind"] == "PriorityClass"} | {"gpu"}
            assert pod["spec"]["priorityClassName"] in classes, f"{case} {name}"


def test_engines_never_surge_and_routers_never_shrink(renderings: Renderings) -> None:
    for case, manifests in renderings.items():
        for manifest in manifests:
            if manifest["kind"] == "Deployment":
                rolling = manifest["spec"]["strategy"]["rollingUpdate"]
                is_router = manifest["metadata"]["name"].endswith("-router")
                wanted = {"maxSurge": 1, "maxUnavailable": 0} if is_router else {"maxSurge": 0, "maxUnavailable": 1}
                assert rolling == wanted, str(case)


def test_replicas_have_one_owner(renderings: Renderings) -> None:
    manifests = renderings[EVERY]
    scaled = {
        each["spec"]["scaleTargetRef"]["name"]
        for each in manifests
        if each["kind"] in {"ScaledObject", "HorizontalPodAutoscaler"}
    }
    assert scaled == {"rempart-engine-llama", "rempart-engine-smollm2"}
    for manifest in manifests:
        if manifest["kind"] in {"Deployment", "LeaderWorkerSet"}:
            assert ("replicas" in manifest["spec"]) != (manifest["metadata"]["name"] in scaled)


def policies_of(manifests: tuple[Manifest, ...], labels: Mapping[str, str]) -> list[Manifest]:
    return [
        each["spec"]
        for each in manifests
        if each["kind"] == "NetworkPolicy" and selects(each["spec"]["podSelector"], labels)
    ]


def test_nothing_flows_but_what_is_allowed(renderings: Renderings) -> None:
    for case, manifests in renderings.items():
        for name, pod in pods(manifests):
            deny, allow = sorted(policies_of(manifests, pod["metadata"]["labels"]), key=len)
            assert deny.keys() == {"podSelector", "policyTypes"}, f"{case} {name}"
            assert deny["policyTypes"] == allow["policyTypes"] == ["Ingress", "Egress"], f"{case} {name}"
            rules = [*allow.get("ingress", []), *allow.get("egress", [])]
            assert all(rule.get("from") or rule.get("to") for rule in rules), f"{case} {name}"
            assert all("ports" in rule or is_within_one_engine(rule) for rule in rules), f"{case} {name}"


def test_an_empty_list_of_peers_lets_nobody_through() -> None:
    """Kubernetes takes an empty `from` or `to` for everybody."""
    nobody = ("networkPolicy.monitoring=[]", "networkPolicy.kubernetesApi.to=[]", "networkPolicy.dns.to=[]")
    for manifest in render(EVERY, *nobody, "networkPolicy.clients=[]"):
        if manifest["kind"] == "NetworkPolicy":
            rules = [*manifest["spec"].get("ingress", []), *manifest["spec"].get("egress", [])]
            assert all(rule.get("from") or rule.get("to") for rule in rules), manifest["metadata"]["name"]
            assert all(rule["ports"] for rule in rules if "ports" in rule), manifest["metadata"]["name"]


def is_within_one_engine(rule: Manifest) -> bool:
    peers = rule["from"] if "from" in rule else rule["to"]
    return all("rempart/engine" in peer["podSelector"]["matchLabels"] for peer in peers)


def reach(policy: Manifest) -> set[tuple[str, int]]:
    """Where a pod may connect to, briefly."""
    found = set()
    for rule in policy.get("egress", []):
        for peer in rule["to"]:
            selector = peer.get("podSelector", {}).get("matchLabels", {})
            where = peer.get("ipBlock", {}).get("cidr") or selector.get("app.kubernetes.io/component", "dns")
            found |= {(where, port["port"]) for port in rule.get("ports", [])}
    return found


@pytest.mark.parametrize(
    ("case", "component", "expected"),
    [
        (EVERY, "router", {
            ("dns", 53), ("169.254.20.10/32", 53), ("engine", 50051), ("10.1.2.0/28", 6380), ("10.96.0.1/32", 443),
            ("203.0.113.0/24", 443), ("198.51.100.7/32", 443), ("198.51.100.8/32", 443),
        }),
        (BY_INGRESS, "engine", {("dns", 53), ("169.254.20.10/32", 53), ("0.0.0.0/0", 443)}),
    ],
)  # fmt: skip
def test_egress_is_exactly_what_is_needed(case: Case, component: str, expected: set[tuple[str, int]]) -> None:
    (allow,) = (
        each["spec"]
        for each in render(case)
        if each["kind"] == "NetworkPolicy"
        and each["metadata"]["labels"].get("app.kubernetes.io/component") == component
    )
    assert reach(allow) == expected


def test_the_api_server_is_reached_by_either_family_until_its_address_is_known() -> None:
    allow = find(render(BY_IMAGE), "NetworkPolicy", "rempart-router")["spec"]
    assert {("0.0.0.0/0", 6443), ("::/0", 6443)} <= reach(allow)


def test_engines_hear_routers_prometheus_and_who_is_named() -> None:
    manifests = render(EVERY)
    _, clients, _ = find(manifests, "NetworkPolicy", "rempart-engine-llama")["spec"]["ingress"]
    assert clients == {
        "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}}],
        "ports": [{"protocol": "TCP", "port": 50051}, {"protocol": "TCP", "port": 50052}],
    }
    closed = render(BY_INGRESS)
    (_, monitoring) = find(closed, "NetworkPolicy", "rempart-engine-smollm2")["spec"]["ingress"]
    assert monitoring["ports"] == [{"protocol": "TCP", "port": 50052}]


@pytest.mark.parametrize(
    ("value", "of_the_router"), [("jobs-and-audit", "jobs-and-audit"), ("", "rempart-object-storage")]
)
def test_what_fetches_models_need_not_hold_what_writes_the_audit_log(value: str, of_the_router: str) -> None:
    manifests = render(EVERY, f'objectStorage.routerCredentialsSecret="{value}"')
    held: dict[str, set[str]] = defaultdict(set)
    for _, pod in pods(manifests):
        for container in containers(pod):
            for variable in container.get("env", []):
                if variable["name"].startswith("AWS_") and "valueFrom" in variable:
                    held[container["name"]].add(variable["valueFrom"]["secretKeyRef"]["name"])
    fetching = {"rempart-object-storage"}
    assert held == {
        "router": {of_the_router},
        "fetch": fetching,
        "tokenizer-llama": fetching,
        "tokenizer-v32": fetching,
    }


def test_whoever_speaks_to_storage_or_an_issuer_trusts_the_certificates_that_are_named() -> None:
    trusting = set()
    for _, pod in pods(render(EVERY)):
        for container in containers(pod):
            file = {"name": "SSL_CERT_FILE", "value": "/run/trusted/ca.crt"} in container.get("env", [])
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert file == (mounts.get("/run/trusted") == "trusted")
            if file:
                assert {"name": "our-authority", "defaultMode": 0o444} in (
                    volume.get("configMap") for volume in pod["spec"]["volumes"]
                )
                trusting.add(container["name"])
    assert trusting == {"router", "fetch", "tokenizer-llama", "tokenizer-v32"}


def test_an_engine_whose_weights_are_there_reaches_nothing() -> None:
    policy = find(render(EVERY), "NetworkPolicy", "rempart-engine-smollm2")["spec"]
    assert "egress" not in policy


def test_the_built_in_redis_hears_routers_only_and_reaches_nothing() -> None:
    manifests = render(BY_INGRESS, 'redis={"mode": "builtIn", "existingSecret": ""}')
    policy = find(manifests, "NetworkPolicy", "rempart-redis")["spec"]
    assert "egress" not in policy
    (rule,) = policy["ingress"]
    assert [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in rule["from"]] == ["router"]


def test_every_config_map_secret_and_claim_that_is_mounted_is_there_or_named_by_a_value(renderings: Renderings) -> None:
    by_value = {
        "audit-key",
        "tenant-keys",
        "jobs-and-audit",
        "our-authority",
        "llm-secrets",
        "models",
        "rempart-object-storage",
        "rempart-redis",
    }
    for case, manifests in renderings.items():
        made = {each["metadata"]["name"] for each in manifests} | by_value
        for name, pod in pods(manifests):
            assert set(references(pod["spec"])) <= made, f"{case} {name}"


def references(spec: Any) -> Iterator[str]:
    for volume in spec.get("volumes", []):
        for kind, field in (("configMap", "name"), ("secret", "secretName"), ("persistentVolumeClaim", "claimName")):
            if kind in volume:
                yield volume[kind][field]
    for container in containers({"spec": spec}):
        for variable in container.get("env", []):
            if "secretKeyRef" in variable.get("valueFrom", {}):
                yield variable["valueFrom"]["secretKeyRef"]["name"]
        volumes = {volume["name"] for volume in spec.get("volumes", [])} | {"data"}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
