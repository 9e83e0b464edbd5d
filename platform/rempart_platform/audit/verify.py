"""Checks all chains of a store, and reads their records."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from obstore.exceptions import NotFoundError

from rempart_platform.audit.beginning import Beginning
from rempart_platform.audit.check import BadChainError, ChainReader, Head, decode_line
from rempart_platform.audit.store import ForeignSegmentError, SegmentStore
from rempart_platform.audit.values import Kind


class Heads(Protocol):
    """What a check needs of Redis; `HeadStore` in production."""

    async def read(self, chain: str) -> Head | None:
        """None when Redis does not know the chain. Raises BadChainError when it says what no router wrote."""

    async def chains(self) -> set[str]:
        """Names of all that there have ever been."""

    async def beginning(self, chain: str) -> int:
        """Of the records before this one, all may have been removed for their age."""


@dataclass(slots=True)
class Verification:
    """How far a check is, and what it found: at most one problem of each chain."""

    num_chains: int = 0
    num_segments: int = 0
    num_records: int = 0
    num_removed: int = 0
    """Records that were removed for their age, as is proven."""
    num_lost: int = 0
    """Records that routers could not keep, as the log itself says."""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records to read; "" is all."""

    tenant: str = ""
    day: str = ""
    kind: str = ""

    def takes(self, record: dict[str, Any]) -> bool:
        return self.kind in ("", record.get("kind")) and self.tenant in ("", record.get("tenant"))


async def verify(
    store: SegmentStore,
    *,
    heads: Heads | None = None,
    public_key: bytes | None = None,
    progress: Callable[[Verification], None] = lambda _: None,
) -> Verification:
    """Reads every segment of every chain; what it holds in memory does not grow with the number of records.

    Args:
        store: where the chains are.
        heads: how far they must reach; None asks no one, and then a missing end is not noticed.
        public_key: who must have signed them, 32 bytes; None asks for no one.
        progress: told after every segment.

    Raises:
        One of STORE_ERRORS: the storage cannot serve.
        RedisAwayError: Redis does not answer.
    """
    done = Verification()
    known = await heads.chains() if heads else set()
    for chain in sorted(known.union(await store.chains())):
        done.num_chains += 1
        try:
            await _verify_chain(chain, done, store, heads, public_key, progress)
        except (BadChainError, ForeignSegmentError) as error:
            done.problems.append(str(error))
    return done


async def _verify_chain(
    chain: str,
    done: Verification,
    store: SegmentStore,
    heads: Heads | None,
    public_key: bytes | None,
    progress: Callable[[Verification], None],
) -> None:
    before = replace(done)
    head, beginning = await _head(heads, chain), await store.beginning(chain, public_key)
    await _check_removal(heads, chain, beginning)
    done.num_removed += beginning.first
    try:
        reader = ChainReader(chain, public_key, head, beginning)
        async for path, data in store.segments(chain, await store.days(chain), first=beginning.first):
            records = reader.take(path, data)
            done.num_records += len(records)
            done.num_lost += sum(map(_num_lost, records))
            done.num_segments += 1
            progress(done)
        reader.finish()
    except (BadChainError, NotFoundError):
        if beginning == await store.beginning(chain, public_key):
            raise
        # Old segments were removed while they were read.
        done.num_removed, done.num_records = before.num_removed, before.num_records
        done.num_lost, done.num_segments = before.num_lost, before.num_segments
        await _verify_chain(chain, done, store, heads, public_key, progress)


async def read_records(store: SegmentStore, wanted: Wanted) -> AsyncIterator[dict[str, Any]]:
    """The records that are wanted, chain by chain, as they are stored: nothing is checked.

    Of a day that is removed meanwhile, for its age, only those that were read before.

    Raises:
        One of STORE_ERRORS: the storage cannot serve, or holds something that is no segment.
    """
    for chain in await store.chains():
        for day in [day for day in await store.days(chain) if wanted.day in ("", day)]:
            with suppress(NotFoundError, FileNotFoundError):
                async for path, data in store.segments(chain, [day]):
                    for record in _records_of(path, data):
                        if wanted.takes(record):
                            yield {"chain": chain, **record}


def _records_of(path: str, data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.split(b"\n")[1:-2]:
        record = decode_line(line)
        if record is None:
            raise ForeignSegmentError(f"{path} holds a line that is no record; verify the log")
        yield record


def _num_lost(record: dict[str, Any]) -> int:
    lost = record.get("lost")
    return lost if record.get("kind") == Kind.GAP and isinstance(lost, int) else 0


async def _check_removal(heads: Heads | None, chain: str, beginning: Beginning) -> None:
    """Redis is told first, so it may know of more than is gone by now."""
    if heads is not None and beginning.first > await heads.beginning(chain):
        what = f"what came before record {beginning.first} is gone, and Redis has never heard that it is to be"
        raise BadChainError(f"chain {chain}: {what}")


async def _head(heads: Heads | None, chain: str) -> Head | None:
    """Asked before the chain is read: a router that runs goes on writing meanwhile."""
    if heads is None:
        return None
    head = await heads.read(chain)
    if head is None:
        raise BadChainError(f"chain {chain}: Redis has never heard of it")
    return head
