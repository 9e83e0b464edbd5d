"""How an engine's values become its workload."""

import pytest
from tests.chart.rendering import (
    BY_IMAGE,
    BY_INGRESS,
    EVERY,
    INGRESS,
    MODELS,
    PROVIDERS,
    SCALEWAY,
    Case,
    Manifest,
    find,
    render,
)

from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.batch.values import BatchLimits
from rempart_platform.config import RouterConfig


def engine_of(case: Case, name: str, *sets: str) -> Manifest:
    return find(render(case, *sets), "Deployment", f"rempart-engine-{name}")


def seconds(probe: Manifest) -> int:
    return int(probe["failureThreshold"] * probe["periodSeconds"])


def test_an_engines_own_values_win_over_its_machines_and_these_over_the_defaults() -> None:
    case = Case((SCALEWAY, MODELS["llama-8b-h100"]))
    spec = engine_of(case, "llama-8b", 'machines.h100.podAnnotations={"a": "machine", "b": "machine"}',
                     'engineDefaults.podAnnotations={"b": "default", "c": "default"}',
                     'engines.llama-8b.podAnnotations={"a": "engine"}')["spec"]["template"]  # fmt: skip
    annotations = spec["metadata"]["annotations"]
    assert {name: annotations[name] for name in "abc"} == {"a": "engine", "b": "machine", "c": "default"}
    assert spec["spec"]["nodeSelector"] == {"k8s.scaleway.com/pool-name": "h100"}
    (container,) = spec["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "48Gi", "nvidia.com/gpu": "1"}
    assert container["image"].endswith("/rempart-engine:0.1.0-cuda")
    assert "--device=cuda" in container["args"]


def test_an_engine_on_a_cpu_asks_for_no_gpu_anywhere() -> None:
    for provider in PROVIDERS.values():
        pod = engine_of(Case((provider, MODELS["smollm2-cpu"])), "smollm2")["spec"]["template"]["spec"]
        assert "tolerations" not in pod
        assert "nodeSelector" not in pod
        assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]


def test_routers_know_a_models_length_before_its_first_engine_says_it() -> None:
    manifests = render(Case((SCALEWAY, MODELS["llama-8b-h100"])), 'engines.llama-8b.flags={"max-model-len": 8192}')
    (router,) = find(manifests, "Deployment", "rempart-router")["spec"]["template"]["spec"]["containers"]
    assert "--max-model-len=llama-3.1-8b=8192" in router["args"]
    config = RouterConfig.from_args(router["args"])
    assert config.models[0].max_model_len == 8192


@pytest.mark.parametrize(
    ("size_gib", "verify", "expected_s"), [(1, False, 310), (15, False, 380), (15, True, 460), (640, True, 6860)]
)
def test_start_up_time_follows_from_the_weights(size_gib: int, verify: bool, expected_s: int) -> None:
    """200 MiB/s and 5 minutes; verifying reads all once more."""
    weights = f'{{"source": "s3://m/x", "sizeGiB": {size_gib}, "verify": {str(verify).lower()}}}'
    engine = engine_of(BY_INGRESS, "smollm2", f"engines.smollm2.weights={weights}")
    (container,) = engine["spec"]["template"]["spec"]["containers"]
    assert seconds(container["startupProbe"]) == expected_s


def test_a_rollout_may_take_as_long_as_the_provider_needs() -> None:
    deadline_s = {}
    for name in ("scaleway", "ovhcloud"):
        deployment = engine_of(Case((PROVIDERS[name], MODELS["llama-8b-l4"])), "llama-8b")["spec"]
        (container,) = deployment["template"]["spec"]["containers"]
        deadline_s[name] = deployment["progressDeadlineSeconds"]
        grace_s = deployment["template"]["spec"]["terminationGracePeriodSeconds"]
        # A node, 15 GiB at 100 MiB/s, loading, and the end of the pod before.
        node_s = {"scaleway": 650, "ovhcloud": 4500}[name]
        assert deadline_s[name] >= node_s + 153 + seconds(container["startupProbe"]) - 10 + grace_s
    assert deadline_s["ovhcloud"] - deadline_s["scaleway"] == 4500 - 650


def test_the_first_rollout_of_routers_may_take_as_long_as_the_first_engine_needs() -> None:
    """Without one they are not ready."""
    for provider in ("scaleway", "ovhcloud"):
        case = Case((PROVIDERS[provider], MODELS["llama-8b-l4"]))
        engine = engine_of(case, "llama-8b")["spec"]
        grace_s = engine["template"]["spec"]["terminationGracePeriodSeconds"]
        router = find(render(case), "Deployment", "rempart-router")["spec"]
        assert router["progressDeadlineSeconds"] > engine["progressDeadlineSeconds"] - grace_s


def test_nodes_of_ovhcloud_are_not_forced_before_the_drain_ends() -> None:
    for deployment in render(Case((PROVIDERS["ovhcloud"], MODELS["llama-8b-h100"]))):
        if deployment["kind"] == "Deployment":
            assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] < 600


