"""What a Service's EndpointSlices say, as values: bytes of the API -> slices -> the set of endpoints.

Of a Service with two address families each pod is in a slice of both; it is one engine all the same, and counts once.
While endpoints move from one slice to another they may be in both, or in one that is older.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, TypeVar

import msgspec

from rempart_platform.cluster.kubernetes_api import KubernetesError
from rempart_platform.endpoints.source import EndpointSet, join_host_port

_T = TypeVar("_T", bound=msgspec.Struct)


class _Conditions(msgspec.Struct, frozen=True):
    """None is unknown, which counts as ready."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _TargetRef(msgspec.Struct, frozen=True):
    uid: str = ""


class _Endpoint(msgspec.Struct, frozen=True, rename="camel"):
    addresses: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    conditions: _Conditions = _Conditions()
    target_ref: _TargetRef | None = None


class _Port(msgspec.Struct, frozen=True):
    name: str | None = None
    port: int | None = None


class _Metadata(msgspec.Struct, frozen=True, rename={"next_page": "continue", "resource_version": "resourceVersion"}):
    name: str = ""
    resource_version: str = ""
    next_page: str = ""


class EndpointSlice(msgspec.Struct, frozen=True, rename="camel"):
    """As far as it matters here; of a bookmark it is the metadata alone."""

    metadata: _Metadata
    address_type: str = ""
    endpoints: tuple[_Endpoint, ...] | None = None
    ports: tuple[_Port, ...] | None = None


class EndpointSliceList(msgspec.Struct, frozen=True):
    """One page of the answer to a list."""

    metadata: _Metadata
    items: tuple[EndpointSlice, ...] | None


class _Status(msgspec.Struct, frozen=True):
    code: int = 0
    message: str = ""


class _WatchEvent(msgspec.Struct, frozen=True):
    """One line of a watch."""

    type: str
    object: msgspec.Raw


def parse_list(body: bytes) -> EndpointSliceList:
    """Raises KubernetesError "garbage"."""
    return _decode(body, EndpointSliceList)


def parse_event(line: bytes) -> tuple[str, EndpointSlice]:
    """The type of a watch's event, and its slice.

    Raises:
        KubernetesError: it is an error, with its HTTP status, or "garbage".
    """
    event = _decode(line, _WatchEvent)
    if event.type == "ERROR":
        status = _decode(bytes(event.object), _Status)
        raise KubernetesError(str(status.code), status.message)
    if event.type not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK"):
        raise KubernetesError("garbage", f"unknown event {event.type[:100]!r}")
    return event.type, _decode(bytes(event.object), EndpointSlice)


def endpoint_set(slices: Iterable[EndpointSlice], port_name: str) -> EndpointSet:
    """The endpoints of all slices of one Service, at the port of that name.

    Only conditions decide. One that is ready and serves is in the set; one that is terminating keeps what it runs.
    `serving` is asked beside `ready` because a Service that publishes addresses early calls them all ready.
    """
    serving: dict[str, str] = {}
    terminating: dict[str, str] = {}
    # IPv4 before IPv6, so that of the two addresses of a pod it is always the same one that counts.
    for each in sorted(slices, key=lambda each: (each.address_type, each.metadata.name)):
        port = next((port.port for port in each.ports or () if port.name == port_name), None)
        if port is None:
            continue
        for endpoint in each.endpoints or ():
            conditions, host = endpoint.conditions, endpoint.addresses[0]  # further ones have no meaning
            engine = endpoint.target_ref.uid if endpoint.target_ref and endpoint.target_ref.uid else host
            if conditions.terminating:
                terminating.setdefault(engine, join_host_port(host, port))
            elif conditions.ready is not False and conditions.serving is not False:
                serving.setdefault(engine, join_host_port(host, port))
    return EndpointSet(frozenset(serving.values()), _leaving(serving, terminating))


def _leaving(serving: Mapping[str, str], terminating: Mapping[str, str]) -> frozenset[str]:
    addresses = {address for engine, address in terminating.items() if engine not in serving}
    return frozenset(addresses - set(serving.values()))


def _decode(data: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise KubernetesError("garbage", f"not what the Kubernetes API answers: {error}") from None
