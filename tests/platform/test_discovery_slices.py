"""What EndpointSlices say, as a set: pure values."""

import json
from typing import Any

from rempart_platform.cluster.testing import endpoint, slice_manifest
from rempart_platform.endpoints.endpoint_slices import endpoint_set, parse_list
from rempart_platform.endpoints.source import EndpointSet, join_host_port, union


def read(*slices: dict[str, Any], port_name: str = "grpc") -> EndpointSet:
    body = json.dumps({"metadata": {"resourceVersion": "1"}, "items": slices}).encode()
    return endpoint_set(parse_list(body).items or (), port_name)


def slice_of(*endpoints: dict[str, Any], name: str = "a", **changes: Any) -> dict[str, Any]:
    return slice_manifest(name, "engines", *endpoints, **changes)


def test_only_conditions_decide() -> None:
    told = read(
        slice_of(
            endpoint("10.0.0.1"),
            endpoint("10.0.0.2", ready=None, serving=None, terminating=None),  # unknown counts as ready
            endpoint("10.0.0.3", ready=False, serving=False),
            endpoint("10.0.0.4", ready=False, serving=True, terminating=True),
            endpoint("10.0.0.5", ready=False, serving=False, terminating=True),
            endpoint("10.0.0.6", ready=True, serving=False),  # published before it is ready
            endpoint("10.0.0.7", ready=True, serving=True, terminating=True),  # published although it goes
            {"addresses": ["10.0.0.8", "10.9.9.9"]},
        )
    )
    assert told.serving == {"10.0.0.1:50051", "10.0.0.2:50051", "10.0.0.8:50051"}
    assert told.terminating == {"10.0.0.4:50051", "10.0.0.5:50051", "10.0.0.7:50051"}


def test_a_pod_with_two_address_families_is_one_engine() -> None:
    pod = {"kind": "Pod", "uid": "one"}
    four = endpoint("10.0.0.1") | {"targetRef": pod}
    six = endpoint("fd00::1") | {"targetRef": pod}
    for slices in ([("b", "IPv4", four), ("a", "IPv6", six)], [("a", "IPv6", six), ("b", "IPv4", four)]):
        manifests = [slice_of(each, name=name, addressType=family) for name, family, each in slices]
        assert read(*manifests) == EndpointSet(frozenset({"10.0.0.1:50051"}))
    assert read(slice_of(six, addressType="IPv6")) == EndpointSet(frozenset({"[fd00::1]:50051"}))


def test_an_endpoint_in_two_slices_counts_once_and_serves_if_one_says_so() -> None:
    old, new = endpoint("10.0.0.1", ready=False, terminating=True), endpoint("10.0.0.1")
    wanted = EndpointSet(frozenset({"10.0.0.1:50051"}))
    assert read(slice_of(old, name="a"), slice_of(new, name="b")) == wanted
    assert read(slice_of(new, name="a"), slice_of(old, name="b")) == wanted
    assert read(slice_of(new, name="a"), slice_of(new, name="b")) == wanted


def test_an_address_that_a_new_pod_took_over_serves() -> None:
    old = endpoint("10.0.0.1", ready=False, terminating=True) | {"targetRef": {"uid": "old"}}
    assert read(slice_of(old, endpoint("10.0.0.1"))) == EndpointSet(frozenset({"10.0.0.1:50051"}))


def test_ports_go_by_name_and_differ_by_slice() -> None:
    slices = (
        slice_of(endpoint("10.0.0.1"), name="a", ports=[{"name": "grpc", "port": 7000}]),
        slice_of(endpoint("10.0.0.2"), name="b", ports=[{"name": "engine", "port": 7001}]),
        slice_of(endpoint("10.0.0.3"), name="c", ports=None),
        slice_of(endpoint("10.0.0.4"), name="d", ports=[{"name": "grpc", "port": None}]),
    )
    assert read(*slices).serving == {"10.0.0.1:7000"}
    assert read(*slices, port_name="engine").serving == {"10.0.0.2:7001"}


def test_what_is_null_is_empty() -> None:
    assert read(slice_of()) == EndpointSet()
    assert parse_list(b'{"metadata": {}, "items": null}').items is None


def test_a_union_serves_what_one_of_its_parts_serves() -> None:
    parts = (EndpointSet(frozenset({"a:1"}), frozenset({"b:1"})), EndpointSet(frozenset({"b:1"}), frozenset({"c:1"})))
    assert union(parts) == EndpointSet(frozenset({"a:1", "b:1"}), frozenset({"c:1"}))
    assert union(()) == EndpointSet()


def test_ipv6_is_put_in_brackets() -> None:
    assert [join_host_port(host, 1) for host in ("10.0.0.1", "fd00::1", "engine")] == [
        "10.0.0.1:1",
        "[fd00::1]:1",
        "engine:1",
    ]