def test_an_engine_of_two_nodes_is_a_leader_worker_set() -> None:
    """The shape that engines of several nodes will have; nothing runs it yet."""
    manifests = render(EVERY)
    template = find(manifests, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    selector = find(manifests, "Service", "rempart-engines")["spec"]["selector"]
    assert selector.items() <= template["leaderTemplate"]["metadata"]["labels"].items()
    assert not selector.items() <= template["workerTemplate"]["metadata"]["labels"].items()
    assert template["leaderTemplate"]["spec"] == template["workerTemplate"]["spec"]
    policy = find(manifests, "NetworkPolicy", "rempart-engine-v32")["spec"]
    others = {"podSelector": policy["podSelector"]}
    assert {"from": [others]} in policy["ingress"]
    assert {"to": [others]} in policy["egress"]


def test_one_service_finds_every_engine() -> None:
    manifests = render(EVERY)
    selector = find(manifests, "Service", "rempart-engines")["spec"]["selector"]
    for name in ("llama", "smollm2"):
        pod = find(manifests, "Deployment", f"rempart-engine-{name}")["spec"]["template"]
        assert selector.items() <= pod["metadata"]["labels"].items()
    router = find(manifests, "Deployment", "rempart-router")["spec"]["template"]
    assert "--engines-kubernetes=llm/rempart-engines:grpc" in router["spec"]["containers"][0]["args"]
    router = find(render(BY_INGRESS), "Deployment", "rempart-router")["spec"]["template"]
    assert "--engines-dns=rempart-engines.llm.svc:50051" in router["spec"]["containers"][0]["args"]


def volume(pod: Manifest, name: str) -> Manifest:
    (found,) = (each for each in pod["spec"]["volumes"] if each["name"] == name)
    return dict(found)


def test_weights_come_in_four_ways() -> None:
    manifests = render(EVERY)
    leader = find(manifests, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    assert volume(leader, "weights")["hostPath"] == {"path": "/scratch/rempart", "type": "Directory"}
    llama = find(manifests, "Deployment", "rempart-engine-llama")["spec"]["template"]
    claim = find(manifests, "PersistentVolumeClaim")
    assert volume(llama, "weights")["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    small = engine_of(BY_INGRESS, "smollm2")["spec"]["template"]
    assert volume(small, "weights")["emptyDir"] == {"sizeLimit": "2Gi"}
    image = engine_of(BY_IMAGE, "smollm2")["spec"]["template"]
    assert volume(image, "weights")["image"]["reference"] == "registry.example.org/weights/smollm2:1"
    assert "initContainers" not in image["spec"]


def test_load_balancers_do_not_cut_streams() -> None:
    """By their defaults both would: after 10 s, and after 50 s."""
    for provider, setting, at_least in (
        ("scaleway", "service.beta.kubernetes.io/scw-loadbalancer-timeout-server", "60m"),
        ("scaleway", "service.beta.kubernetes.io/scw-loadbalancer-timeout-tunnel", "60m"),
        ("ovhcloud", "loadbalancer.openstack.org/timeout-member-data", "3600000"),
        ("ovhcloud", "loadbalancer.openstack.org/timeout-client-data", "3600000"),
    ):
        case = Case((PROVIDERS[provider], INGRESS))
        service = find(render(case), "Service", "rempart-router")
        assert service["metadata"]["annotations"][setting] == at_least
        gateway = find(
            render(case, "ingress.enabled=false", 'gateway={"enabled": true, "className": "cilium"}'), "Gateway"
        )
        assert gateway["spec"]["infrastructure"]["annotations"][setting] == at_least


def test_a_public_name_may_be_a_wildcard() -> None:
    for case, kinds in ((EVERY, {"Gateway", "HTTPRoute", "Certificate"}), (BY_INGRESS, {"Ingress"})):
        told = {each["kind"] for each in render(case, 'hosts.http="*.example.org"') if "'*.example.org'" in str(each)}
        assert told == kinds


def test_gateways_and_ingresses_do_not_either() -> None:
    for rule in find(render(EVERY), "HTTPRoute")["spec"]["rules"]:
        assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    for each in render(BY_INGRESS):
        if each["kind"] == "Ingress":
            assert each["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-read-timeout"] == "3600"
            assert each["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"


def test_an_ingress_lets_every_file_through_that_routers_take_and_keeps_none_on_its_disk() -> None:
    http = HttpLimits()
    most = BatchLimits().max_file_bytes + http.max_form_parts * (http.max_part_head_bytes + http.max_field_bytes)
    ingresses = [each for each in render(BY_INGRESS) if each["kind"] == "Ingress"]
    assert len(ingresses) == 2
    for each in ingresses:
        size = each["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"]
        assert size.endswith("m")
        assert int(size[:-1]) * 1024 * 1024 >= most
        assert each["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-request-buffering"] == "off"


def test_routers_keep_idle_connections_for_longer_than_proxies_do() -> None:
    (router,) = find(render(EVERY), "Deployment", "rempart-router")["spec"]["template"]["spec"]["containers"]
    idle_s = RouterConfig.from_args(router["args"]).http.idle_timeout_s
    assert idle_s > max(60, 90)  # nginx, Traefik


def test_changed_tenants_restart_routers_and_no_engine() -> None:
    before, after = render(EVERY), render(EVERY, "tenants.tenants.acme.concurrency=3")
    assert find(before, "Deployment", "rempart-router")["spec"] != find(after, "Deployment", "rempart-router")["spec"]
    assert find(before, "Deployment", "rempart-engine-llama") == find(after, "Deployment", "rempart-engine-llama")


def test_a_further_engine_of_a_model_restarts_no_router() -> None:
    """The first by name lends its tokenizer."""
    more = 'engines.z={"model": {"name": "smollm2"}, "weights": {"source": "s3://models/smollm2"}}'
    case = BY_INGRESS
    before, after = (
        find(manifests, "Deployment", "rempart-router") for manifests in (render(case), render(case, more))
    )
    assert before["spec"]["template"] == after["spec"]["template"]
