"""The Services of Kubernetes whose endpoints are engines, as a flag names them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServiceName:
    """A Service, and the name of the port of its engines."""

    namespace: str
    name: str
    port_name: str = "grpc"

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}:{self.port_name}"


def parse_services(text: str) -> tuple[ServiceName, ...]:
    """Services of a comma-separated list of `NAMESPACE/SERVICE[:PORTNAME]`, in order.

    Raises:
        ValueError: an entry is malformed or named twice; the message names it.
    """
    services: list[ServiceName] = []
    for entry in (entry.strip() for entry in text.split(",")):
        path, colon, port_name = entry.partition(":")
        namespace, _, name = path.partition("/")
        if not namespace or not name or "/" in name or (colon and not port_name):
            raise ValueError(f"{entry!r} is not NAMESPACE/SERVICE or NAMESPACE/SERVICE:PORTNAME")
        service = ServiceName(namespace, name, port_name) if port_name else ServiceName(namespace, name)
        if service in services:
            raise ValueError(f"service {entry!r} is named twice")
        services.append(service)
    return tuple(services)
