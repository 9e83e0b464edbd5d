"""The audit log in a folder and in a bucket, checked and read as operators do it."""

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from rempart_platform.audit.chain import Segment
from rempart_platform.audit.heads import HeadStore
from rempart_platform.audit.log import AuditLog, open_audit_log
from rempart_platform.audit.store import ForeignSegmentError, SegmentStore
from rempart_platform.audit.testing import write_chain
from rempart_platform.audit.values import AuditConfig
from rempart_platform.audit.verify import Wanted, read_records, verify
from rempart_platform.cli import app
from rempart_platform.console import audit_commands
from rempart_platform.generation import Caller, GenerationRequest
from rempart_platform.object_store import open_object_store
from rempart_platform.request_trace import RequestTrace
from rempart_platform.tenancy.embedded import EmbeddedRedis, EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.keyspace import AUDIT_HEADS
from rempart_platform.tenancy.redis_client import RedisClient, connect_redis
from rempart_platform.tenancy.testing import patient
from rempart_protos.v1 import sampling_pb2


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedRedis]:
    async with embedded_redis(EmbeddedRedisConfig()) as server:
        yield server


@pytest.fixture
async def redis(server: EmbeddedRedis) -> AsyncIterator[RedisClient]:
    async with connect_redis(patient(server.url)) as redis:
        yield redis


