"""Bounds of configured numbers: unless a value says otherwise, 0 of anything makes no sense and is refused.

A value knows its fields and no flags. The error names the field, and who parses flags names the flag from it.
"""

from dataclasses import fields
from typing import Any


class OutOfBoundsError(ValueError):
    """A number of a configured value makes no sense.

    Args:
        name: the value's field.
        bound: what it must be, as in "at least 1".
    """

    def __init__(self, name: str, bound: str) -> None:
        super().__init__(f"{name} must be {bound}")
        self.name = name
        self.bound = bound


def require_positive(config: Any, *, or_zero: tuple[str, ...] = ()) -> None:  # Any: whichever dataclass
    """Raises OutOfBoundsError for the first number that is not above 0; the fields `or_zero` may be 0."""
    for spec in fields(config):
        value = getattr(config, spec.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if spec.name in or_zero:
            require(value >= 0, spec.name, "at least 0")
        else:
            require(value > 0, spec.name, "at least 1" if isinstance(value, int) else "above 0")


def require(holds: bool, name: str, bound: str) -> None:
    """Raises OutOfBoundsError with the field and its bound unless it holds."""
    if not holds:
        raise OutOfBoundsError(name, bound)
