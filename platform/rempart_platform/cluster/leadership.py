"""Which router does what only one should do: sweeping, roll-ups, jobs by the clock.

What asks here must be harmless when two do it for a moment, or fence itself: a lease of any kind only makes that rare.
Nothing on the way of a request may depend on it.
"""

from dataclasses import dataclass
from typing import Protocol

from rempart_platform.bounds import require, require_positive


@dataclass(frozen=True, slots=True)
class LeaseConfig:
    """How leadership is held."""

    lease_s: float = 15.0
    """For how long others leave it alone; whole seconds in Kubernetes, so it is rounded up."""
    renew_s: float = 10.0
    """A leader that could not renew it for so long stops leading."""
    retry_s: float = 2.0
    """How often it is renewed, or tried for."""

    def __post_init__(self) -> None:
        require_positive(self)
        require(self.retry_s < self.renew_s, "retry_s", "below renew_s")
        require(self.renew_s < self.lease_s, "renew_s", "below lease_s")


class Leadership(Protocol):
    """Asked before each piece of such work."""

    def is_leader(self) -> bool:
        """Whether this router leads at this moment. Cheap, and never waits."""


class OwnLeadership:
    """Every router leads: fit for work that is idempotent, and for a single router."""

    def is_leader(self) -> bool:
        return True


def parse_lease_name(text: str) -> tuple[str, str]:
    """Namespace and name of `NAMESPACE/NAME`.

    Raises:
        ValueError: it is malformed; the message names it.
    """
    namespace, _, name = text.partition("/")
    if not namespace or not name or "/" in name:
        raise ValueError(f"lease {text!r} is not NAMESPACE/NAME")
    return namespace, name
