"""What finding engines tells its observer."""

from typing import Protocol


class DiscoveryObserver(Protocol):
    """Told of every attempt. A source is one service or name."""

    def synced(self, source: str, num_serving: int, num_terminating: int) -> None:
        """The source's set is known to be as it is now."""

    def failed(self, source: str, reason: str) -> None:
        """The set could not be read or followed, for one of few reasons; it is tried again."""
