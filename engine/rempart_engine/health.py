"""grpc.health.v1 of an engine: "" is liveness, "rempart.v1.Engine" is readiness."""

from grpc_health.v1 import health, health_pb2

from rempart_protos.v1 import engine_pb2

LIVENESS = ""
READINESS = engine_pb2.DESCRIPTOR.services_by_name["Engine"].full_name

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class EngineHealth:
    """Alive at once, ready once the model is loaded, never ready again after draining began or the core was lost."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()
        self._is_over = False

    async def loading(self) -> None:
        await self.servicer.set(READINESS, _NOT_SERVING)

    async def ready(self) -> None:
        if not self._is_over:
            await self.servicer.set(READINESS, _SERVING)

    async def draining(self) -> None:
        self._is_over = True
        await self.servicer.set(READINESS, _NOT_SERVING)

    async def core_lost(self) -> None:
        self._is_over = True
        await self.servicer.set(READINESS, _NOT_SERVING)
        await self.servicer.set(LIVENESS, _NOT_SERVING)
