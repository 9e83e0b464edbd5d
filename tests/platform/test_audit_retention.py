"""Old segments of the audit log are removed, and what remains can be verified all the same."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rempart_platform.audit.beginning import WHOLE, BadBeginningError, Beginning, decode_beginning, encode_beginning
from rempart_platform.audit.buffer import AuditBuffer
from rempart_platform.audit.chain import ChainWriter, Segment
from rempart_platform.audit.check import BadChainError, Head
from rempart_platform.audit.heads import HeadStore
from rempart_platform.audit.retention import Retention
from rempart_platform.audit.signing import Signer
from rempart_platform.audit.store import SegmentStore
from rempart_platform.audit.testing import CHAIN, START_S, read_chain, write_chain
from rempart_platform.audit.values import AuditConfig, Entry, Kind
from rempart_platform.audit.verify import Verification, Wanted, read_records, verify
from rempart_platform.object_store import open_object_store
from rempart_platform.tenancy.redis_client import RedisAwayError, RedisClient, connect_redis
from rempart_platform.tenancy.testing import own_redis, patient

DAY_S = 86_400
SIGNER = Signer(Ed25519PrivateKey.generate())
NUM_DAYS = 5
PER_DAY = 4
"""Records, in two segments."""


@dataclass
class Rig:
    """A chain of `NUM_DAYS` days in storage, and a router that is to forget. Its own records are sealed at once."""

    store: SegmentStore
    heads: HeadStore
    writer: ChainWriter
    now_s: float = START_S
    told: list[dict[str, object]] = field(default_factory=list)
    num_days: int = 0

    async def write_day(self) -> None:
        """A day of the chain, and that day passes."""
        for half in range(2):
            entries = [Entry(self.now_s + half, Kind.REQUEST, {}) for _ in range(PER_DAY // 2)]
            if not self.num_days and not half:
                entries[0] = Entry(self.now_s, Kind.GENESIS, {"public_key": self.writer.public_key.hex()})
            segment = self.writer.seal(entries)
            await self.store.put(segment)
            await self.heads.write(CHAIN, Head(segment.last, segment.link))
        self.num_days += 1
        self.now_s += DAY_S

    async def keep(self, days: int, signer: Signer | None = SIGNER) -> None:
        """One round of a router that keeps so many days."""
        config = AuditConfig(store="file:///x", retention_days=days)
        buffer = AuditBuffer(config, lambda: self.now_s)
        retention = Retention(buffer, self.store, self.heads, config, signer, lambda: self.now_s)
        sealing = asyncio.create_task(self.seal(buffer))
        try:
            await retention.remove_old()
        finally:
            sealing.cancel()
            await asyncio.wait([sealing])

    async def seal(self, buffer: AuditBuffer) -> None:
        while True:
            await buffer.wait_for_work(60.0)
            self.told += [dict(entry.fields) for entry in buffer.take()]
            buffer.sealed()

    async def problems(self, *, heads: bool = True, public_key: bytes | None = SIGNER.public_key) -> list[str]:
        done = await verify(self.store, heads=self.heads if heads else None, public_key=public_key)
        return done.problems


@asynccontextmanager
async def rig_in(audit_url: str, redis: RedisClient, signer: Signer | None = SIGNER) -> AsyncIterator[Rig]:
    rig = Rig(SegmentStore(open_object_store(audit_url)), HeadStore(redis), ChainWriter(CHAIN, signer))
    for _ in range(NUM_DAYS):
        await rig.write_day()
    yield rig


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with own_redis() as redis:
        yield redis


@pytest.fixture
async def rig(tmp_path: Path, redis: RedisClient) -> AsyncIterator[Rig]:
    async with rig_in(f"file://{tmp_path}/audit", redis) as rig:
        yield rig


async def kept_days(rig: Rig) -> int:
    return len(await rig.store.days(CHAIN))


async def test_what_is_old_goes_and_what_remains_is_right(audit_url: str, redis: RedisClient) -> None:
    async with rig_in(audit_url, redis) as rig:
        await rig.keep(NUM_DAYS)
        assert (await kept_days(rig), rig.told) == (NUM_DAYS, [])
        await rig.keep(3)
        assert await kept_days(rig) == 3
        done = await verify(rig.store, heads=rig.heads, public_key=SIGNER.public_key)
        assert (done.problems, done.num_removed, done.num_records) == ([], 2 * PER_DAY, 3 * PER_DAY)
        assert rig.told == [{"of_chain": CHAIN, "through": "2023-11-15", "first": 0, "last": 2 * PER_DAY - 1}]
        await rig.write_day()  # the router of the chain knows nothing of it, and goes on
        await rig.keep(2)
        done = await verify(rig.store, heads=rig.heads, public_key=SIGNER.public_key)
        assert (done.problems, done.num_removed, done.num_records) == ([], 4 * PER_DAY, 2 * PER_DAY)
        assert [told["first"] for told in rig.told] == [0, 2 * PER_DAY]


async def test_a_chain_may_go_altogether_and_go_on(rig: Rig) -> None:
    rig.now_s += 100 * DAY_S
    await rig.keep(1)
    assert (await kept_days(rig), await rig.problems(), await rig.problems(heads=False)) == (0, [], [])
    await rig.write_day()
    done = await verify(rig.store, heads=rig.heads, public_key=SIGNER.public_key)
    assert (done.problems, done.num_records) == ([], PER_DAY)
    await rig.keep(1)
    assert await kept_days(rig) == 1, "a day is kept until as many whole days have passed"


async def test_without_a_signature_too(tmp_path: Path, redis: RedisClient) -> None:
    async with rig_in(f"file://{tmp_path}/audit", redis, signer=None) as rig:
        await rig.keep(2, signer=None)
        assert (await kept_days(rig), await rig.problems(public_key=None)) == (2, [])
        (problem,) = await rig.problems()
        assert "not signed with the given key" in problem


async def test_what_is_not_as_it_was_written_stays(rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = sorted((tmp_path / "audit" / "chains").rglob("*.jsonl"))[1]
    damaged.write_bytes(damaged.read_bytes().replace(b"request", b"REQUEST"))
    await rig.keep(1)
    assert (await kept_days(rig), rig.told) == (NUM_DAYS, [])
    assert "a chain of the audit log is not as it was written" in caplog.messages
    assert len(await rig.problems()) == 1


async def test_nothing_goes_while_redis_is_away(rig: Rig) -> None:
    async with connect_redis(patient("unix:///nowhere")) as away:
        with pytest.raises(RedisAwayError):
            await replace(rig, heads=HeadStore(away)).keep(1)
    assert (await kept_days(rig), await rig.problems()) == (NUM_DAYS, [])


async def test_a_round_that_broke_off_is_brought_to_its_end(rig: Rig, tmp_path: Path) -> None:
    segments = {path: path.read_bytes() for path in (tmp_path / "audit" / "chains").rglob("*.jsonl")}
    await rig.keep(2)
    for path, data in segments.items():  # as if nothing had been removed yet, or an old attempt came late
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert await rig.problems() == []
    await rig.keep(2)
    assert (await kept_days(rig), await rig.problems(), len(rig.told)) == (2, [], 1)


async def test_of_two_that_remove_at_a_time_the_later_beginning_holds(rig: Rig) -> None:
    await rig.keep(3)
    early = await rig.store.beginning(CHAIN)
    await rig.keep(2)
    late = await rig.store.beginning(CHAIN)
    await rig.heads.write_beginning(CHAIN, early.first)  # a router that was stopped in between goes on
    await rig.store.put_beginning(CHAIN, early, SIGNER)
    assert (await rig.store.beginning(CHAIN), await rig.problems()) == (late, [])
    assert await rig.heads.beginning(CHAIN) == late.first


async def test_who_removes_a_beginning_without_being_asked_is_found(rig: Rig, tmp_path: Path) -> None:
    """By the missing beginning, by a forged one that Redis or the key knows nothing of, and by one of another place."""
    chains, beginnings = tmp_path / "audit" / "chains" / CHAIN, tmp_path / "audit" / "beginnings" / CHAIN
    await rig.keep(4)
    (written,) = beginnings.iterdir()
    told = written.read_bytes()
    real = decode_beginning(CHAIN, told, SIGNER.public_key)

    written.unlink()
    assert "it is missing" in (await rig.problems())[0]
    written.write_bytes(told.replace(b'"first":4', b'"first":2'))
    assert "not signed with the given key" in (await rig.problems())[0]
    assert "it is missing" in (await rig.problems(public_key=None))[0]
    written.write_bytes(b"nonsense")
    assert "it cannot be read" in (await rig.problems())[0]

    written.write_bytes(told)
    assert await rig.problems() == []
    oldest, *_ = sorted(chains.iterdir())
    *_, last = sorted(oldest.iterdir())
    head, *_ = last.read_bytes().split(b"\n")
    position = json.loads(head)
    for path in oldest.iterdir():
        path.unlink()
    assert "it is missing" in (await rig.problems())[0]
    forged = Beginning(real.first + PER_DAY, position["segment"] + 1, b"?" * 32, oldest.name, SIGNER.public_key)
    (beginnings / f"{forged.first:016d}.jsonl").write_bytes(encode_beginning(CHAIN, forged, None))
    assert "not signed with the given key" in (await rig.problems())[0]
    assert "Redis has never heard" in (await rig.problems(public_key=None))[0]
    assert "does not follow the one before it" in (await rig.problems(heads=False, public_key=None))[0]


async def test_what_is_removed_while_it_is_verified_is_not_missed(rig: Rig, tmp_path: Path) -> None:
    audit, whole = tmp_path / "audit", tmp_path / "whole"
    shutil.copytree(audit, whole)
    await rig.keep(2)
    audit.rename(tmp_path / "pruned")
    whole.rename(audit)

    def remove(done: Verification) -> None:
        """What the round above did, at the first segment that is told."""
        if (tmp_path / "pruned").exists():
            shutil.rmtree(audit)
            (tmp_path / "pruned").rename(audit)

    done = await verify(rig.store, heads=rig.heads, public_key=SIGNER.public_key, progress=remove)
    assert (done.problems, done.num_chains) == ([], 1)
    assert (done.num_removed, done.num_records, done.num_segments) == (3 * PER_DAY, 2 * PER_DAY, 4)


async def test_what_is_removed_while_records_are_read_is_left_out(rig: Rig, tmp_path: Path) -> None:
    reading = read_records(rig.store, Wanted())
    seen = [await anext(reading)]
    *old, last = await rig.store.days(CHAIN)
    for day in old:
        shutil.rmtree(tmp_path / "audit" / "chains" / CHAIN / day)
    seen += [record async for record in reading]
    assert {record["at"][:10] for record in seen} == {old[0], last}


def test_a_beginning_is_of_one_chain_and_of_its_head() -> None:
    written = write_chain([2, 2, 2], SIGNER)
    whole = read_chain(written.segments, head=written.head, public_key=SIGNER.public_key)
    assert whole == 6
    data = encode_beginning("other", Beginning(first=2), SIGNER)
    with pytest.raises(ValueError, match="that of another chain"):
        decode_beginning(CHAIN, data)
    with pytest.raises(BadChainError, match="not the one that was sealed"):
        read_chain({}, head=written.head, beginning=Beginning(6, 3, b"?" * 32, "2023-11-14", SIGNER.public_key))
    with pytest.raises(BadChainError, match="but it had 6 records"):
        read_chain({}, head=written.head, beginning=replace(WHOLE, first=4, public_key=SIGNER.public_key))


_TOLD = {"chain": CHAIN, "day": "", "ended": False, "first": 1, "previous": "", "public_key": "", "segment": 1}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b'"\xff"',
        b"[" * 100_000,
        json.dumps(_TOLD | {"first": -1}).encode(),
        json.dumps(_TOLD | {"segment": 1e99}).encode(),
        json.dumps(_TOLD | {"ended": "no"}).encode(),
        json.dumps(_TOLD | {"previous": "no hash"}).encode(),
        json.dumps(_TOLD | {"other": 1}).encode(),
        json.dumps(_TOLD | {"day": None}).encode(),
    ],
)
def test_what_is_no_beginning_is_refused(line: bytes) -> None:
    seal = b'{"signature":""}\n'
    with pytest.raises(BadBeginningError, match="cannot be read"):
        decode_beginning(CHAIN, line + b"\n" + seal)
    with pytest.raises(BadBeginningError, match="cannot be read"):
        decode_beginning(CHAIN, encode_beginning(CHAIN, WHOLE, None).partition(b"\n")[0] + b"\n" + line + b"\n")


async def test_the_ended_chain_stays_ended(tmp_path: Path, redis: RedisClient) -> None:
    async with rig_in(f"file://{tmp_path}/audit", redis) as rig:
        segment: Segment = rig.writer.seal([Entry(rig.now_s, Kind.END, {})])
        await rig.store.put(segment)
        await rig.heads.write(CHAIN, Head(segment.last, segment.link))
        rig.now_s += 100 * DAY_S
        await rig.keep(1)
        assert await rig.problems() == []
        assert (await rig.store.beginning(CHAIN)).is_ended
        await rig.write_day()
        assert "can be there" in (await rig.problems())[0]


async def test_only_a_leader_forgets(rig: Rig) -> None:
    config = AuditConfig(store="file:///x", retention_days=1, prune_s=0.001)
    buffer = AuditBuffer(config, lambda: rig.now_s)
    retention = Retention(buffer, rig.store, rig.heads, config, SIGNER, lambda: rig.now_s)
    asked = asyncio.Event()
    answers = iter([False, False, True])

    def is_leader() -> bool:
        answer = next(answers, None)
        if answer is None:
            asked.set()
        return bool(answer)

    async with asyncio.timeout(30.0), asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(retention.run(is_leader)), tasks.create_task(rig.seal(buffer))]
        await asked.wait()
        for task in running:
            task.cancel()
    assert (await kept_days(rig), len(rig.told)) == (1, 1)


async def test_a_round_that_fails_ends_neither_the_rounds_nor_the_router(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = AuditConfig(store="file:///x", retention_days=1, prune_s=0.001)
    third = asyncio.Event()
    rounds = iter([KeyError("of a mistake of ours"), OSError("of a storage that is away")])

    class Fails(SegmentStore):
        async def chains(self) -> list[str]:
            for error in rounds:
                raise error
            third.set()
            return []

    store = Fails(open_object_store(f"file://{tmp_path}/audit"))
    buffer = AuditBuffer(config, lambda: rig.now_s)
    retention = Retention(buffer, store, rig.heads, config, SIGNER, lambda: rig.now_s)
    running = asyncio.create_task(retention.run(lambda: True))
    async with asyncio.timeout(30.0):
        await third.wait()
    running.cancel()
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
