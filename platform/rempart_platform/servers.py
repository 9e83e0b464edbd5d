"""The listening side of a router: HTTP, gRPC and metrics, each on a port of its own, with an orderly end."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server
from starlette.types import ASGIApp

from rempart_platform.apis.admin import AdminServicer
from rempart_platform.apis.batch_grpc import BatchesServicer
from rempart_platform.apis.grpc import InferenceServicer
from rempart_platform.apis.http_server import HttpServer
from rempart_platform.config import RouterConfig
from rempart_platform.readiness import ADMIN, BATCHES, INFERENCE, Readiness
from rempart_protos.v1 import admin_pb2_grpc, batch_pb2_grpc, inference_pb2_grpc


@asynccontextmanager
async def http_server(app: ASGIApp, config: RouterConfig) -> AsyncIterator[tuple[HttpServer, str]]:
    """Serves HTTP; gives the server, for its `should_exit`, and its URL.

    Leaving takes no new request and waits for the running ones, at most `drain_timeout_s`.

    Raises:
        OSError: the port is taken.
    """
    listener = socket.create_server((config.host, config.http_port), family=_family(config.host), backlog=2048)
    server = HttpServer(app, config.http, drain_timeout_s=max(round(config.drain_timeout_s), 1))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve(sockets=[listener]))
        try:
            yield server, f"http://{_authority(config.host, listener.getsockname()[1])}"
        finally:
            server.should_exit = True


@asynccontextmanager
async def grpc_server(
    inference: InferenceServicer,
    batches: BatchesServicer,
    admin: AdminServicer,
    readiness: Readiness,
    config: RouterConfig,
) -> AsyncIterator[str]:
    """Serves gRPC; gives its address. Leaving as with HTTP.

    Raises:
        RuntimeError: the port is taken.
    """
    server = grpc.aio.server(options=config.grpc.server_options(), maximum_concurrent_rpcs=config.max_concurrent_rpcs)
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    batch_pb2_grpc.add_BatchesServicer_to_server(batches, server)
    admin_pb2_grpc.add_AdminServicer_to_server(admin, server)
    health_pb2_grpc.add_HealthServicer_to_server(readiness.servicer, server)
    names = (INFERENCE, BATCHES, ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    port = server.add_insecure_port(_authority(config.host, config.grpc_port))
    await server.start()
    try:
        yield _authority(config.host, port)
    finally:
        await server.stop(grace=config.drain_timeout_s)


@asynccontextmanager
async def metrics_server(registry: CollectorRegistry, config: RouterConfig) -> AsyncIterator[str]:
    """Serves metrics from a thread of its own, also while the event loop is busy; gives their URL.

    Raises:
        OSError: the port is taken.
    """
    server, thread = start_http_server(config.metrics_port, addr=config.host, registry=registry)
    try:
        yield f"http://{_authority(config.host, server.server_port)}/metrics"
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
