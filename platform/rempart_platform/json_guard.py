"""How many values a JSON text holds and how deep they nest, found at the speed of `bytes.replace`, building nothing."""

from rempart_platform.errors import RempartError, invalid_request

_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def check_json_shape(data: bytes, *, max_nodes: int, max_depth: int, param: str | None = None) -> None:
    """Raises RempartError INVALID_REQUEST for a text that would be expensive to parse. Malformed text may pass.

    Args:
        data: JSON in UTF-8.
        max_nodes: the most values it may hold, itself included.
        max_depth: how deep arrays and objects may nest.
        param: the request field that holds it, when it is not the request itself.
    """
    if _count_nodes(data) <= max_nodes and data.count(b"[") + data.count(b"{") <= max_depth:
        return
    structure = _without_strings(data, max_nodes, param)
    if _count_nodes(structure) > max_nodes:
        raise _too_many(max_nodes, param)
    nesting = structure.translate(_BRACKETS, _NOT_BRACKETS)
    for _ in range(max_depth):
        nesting = nesting.replace(b"[]", b"")
    if nesting.strip(b"]"):
        message = f"The JSON nests deeper than {max_depth} levels (limit max_json_depth)."
        raise invalid_request(message, param)


def _count_nodes(structure: bytes) -> int:
    """At least the number of values: each but the first of its container follows a comma, the first a bracket."""
    return structure.count(b",") + structure.count(b"[") + structure.count(b"{") + 1


def _without_strings(data: bytes, max_nodes: int, param: str | None) -> bytes:
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * max_nodes:  # a value has at most a key and itself, two quotes each
        raise _too_many(max_nodes, param)
    return b"".join(plain.split(b'"')[::2])


def _too_many(max_nodes: int, param: str | None) -> RempartError:
    message = f"The JSON holds more than {max_nodes} values (limit max_json_nodes)."
    return invalid_request(message, param)
