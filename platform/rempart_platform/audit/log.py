"""A router's audit log: every admin act and every request's metadata, append-only and chained by hashes.

request ended ─► buffer ──────────┐
                                  ├─► sealer, every second ─► object storage, head in Redis
admin act ─► buffer, and waits ───┘
              before it is done, and before it is answered
"""

import asyncio
import logging
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

from google.protobuf.message import Message
from prometheus_client import CollectorRegistry

from rempart_platform.audit.buffer import AuditBuffer
from rempart_platform.audit.chain import ChainWriter
from rempart_platform.audit.heads import HeadStore
from rempart_platform.audit.metrics import AuditMetrics
from rempart_platform.audit.records import cut, message_fields, request_fields
from rempart_platform.audit.retention import Retention
from rempart_platform.audit.sealer import Sealer
from rempart_platform.audit.signing import read_signing_key
from rempart_platform.audit.store import SegmentStore
from rempart_platform.audit.values import AuditConfig, Kind
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.object_store import open_object_store
from rempart_platform.request_trace import RequestTrace
from rempart_platform.tenancy.redis_client import RedisClient

_logger = logging.getLogger(__name__)
_MAX_HOST_CHARS = 40
_MAX_WHO_CHARS = 255
_NOTHING_DONE = "Nothing was done."


class AuditLog:
    """What the rest of a router tells its audit log; made by `open_audit_log`."""

    def __init__(self, buffer: AuditBuffer, config: AuditConfig, retention: Retention | None = None) -> None:
        self._buffer = buffer
        self._config = config
        self.retention = retention
        """Runs beside it while the router leads; None where everything is kept."""

    def require_room(self) -> None:
        """Raises RempartError UNAVAILABLE when a new request could not be recorded, and must therefore not run."""
        if self._config.when_full == "refuse" and self._buffer.is_full:
            raise RempartError(
                ErrorKind.UNAVAILABLE,
                f"The audit log cannot be stored, and {self._config.max_buffered} records wait (audit_max_buffered).",
                retry_after_s=self._config.max_backoff_s,
            )

    def request_ended(self, trace: RequestTrace) -> None:
        """Records a request once, at its end; waits for nothing."""
        # What no engine saw may be lost in a flood; what one worked for was promised a record when it was admitted.
        room = self._config.max_buffered if self._config.when_full == "drop" else None
        if not trace.endpoints:
            room = self._config.room_for_refused
        self._buffer.add(Kind.REQUEST, request_fields(trace), room=room)

    def act_refused(self, fields: dict[str, str], outcome: str) -> None:
        """Records that somebody without the right asked for an admin act; waits for nothing.

        Of a flood the log tells the beginning and the size.
        """
        self._buffer.add_refused(fields | {"who": "", "outcome": outcome})

    def seeding(self, entry: str, tenant: str) -> None:
        """Records that an entry of the tenants' file is about to be put in force; waits for nothing."""
        fields = {"act": "apply_tenants_file", "who": "tenants file", "entry": cut(entry, _MAX_WHO_CHARS)}
        self._buffer.add(Kind.ACT, fields | {"tenant": tenant})

    @asynccontextmanager
    async def act(self, who: str, request: Message, fields: dict[str, str]) -> AsyncIterator[None]:
        """Around an admin act: its record is sealed before the block begins, its outcome before the block is left.

        Args:
            who: asks.
            request: what is asked; secrets are not recorded.
            fields: what is known of the act; those that the block adds are in the record of its outcome.

        Raises:
            RempartError: UNAVAILABLE: a record cannot be sealed. When it is the first, nothing has been done.
        """
        act_id = secrets.token_hex(8)
        who = cut(who, _MAX_WHO_CHARS)
        asked: dict[str, object] = {**fields, "act_id": act_id, "who": who, "request": message_fields(request)}
        if self._buffer.is_full:
            self._buffer.lose()
            raise self._cannot_store(_NOTHING_DONE)
        outcome = "not_begun"
        try:
            await self._sealed(Kind.ACT, asked, _NOTHING_DONE)
            outcome = "cancelled"
            yield
            outcome = "ok"
        except RempartError as error:
            if outcome == "cancelled":
                outcome = error.kind.name.lower()
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            ended = fields | {"act_id": act_id, "who": who, "outcome": outcome}
            if outcome in ("cancelled", "not_begun"):  # nobody waits for an answer, or there is one already
                self._buffer.add(Kind.OUTCOME, ended)
            else:
                await self._sealed(Kind.OUTCOME, ended, "What was asked for has been tried.")

    async def _sealed(self, kind: Kind, fields: Mapping[str, object], so_far: str) -> None:
        sealed = self._buffer.add_and_wait(kind, fields)
        try:
            async with asyncio.timeout(self._config.act_timeout_s):
                await sealed
        except TimeoutError:
            raise self._cannot_store(so_far) from None

    def _cannot_store(self, so_far: str) -> RempartError:
        message = f"The audit log cannot be stored, and no act goes without it. {so_far}"
        return RempartError(ErrorKind.UNAVAILABLE, message, retry_after_s=self._config.max_backoff_s)


@asynccontextmanager
async def open_audit_log(
    config: AuditConfig,
    redis: RedisClient,
    registry: CollectorRegistry,
    config_digest: str,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[AuditLog | None]:
    """A router's audit log with the task that seals it; None when the configuration names no store.

    Leaving seals what is left, and a last record that says that the router stopped.

    Raises:
        ValueError: the store's URL or the key cannot be used.
    """
    if not config.store:
        yield None
        return
    store = SegmentStore(open_object_store(config.store))
    signer = read_signing_key(Path(config.signing_key)) if config.signing_key else None
    writer = ChainWriter(new_chain_name(), signer)
    buffer, heads = AuditBuffer(config, clock), HeadStore(redis)
    sealer = Sealer(buffer, writer, store, heads, config, AuditMetrics(registry, buffer, clock))
    retention = Retention(buffer, store, heads, config, signer, clock) if config.retention_days else None
    genesis = {"version": version("rempart"), "config": config_digest, "public_key": writer.public_key.hex()}
    buffer.add(Kind.GENESIS, genesis)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(sealer.run())
        try:
            yield AuditLog(buffer, config, retention)
        finally:
            sealer.stop()
            await _wait_for_end(running, buffer, config.close_timeout_s)


async def _wait_for_end(running: asyncio.Task[None], buffer: AuditBuffer, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await running
    except TimeoutError:
        _logger.error("records of the audit log are lost", extra={"fields": {"num_lost": len(buffer)}})


def new_chain_name() -> str:
    """The host, which is the pod in a cluster, and 64 random bits."""
    host = re.sub(r"[^a-z0-9-]", "-", socket.gethostname().lower())[:_MAX_HOST_CHARS]
    return f"{host}-{secrets.token_hex(8)}"