@asynccontextmanager
async def audit_log(
    audit_url: str,
    redis: RedisClient,
    registry: CollectorRegistry | None = None,
    *,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> AsyncIterator[AuditLog]:
    config = replace(AuditConfig(store=audit_url, seal_s=0.01, close_timeout_s=60.0), **changes)
    async with open_audit_log(config, redis, registry or CollectorRegistry(), "digest") as log:
        assert log is not None
        yield log


def trace(tenant: str) -> RequestTrace:
    sampling = sampling_pb2.SamplingParams(max_tokens=20)
    return RequestTrace(GenerationRequest("id", Caller(tenant, "key"), "model", (5,), sampling), 1.0, ended_s=2.0)


async def write_two_chains(audit_url: str, redis: RedisClient, **changes: object) -> None:
    for tenant in ("acme", "other"):
        async with audit_log(audit_url, redis, changes={"max_segment_records": 2, **changes}) as log:
            for _ in range(5):
                log.request_ended(trace(tenant))


async def test_what_routers_wrote_is_right_and_can_be_read(audit_url: str, redis: RedisClient) -> None:
    await write_two_chains(audit_url, redis)
    store = SegmentStore(open_object_store(audit_url))
    told: list[int] = []
    done = await verify(store, heads=HeadStore(redis), progress=lambda done: told.append(done.num_records))
    assert (done.num_chains, done.num_records, done.problems) == (2, 14, [])
    assert (len(told), told[-1]) == (done.num_segments, 14)
    records = [record async for record in read_records(store, Wanted(tenant="acme"))]
    assert [record["kind"] for record in records] == ["request"] * 5
    day = str(records[0]["at"])[:10]
    of_day = [record async for record in read_records(store, Wanted(day=day, kind="end"))]
    assert len(of_day) == 2
    assert not [record async for record in read_records(store, Wanted(day="1999-12-31"))]


async def test_a_segment_is_never_overwritten(audit_url: str) -> None:
    store = SegmentStore(open_object_store(audit_url))
    segment = Segment("chains/c/2026-11-25/0000000000000000.jsonl", b"first", 0, b"")
    await store.put(segment)
    await store.put(segment)
    with pytest.raises(ForeignSegmentError, match="is another"):
        await store.put(replace(segment, data=b"second"))
    assert await store.get(segment.path) == b"first"


async def test_a_segment_is_stored_when_its_disk_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file and every folder that it is found by; a disk that fails is a store that is away."""
    folder = tmp_path / "audit"
    store = SegmentStore(open_object_store(f"file://{folder}"))
    segment = Segment("chains/c/2026-11-25/0000000000000000.jsonl", b"first", 0, b"")
    synced: set[int] = set()
    failing = {folder.resolve()}

    def fsync(opened: int) -> None:
        if Path(f"/proc/self/fd/{opened}").resolve() in failing:
            raise OSError(errno.EIO, "the disk is broken")
        synced.add(os.fstat(opened).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="the disk is broken"):
        await store.put(segment)
    failing.clear()
    synced.clear()
    await store.put(segment)  # the same again, as the sealer does: it is there, and not yet safe
    places = (segment.path, "chains/c/2026-11-25", "chains/c", "chains", ".")
    assert synced == {(folder / place).stat().st_ino for place in places}


async def test_metrics_tell_what_was_sealed(tmp_path: Path, redis: RedisClient) -> None:
    registry = CollectorRegistry()
    async with audit_log(f"file://{tmp_path}", redis, registry) as log:
        log.request_ended(trace("acme"))
        assert registry.get_sample_value("rempart_router_audit_buffered_records") == 2
        assert registry.get_sample_value("rempart_router_audit_behind_seconds") is not None
    value = registry.get_sample_value
    assert value("rempart_router_audit_records_total", {"kind": "request"}) == 1
    assert value("rempart_router_audit_buffered_records") == 0
    assert value("rempart_router_audit_behind_seconds") == 0
    assert value("rempart_router_audit_lost_records_total") == 0
    assert value("rempart_router_audit_seal_failures_total") == 0
    assert (value("rempart_router_audit_segments_total") or 0) >= 1


async def test_no_store_keeps_no_log(redis: RedisClient) -> None:
    async with open_audit_log(AuditConfig(), redis, CollectorRegistry(), "") as log:
        assert log is None


@pytest.mark.parametrize("changes", [{"store": "ftp://x"}, {"signing_key": "/nowhere"}])
async def test_what_cannot_be_used_is_refused_at_the_start(
    tmp_path: Path, redis: RedisClient, changes: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"ftp://x|/nowhere"):
        async with audit_log(f"file://{tmp_path}", redis, changes=changes):
            pass


async def test_a_chain_goes_on_while_redis_is_away(tmp_path: Path) -> None:
    audit_url = f"file://{tmp_path}/audit"
    async with connect_redis(patient("unix:///nowhere")) as away, audit_log(audit_url, away) as log:
        log.request_ended(trace("acme"))
    assert (await verify(SegmentStore(open_object_store(audit_url)))).problems == []


async def test_a_chain_goes_on_while_redis_takes_no_writes(tmp_path: Path, redis: RedisClient) -> None:
    """As when its disk is full, or when it misses its replicas."""
    audit_url = f"file://{tmp_path}/audit"
    await redis.call(lambda redis: redis.config_set("min-replicas-to-write", 1))
    async with audit_log(audit_url, redis) as log:
        log.request_ended(trace("acme"))
    done = await verify(SegmentStore(open_object_store(audit_url)))
    assert (done.num_records, done.problems) == (3, [])


async def test_a_router_that_stops_gives_up_a_store_that_is_away(
    tmp_path: Path, redis: RedisClient, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "chains").write_text("no folder")
    async with audit_log(f"file://{tmp_path}", redis, changes={"close_timeout_s": 0.1}) as log:
        log.request_ended(trace("acme"))
    assert "records of the audit log are lost" in caplog.messages


def run(*args: str) -> tuple[int, dict[str, Any], str]:
    result = CliRunner().invoke(app, ["audit", *args, "--json"], env={"REMPART_REDIS_URL": ""})
    return result.exit_code, json.loads(result.stdout or "{}"), result.stderr


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, str]:
    """Files of a private and of its public key."""
    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return str(private), str(public)


async def test_the_command_names_what_is_missing_and_leaves_with_1(
    tmp_path: Path, server: EmbeddedRedis, redis: RedisClient, keys: tuple[str, str]
) -> None:
    private, public = keys
    audit_url = f"file://{tmp_path}/audit"
    await write_two_chains(audit_url, redis, signing_key=private)
    ask = ("verify", audit_url, "--redis-url", server.url, "--public-key", public)
    exit_code, said, _ = await asyncio.to_thread(run, *ask)
    assert (exit_code, said["problems"], said["chains"], said["records"]) == (0, [], 2, 14)

    segments = sorted((tmp_path / "audit").rglob("*.jsonl"))
    segments[-1].unlink()
    assert (await asyncio.to_thread(run, "verify", audit_url))[0] == 0  # nobody else knows how long it was
    exit_code, said, _ = await asyncio.to_thread(run, *ask)
    (problem,) = said["problems"]
    assert (exit_code, "the chain ends here, but it had 7 records" in problem) == (1, True)

    for segment in segments[: len(segments) // 2]:
        segment.unlink()
    exit_code, said, _ = await asyncio.to_thread(run, *ask)
    assert (exit_code, len(said["problems"])) == (1, 2)


async def test_a_chain_of_whom_nobody_heard_is_found(
    tmp_path: Path, server: EmbeddedRedis, keys: tuple[str, str]
) -> None:
    forged = tmp_path / "audit"
    for path, data in write_chain([2, 2]).segments.items():
        (forged / path).parent.mkdir(parents=True, exist_ok=True)
        (forged / path).write_bytes(data)
    audit_url = f"file://{forged}"
    assert (await asyncio.to_thread(run, "verify", audit_url))[0] == 0
    for proof in (("--redis-url", server.url), ("--public-key", keys[1])):
        exit_code, said, _ = await asyncio.to_thread(run, "verify", audit_url, *proof)
        assert exit_code == 1
        assert "never heard of it" in str(said["problems"]) or "not signed with the given key" in str(said["problems"])


def test_the_command_says_what_it_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    audit_url = f"file://{tmp_path}/audit"
    for args, said in (
        (("verify", "http://x"), "is neither file"),
        (("verify", audit_url, "--public-key", "/nowhere"), "--public-key: /nowhere"),
        (("verify", audit_url, "--redis-url", "unix:///nowhere"), "Redis does not answer"),
        (("verify", audit_url, "--redis-url", "no url"), "--redis-url: "),
        (("verify", audit_url), "holds no audit log"),
        (("show", audit_url, "--day", "25.11.2026"), "--day: '25.11.2026' is no day such as 2026-11-25"),
        (("verify", f"{audit_url}-mistyped"), f"there is no folder {tmp_path}/audit-mistyped"),
        (("show", f"{audit_url}-mistyped"), f"there is no folder {tmp_path}/audit-mistyped"),
    ):
        exit_code, _, error = run(*args)
        assert (exit_code, said in error) == (2, True), error
    assert [path.name for path in tmp_path.iterdir()] == ["audit"], "reading makes nothing"


async def test_what_redis_says_and_nobody_can_read_is_a_problem_of_that_chain(
    tmp_path: Path, server: EmbeddedRedis, redis: RedisClient
) -> None:
    audit_url = f"file://{tmp_path}/audit"
    await write_two_chains(audit_url, redis)
    chain = sorted(path.name for path in (tmp_path / "audit" / "chains").iterdir())[0]
    await redis.write_hash(AUDIT_HEADS, {chain: "nonsense"})
    exit_code, said, _ = await asyncio.to_thread(run, "verify", audit_url, "--redis-url", server.url)
    assert (exit_code, said["chains"]) == (1, 2)
    assert said["problems"] == [f"chain {chain}: what Redis says of it cannot be read"]


async def test_gaps_are_counted(tmp_path: Path, redis: RedisClient) -> None:
    audit_url = f"file://{tmp_path}/audit"
    async with audit_log(audit_url, redis, changes={"max_buffered": 1, "when_full": "drop"}) as log:
        for _ in range(3):
            log.request_ended(trace("acme"))
    exit_code, said, _ = await asyncio.to_thread(run, "verify", audit_url)
    assert (exit_code, said["problems"], said["lost"]) == (0, [], 3)


async def test_no_record_commands_the_terminal_of_who_reads_it(tmp_path: Path, redis: RedisClient) -> None:
    """Anybody may call the Admin service, and what they ask for is recorded though it is refused."""
    audit_url, hostile = f"file://{tmp_path}/audit", "\x1b[2J\u202e\n2026-11-25  outcome who=admin"
    async with audit_log(audit_url, redis) as log:
        log.act_refused({"act": "create_tenant", "tenant": hostile}, "invalid_api_key")
    shown = await asyncio.to_thread(CliRunner().invoke, app, ["audit", "show", audit_url, "--kind", "outcome"])
    (line,) = shown.stdout.splitlines()
    assert line.isprintable()
    assert ' who=""' in line
    assert r'tenant="\u001b[2J\u202e\n2026-11-25  outcome who=admin"' in line


async def test_who_stops_reading_is_not_taken_for_the_store(
    tmp_path: Path, redis: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    await write_two_chains(f"file://{tmp_path}/audit", redis)
    monkeypatch.setattr(audit_commands, "_one_line", stop)
    shown = await asyncio.to_thread(CliRunner().invoke, app, ["audit", "show", f"file://{tmp_path}/audit"])
    assert (shown.exit_code, shown.stderr) == (1, "")


async def test_show_prints_records_for_people_and_for_programs(tmp_path: Path, redis: RedisClient) -> None:
    audit_url = f"file://{tmp_path}/audit"
    await write_two_chains(audit_url, redis)
    shown = await asyncio.to_thread(CliRunner().invoke, app, ["audit", "show", audit_url, "--tenant", "acme", "--json"])
    records = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [(record["tenant"], record["kind"]) for record in records] == [("acme", "request")] * 5
    shown = await asyncio.to_thread(CliRunner().invoke, app, ["audit", "show", audit_url, "--kind", "end"])
    assert [line.split()[1] for line in shown.stdout.splitlines()] == ["end", "end"]
    segment = sorted((tmp_path / "audit").rglob("*.jsonl"))[0]
    segment.write_bytes(segment.read_bytes().replace(b"{", b"\xff"))
    shown = await asyncio.to_thread(CliRunner().invoke, app, ["audit", "show", audit_url])
    assert (shown.exit_code, "no record" in shown.stderr) == (2, True)
