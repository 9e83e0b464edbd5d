"""How engines are looked for, and what looking for them tells its observer."""

from dataclasses import dataclass
from typing import Protocol

from rempart_platform.bounds import require_positive


@dataclass(frozen=True, slots=True)
class DnsConfig:
    """How a name is watched."""

    period_s: float = 5.0
    """Between two look-ups."""

    def __post_init__(self) -> None:
        require_positive(self)


@dataclass(frozen=True, slots=True)
class KubernetesConfig:
    """How Services are watched."""

    relist_s: float = 300.0
    """A delete that the watch lost is noticed after at most this long."""
    watch_s: float = 300.0
    """How long one watch runs; up to a fifth less is drawn, so that routers spread."""
    silence_s: float = 10.0
    """And how much longer the API server may be silent about its end."""
    keepalive_s: float = 1.0
    """A watch whose connection answers nothing is given up after four of these."""
    request_timeout_s: float = 5.0
    """For a list, and for a watch to begin."""
    backoff_initial_s: float = 0.1
    """The first wait after a failure; doubled each time, up to `backoff_max_s`."""
    backoff_max_s: float = 4.0
    """The longest wait between two attempts."""

    def __post_init__(self) -> None:
        require_positive(self, or_zero=("silence_s",))


@dataclass(frozen=True, slots=True)
class DiscoveryConfig:
    """How engines are looked for."""

    dns: DnsConfig = DnsConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()


class DiscoveryObserver(Protocol):
    """Told of every attempt. A source is one service or name."""

    def synced(self, source: str, num_serving: int, num_terminating: int) -> None:
        """The source's set is known to be as it is now."""

    def failed(self, source: str, reason: str) -> None:
        """The set could not be read or followed, for one of few reasons; it is tried again."""
