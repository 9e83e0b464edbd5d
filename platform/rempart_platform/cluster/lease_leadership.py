"""Leadership by a Lease of Kubernetes: who holds it leads, and who cannot renew it stops before another can take it.

    candidate ── lease free, or unchanged for lease_s ──► leader ── every retry_s ──► renewed
        ▲                                                   │ no renewal for renew_s, or another holds it
        └───────────────────────────────────────────────────┘

No clock is compared with another machine's: a candidate measures by its own how long the lease has not changed, and a
leader counts from the moment it asked for the renewal, which is before the API server took it. So with renew_s below
lease_s there are never two, as long as both clocks run at about the same speed.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from http import HTTPStatus

from kubernetes_asyncio.client import ApiClient, CoordinationV1Api, V1Lease, V1LeaseSpec, V1ObjectMeta
from kubernetes_asyncio.client.exceptions import ApiException

from rempart_platform.cluster.kubernetes_api import KUBERNETES_AWAY, reason_of
from rempart_platform.cluster.leadership import LeaseConfig

_logger = logging.getLogger(__name__)

_AWAY = (*KUBERNETES_AWAY, ValueError)
"""A ValueError: what was answered is no Lease."""


class LeaseLeadership:
    """A candidate for a Lease.

    Args:
        client: of the Kubernetes API; shared, and closed by its owner.
        name: namespace and name of the Lease, which is made when it is not there.
        identity: of this candidate; no other has the same.
        config: times.
        clock: monotonic seconds.
        pause: between two tries, for that many seconds.
    """

    def __init__(
        self,
        client: ApiClient,
        name: tuple[str, str],
        identity: str,
        config: LeaseConfig,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._api = CoordinationV1Api(client)
        self._namespace, self._name = name
        self._identity = identity
        self._config = config
        self._clock = clock
        self._pause = pause
        self._leads_until_s = -1.0
        self._seen = ("", "")  # holder and resourceVersion of the lease as it was last seen
        self._seen_s = clock()
        self._failure = ""
        self._led = False

    def is_leader(self) -> bool:
        """True only while a renewal is recent enough, even if this process was stopped for a while in between."""
        return self._clock() < self._leads_until_s

    async def run(self) -> None:
        """Tries to lead, and to go on leading, until cancelled; then gives the lease up."""
        try:
            while True:
                await self._try_once()
                self._log_change()
                await self._pause(self._config.retry_s)
        finally:
            await self._give_up()

    async def _try_once(self) -> None:
        asked_s = self._clock()
        try:
            # Longer than this an answer is of no use: whoever leads has to stop.
            async with asyncio.timeout(self._config.renew_s):
                has_it = await self._take_or_renew()
        except _AWAY as error:
            self._log_failure(error)
            return
        self._failure = ""
        self._leads_until_s = asked_s + self._config.renew_s if has_it else -1.0

    async def _take_or_renew(self) -> bool:
        try:
            lease = await self._read()
        except ApiException as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            lease = V1Lease(metadata=V1ObjectMeta(name=self._name), spec=self._renewed(None))
            await self._api.create_namespaced_lease(self._namespace, lease, _request_timeout=self._config.retry_s)
            return True
        if not self._may_take(lease):
            return False
        lease.spec = self._renewed(_spec_of(lease))
        # Refused as a conflict when anybody changed it since it was read.
        await self._replace(lease)
        return True

    async def _read(self) -> V1Lease:
        lease = await self._api.read_namespaced_lease(
            self._name, self._namespace, _request_timeout=self._config.retry_s
        )
        if not isinstance(lease.metadata, V1ObjectMeta):  # the client makes an empty Lease of whatever is no Lease
            raise ValueError("no Lease was answered")
        return lease

    async def _replace(self, lease: V1Lease) -> None:
        await self._api.replace_namespaced_lease(
            self._name, self._namespace, lease, _request_timeout=self._config.retry_s
        )

    def _may_take(self, lease: V1Lease) -> bool:
        spec = _spec_of(lease) or V1LeaseSpec()
        holder = spec.holder_identity or ""
        seen = (holder, lease.metadata.resource_version)
        if seen != self._seen:
            self._seen, self._seen_s = seen, self._clock()
        lease_s = spec.lease_duration_seconds or self._config.lease_s
        return holder in ("", self._identity) or self._clock() - self._seen_s >= lease_s

    def _renewed(self, spec: V1LeaseSpec | None) -> V1LeaseSpec:
        now = datetime.now(UTC)
        now = now.replace(microsecond=now.microsecond | 1)  # never 0, which would be left out and refused
        is_mine = spec is not None and spec.holder_identity == self._identity
        return V1LeaseSpec(
            holder_identity=self._identity,
            lease_duration_seconds=math.ceil(self._config.lease_s),
            acquire_time=spec.acquire_time if spec is not None and is_mine else now,
            renew_time=now,
            lease_transitions=0 if spec is None else (spec.lease_transitions or 0) + (not is_mine),
        )

    async def _give_up(self) -> None:
        """So that the next one need not wait for the lease to end."""
        was_leader, self._leads_until_s = self.is_leader(), -1.0
        if not was_leader:
            return
        try:
            async with asyncio.timeout(self._config.retry_s):
                lease = await self._read()
                spec = _spec_of(lease)
                if spec is not None and spec.holder_identity == self._identity:
                    spec.holder_identity = ""
                    await self._replace(lease)
        except _AWAY as error:
            _logger.info("the lease was not given up, and ends by itself", extra={"reason": str(error)})

    def _log_failure(self, error: BaseException) -> None:
        reason = reason_of(error)
        if reason == self._failure or reason == str(HTTPStatus.CONFLICT.value):  # another was faster: as it should be
            return
        self._failure = reason
        name = f"{self._namespace}/{self._name}"
        _logger.warning("cannot reach the lease of the leader", extra={"lease": name, "reason": str(error)[:500]})

    def _log_change(self) -> None:
        leads = self.is_leader()
        if leads != self._led:
            self._led = leads
            text = "this router leads" if leads else "this router leads no more"
            _logger.info(text, extra={"identity": self._identity})


def _spec_of(lease: V1Lease) -> V1LeaseSpec | None:
    """A Lease may be without, whatever the client's types say."""
    return lease.spec
