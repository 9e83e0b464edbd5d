"""The leadership that a router's configuration asks for, and the metric of it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

from prometheus_client import CollectorRegistry, Gauge

from rempart_platform.cluster.leadership import Leadership, OwnLeadership
from rempart_platform.config import RouterConfig


@asynccontextmanager
async def open_leadership(config: RouterConfig, registry: CollectorRegistry) -> AsyncIterator[Leadership]:
    """A candidate for the configured Lease while the block lasts; without one, every router leads.

    Raises:
        ValueError: a Lease is configured, and nothing says where Kubernetes is.
    """
    gauge = Gauge("rempart_is_leader", "1 while this router does what only one should do.", registry=registry)
    if config.leader_lease is None:
        leadership: Leadership = OwnLeadership()
        gauge.set_function(leadership.is_leader)
        yield leadership
        return
    # Here and not above: it takes half a second to import, which nobody without a Lease needs to wait.
    from rempart_platform.cluster.kubernetes_api import connect_kubernetes
    from rempart_platform.cluster.lease_leadership import LeaseLeadership

    async with connect_kubernetes() as client, asyncio.TaskGroup() as tasks:
        identity = f"{socket.gethostname()}_{uuid4().hex[:8]}"
        candidate = LeaseLeadership(client, config.leader_lease, identity, config.leader)
        gauge.set_function(candidate.is_leader)
        running = tasks.create_task(candidate.run(), name="leadership")
        try:
            yield candidate
        finally:
            running.cancel()
