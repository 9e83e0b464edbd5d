"""Endpoints from a fixed list of addresses."""

from collections.abc import Callable, Iterable

from rempart_platform.endpoints.source import EndpointSet


class StaticSource:
    """Always the same addresses.

    Args:
        addresses: one endpoint each, `host:port`.
    """

    has_synced = True

    def __init__(self, addresses: Iterable[str]) -> None:
        self._set = EndpointSet(frozenset(addresses))

    async def run(self, tell: Callable[[EndpointSet], None]) -> None:
        """Tells the set, once."""
        tell(self._set)


def parse_addresses(text: str) -> tuple[str, ...]:
    """Addresses of a comma-separated list of `host:port`, in order.

    Raises:
        ValueError: an entry is malformed or named twice; the message names it.
    """
    addresses = tuple(entry.strip() for entry in text.split(","))
    for address in addresses:
        parse_address(address)
        if addresses.count(address) > 1:
            raise ValueError(f"endpoint {address!r} is named twice")
    return addresses


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of one `host:port`.

    Raises:
        ValueError: it is malformed; the message names it.
    """
    host, _, port = text.strip().rpartition(":")
    if not _is_host(host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"endpoint {text!r} is not host:port")
    return host, int(port)


def _is_host(text: str) -> bool:
    """Whether it can be looked up: no part of a name is empty or too long."""
    try:
        return bool(text.encode("idna"))
    except UnicodeError:
        return False
