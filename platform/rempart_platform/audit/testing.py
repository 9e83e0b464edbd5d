"""For tests of the audit log: storage that can be away, and what a chain of one's own looks like."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from rempart_platform.audit.beginning import WHOLE, Beginning
from rempart_platform.audit.chain import ChainWriter, Segment
from rempart_platform.audit.check import ChainReader, Head
from rempart_platform.audit.signing import Signer
from rempart_platform.audit.values import Entry, Kind

CHAIN = "router-0123456789abcdef"
START_S = 1_700_000_000.0


@dataclass(slots=True)
class MemorySegments:
    """Keeps segments in memory, in the order in which they came.

    While `is_away` it raises; when it `loses_an_answer`, it keeps a segment and raises all the same, once. An attempt
    sets `tried`, a success `took`.
    """

    is_away: bool = False
    loses_an_answer: bool = False
    stored: dict[str, bytes] = field(default_factory=dict)
    tried: asyncio.Event = field(default_factory=asyncio.Event)
    took: asyncio.Event = field(default_factory=asyncio.Event)

    async def put(self, segment: Segment) -> None:
        self.tried.set()
        if self.is_away:
            raise OSError("the storage is away")
        self.stored[segment.path] = segment.data
        if self.loses_an_answer:
            self.loses_an_answer = False
            raise TimeoutError("the storage did not answer")
        self.took.set()


@dataclass(slots=True)
class MemoryHeads:
    """Remembers what it was told last."""

    known: dict[str, Head] = field(default_factory=dict)

    async def write(self, chain: str, head: Head) -> None:
        self.known[chain] = head


@dataclass(frozen=True, slots=True)
class WrittenChain:
    """A chain as it lies in storage, and its head as Redis knows it."""

    segments: dict[str, bytes]
    head: Head


def write_chain(sizes: Sequence[int], signer: Signer | None = None, *, tenant: str = "acme") -> WrittenChain:
    """A chain with a segment of each of these numbers of records, the first of them the genesis."""
    writer = ChainWriter(CHAIN, signer)
    segments, last, number = {}, Head(), 0
    for size in sizes:
        entries = []
        for _ in range(size):
            fields: dict[str, object] = {"tenant": tenant, "prompt_tokens": number}
            if number == 0:
                fields = {"public_key": writer.public_key.hex()}
            entries.append(Entry(START_S + number, Kind.REQUEST if number else Kind.GENESIS, fields))
            number += 1
        segment = writer.seal(entries)
        segments[segment.path] = segment.data
        last = Head(segment.last, segment.link)
    return WrittenChain(segments, last)


def read_chain(
    segments: dict[str, bytes],
    *,
    chain: str = CHAIN,
    head: Head | None = None,
    public_key: bytes | None = None,
    beginning: Beginning = WHOLE,
) -> int:
    """How many records it has. Raises BadChainError."""
    reader = ChainReader(chain, public_key, head, beginning)
    for path in sorted(segments):
        reader.take(path, segments[path])
    reader.finish()
    return reader.num_records
