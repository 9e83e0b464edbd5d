"""A client of redis-py for each kind of URL, all with the same time-outs and without a retry of their own.

Behind Sentinels a connection that breaks asks them for the server of the moment; a server that became a replica says so
and is left. A cluster's commands go to the node of their keys' slot, and follow it when it moves.
"""

import asyncio
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from rempart_platform.tenancy.redis_url import RedisServers, parse_redis_url


@asynccontextmanager
async def open_redis(url: str, timeout_s: float, max_connections: int) -> AsyncIterator[Redis]:
    """A client whose connections are opened when first needed.

    Args:
        url: as in `redis_url.py`.
        timeout_s: for a connection and for an answer, each.
        max_connections: of the client; of a cluster's client, to each node.

    Raises:
        ValueError: the URL is malformed.
    """
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        # RESP2 and no CLIENT SETINFO: nothing that Redis 7.0 would refuse, and fewer round trips to connect.
        "protocol": 2,
        "driver_info": None,
    }
    servers = parse_redis_url(url)
    if servers is not None:
        options |= servers.tls
    if servers is None:
        client = _single(url, max_connections, options)
    elif servers.kind == "cluster":
        client = _cluster(servers, max_connections, options)
    else:
        async with _sentinel(servers, max_connections, options) as client:
            yield client
        return
    try:
        yield client
    finally:
        await client.aclose()


def is_lost_connection(error: Exception) -> bool:
    """Whether an AttributeError or TypeError only says that a connection was closed under whoever wrote to it.

    redis-py 8.1 lets these out where it means a ConnectionError: by a peer that closes an idle connection, and by a
    cluster's client that starts anew while others are in use. They come from its connection or from asyncio's.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module: str = frames[-1].f_globals.get("__name__", "") if frames else ""
    return module == "redis.asyncio.connection" or module.startswith("asyncio.")


@contextmanager
def cancellation_kept() -> Iterator[None]:
    """Raises CancelledError at its end when the task was cancelled inside, whatever became of that there.

    redis-py sends by `asyncio.wait_for`, and Python 3.11's swallows a cancellation that comes as it ends.
    """
    task = asyncio.current_task()
    assert task is not None, "only tasks wait"
    num_before = task.cancelling()
    try:
        yield
    finally:
        if task.cancelling() > num_before:
            raise asyncio.CancelledError


def _no_retry() -> Retry:
    return Retry(NoBackoff(), 0)


def _single(url: str, max_connections: int, options: dict[str, Any]) -> Redis:
    pool = ConnectionPool.from_url(
        url, max_connections=max_connections, retry=_no_retry(), decode_responses=True, **options
    )
    return Redis.from_pool(pool)


@asynccontextmanager
async def _sentinel(servers: RedisServers, max_connections: int, options: dict[str, Any]) -> AsyncIterator[Redis]:
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        servers.hosts,
        sentinel_kwargs={
            **options,
            **servers.sentinel_credentials,
            "retry": _no_retry(),
            "decode_responses": True,
        },
        **options,
        **servers.credentials,
    )
    client = sentinel.master_for(
        servers.master_name,
        db=servers.db,
        max_connections=max_connections,
        retry=_no_retry(),
        decode_responses=True,
    )
    try:
        yield client
    finally:
        await client.aclose()
        for each in sentinel.sentinels:
            await each.aclose()


def _cluster(servers: RedisServers, max_connections: int, options: dict[str, Any]) -> Redis:
    client = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in servers.hosts],
        max_connections=max_connections,
        retry=_no_retry(),
        decode_responses=True,
        # A shard without a server refuses its own keys and no others.
        require_full_coverage=False,
        **(options | servers.credentials),
    )
    return cast(Redis, client)  # the same commands; what is asked of it here it has all
