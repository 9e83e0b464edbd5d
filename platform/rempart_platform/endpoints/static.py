"""Endpoints from a fixed list of addresses."""


def parse_addresses(text: str) -> tuple[str, ...]:
    """Addresses of a comma-separated list of `host:port`, in order.

    Raises:
        ValueError: an entry is malformed or named twice; the message names it.
    """
    addresses = tuple(entry.strip() for entry in text.split(","))
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"endpoint {address!r} is not host:port")
        if addresses.count(address) > 1:
            raise ValueError(f"endpoint {address!r} is named twice")
    return addresses
