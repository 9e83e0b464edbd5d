"""Where engines are: a source tells the whole current set again and again, and the pool works out what changed.

static ─┐                                   new          ──► a session
dns ────┼─► EndpointSet ──► the pool diffs ─► terminating ──► no new requests, streams go on
kubernetes ┘  (the whole set)               gone         ──► the same, then the session closes
"""

import asyncio
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class EndpointSet:
    """All endpoints of a moment, as `host:port`, with an IPv6 host in brackets.

    An address that is in neither part is gone. Which model an engine serves it says itself.
    """

    serving: frozenset[str] = frozenset()
    terminating: frozenset[str] = frozenset()
    """About to go: they end what they run and get nothing new."""


class EndpointSource(Protocol):
    """Finds engines."""

    @property
    def has_synced(self) -> bool:
        """Whether the set was known once. It stays true: a set that may be stale is better than none."""

    async def run(self, tell: Callable[[EndpointSet], None]) -> None:
        """Tells the whole set when it is first known and whenever it may have changed, until cancelled.

        Failures to find out are logged, counted and tried again; meanwhile the set that was told last stands.
        """


class MergedSource:
    """Several sources as one.

    Args:
        sources: each with endpoints of its own; one that is not known yet holds up no other.
    """

    def __init__(self, sources: Sequence[EndpointSource]) -> None:
        self._sources = sources

    @property
    def has_synced(self) -> bool:
        return all(source.has_synced for source in self._sources)

    async def run(self, tell: Callable[[EndpointSet], None]) -> None:
        """Runs all of them."""
        told: dict[int, EndpointSet] = {}

        def take(number: int, part: EndpointSet) -> None:
            told[number] = part
            tell(union(told.values()))

        async with asyncio.TaskGroup() as tasks:
            for number, source in enumerate(self._sources):
                tasks.create_task(source.run(functools.partial(take, number)))


def union(sets: Iterable[EndpointSet]) -> EndpointSet:
    """One set of several; an address that serves in one of them serves."""
    parts = tuple(sets)
    serving = frozenset[str]().union(*(part.serving for part in parts))
    return EndpointSet(serving, frozenset[str]().union(*(part.terminating for part in parts)) - serving)


def join_host_port(host: str, port: int) -> str:
    """The address of a name, an IPv4 or an IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
