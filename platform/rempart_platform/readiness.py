"""Whether a router can serve: an engine is ready or may be waited for, Redis has answered once, no drain has begun.

Told on `grpc.health.v1` (the services' names; "" is liveness) and on HTTP's /readyz.
"""

import asyncio
from collections.abc import Callable

from grpc_health.v1 import health, health_pb2

from rempart_platform.errors import RempartError
from rempart_platform.tenancy.redis_client import RedisClient
from rempart_protos.v1 import admin_pb2, batch_pb2, inference_pb2

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
BATCHES = batch_pb2.DESCRIPTOR.services_by_name["Batches"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
_REDIS_RETRY_S = 0.25
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Readiness:
    """Brings together what readiness depends on.

    Args:
        has_endpoint: whether some endpoint can be picked, or waited for.
    """

    def __init__(self, has_endpoint: Callable[[], bool]) -> None:
        self.servicer = health.aio.HealthServicer()
        self._has_endpoint = has_endpoint
        self._has_redis = False
        self._is_draining = False
        self._changed = asyncio.Event()
        self._was_ready = asyncio.Event()

    def is_ready(self) -> bool:
        return self._has_redis and not self._is_draining and self._has_endpoint()

    async def wait_until_ready(self) -> None:
        """Returns once the router has been ready for the first time."""
        await self._was_ready.wait()

    def check(self) -> None:
        """To be called when an endpoint changed."""
        self._changed.set()

    async def drain(self) -> None:
        """Not ready from now on."""
        self._is_draining = True
        await self._tell()

    async def run(self, redis: RedisClient) -> None:
        """Waits for Redis, then tells every change, until cancelled."""
        while not await _answers(redis):
            await self._tell()
            await asyncio.sleep(_REDIS_RETRY_S)
        self._has_redis = True
        while True:
            self._changed.clear()
            await self._tell()
            await self._changed.wait()

    async def _tell(self) -> None:
        is_ready = self.is_ready()
        has_records = self._has_redis and not self._is_draining
        await self.servicer.set("", _SERVING)
        await self.servicer.set(INFERENCE, _SERVING if is_ready else _NOT_SERVING)
        for name in (BATCHES, ADMIN):
            await self.servicer.set(name, _SERVING if has_records else _NOT_SERVING)
        if is_ready:
            self._was_ready.set()


async def _answers(redis: RedisClient) -> bool:
    try:
        await redis.call(lambda connection: connection.ping())
    except RempartError:
        return False
    return True
