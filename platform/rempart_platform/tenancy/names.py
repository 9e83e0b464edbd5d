"""Names that operators give: of tenants, plans and cache groups. Keys of Redis and orders in it are made of them."""

import re

from rempart_platform.errors import invalid_request

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")


def is_name(text: str) -> bool:
    """Whether it may be one."""
    return _NAME.fullmatch(text) is not None


def require_name(text: str, of: str, param: str) -> None:
    """Raises RempartError INVALID_REQUEST when it may not: `of` is what it should be, as its sentence begins."""
    if not is_name(text):
        message = f"{of} has 1 to 63 characters: lower-case letters, digits and '-', starting with a letter."
        raise invalid_request(message, param)
