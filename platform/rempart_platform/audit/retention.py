"""Forgets what is older than it is to be kept: whole segments, from the beginning of a chain on.

old segments ─► are they as they were written? ─► a record in our own chain ─► the new beginning ─► they are removed
                  └─ no: nothing is removed                                    Redis, then storage

Whatever ends it between two steps, the next round goes on, and what remains can be verified at any time.
"""

import asyncio
import logging
from collections.abc import Callable

from rempart_platform.audit.buffer import AuditBuffer
from rempart_platform.audit.chain import day_text
from rempart_platform.audit.check import BadChainError, ChainReader
from rempart_platform.audit.heads import HeadStore
from rempart_platform.audit.signing import Signer
from rempart_platform.audit.store import STORE_ERRORS, ForeignSegmentError, SegmentStore
from rempart_platform.audit.values import AuditConfig, Kind
from rempart_platform.errors import RempartError

_logger = logging.getLogger(__name__)
_DAY_S = 86_400


class Retention:
    """Removes what is too old, of the chains of all routers.

    Args:
        buffer: of this router's chain, which tells what was removed.
        store: where the chains are.
        heads: told before anything is removed.
        config: for how long what is kept.
        signer: signs beginnings.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        buffer: AuditBuffer,
        store: SegmentStore,
        heads: HeadStore,
        config: AuditConfig,
        signer: Signer | None,
        clock: Callable[[], float],
    ) -> None:
        self._buffer = buffer
        self._store = store
        self._heads = heads
        self._config = config
        self._signer = signer
        self._clock = clock

    async def run(self, is_leader: Callable[[], bool]) -> None:
        """Removes again and again while this router leads, until cancelled."""
        while True:
            if is_leader():
                try:
                    await self.remove_old()
                except (RempartError, *STORE_ERRORS) as error:
                    fields = {"error": repr(error)}
                    _logger.warning("old segments of the audit log could not be removed", extra={"fields": fields})
                except Exception:
                    # Requests of this router go on.
                    _logger.exception("old segments of the audit log could not be removed")
            await asyncio.sleep(self._config.prune_s)

    async def remove_old(self) -> None:
        """One round.

        Raises:
            One of STORE_ERRORS: the storage cannot serve, or no record could be sealed.
            RedisAwayError: Redis does not answer.
        """
        oldest_kept = day_text(self._clock() - self._config.retention_days * _DAY_S)
        for chain in await self._store.chains():
            days = [day for day in await self._store.days(chain) if day < oldest_kept]
            if not days:
                continue
            try:
                await self._remove(chain, days)
            except (BadChainError, ForeignSegmentError) as error:
                # It stays, for it is the evidence.
                fields = {"chain": chain, "error": str(error)}
                _logger.error("a chain of the audit log is not as it was written", extra={"fields": fields})

    async def _remove(self, chain: str, days: list[str]) -> None:
        before = await self._store.beginning(chain)
        reader = ChainReader(chain, beginning=before)
        async for path, data in self._store.segments(chain, days, first=before.first):
            await asyncio.to_thread(reader.take, path, data)
        after = reader.beginning
        if after.first > before.first:
            async with asyncio.timeout(self._config.act_timeout_s):
                removed = {"of_chain": chain, "through": after.day, "first": before.first, "last": after.first - 1}
                await self._buffer.add_and_wait(Kind.REMOVAL, removed)
            await self._heads.write_beginning(chain, after.first)
            await self._store.put_beginning(chain, after, self._signer)
        await self._store.remove(chain, days, before=after.first)
