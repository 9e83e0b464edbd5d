"""The one source of a router's engines, by what its configuration names."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rempart_platform.config import RouterConfig
from rempart_platform.endpoints.discovery import DiscoveryObserver
from rempart_platform.endpoints.dns import DnsSource
from rempart_platform.endpoints.source import EndpointSource, MergedSource
from rempart_platform.endpoints.static import StaticSource


@asynccontextmanager
async def open_source(config: RouterConfig, observer: DiscoveryObserver) -> AsyncIterator[EndpointSource]:
    """A list, a name, or Services.

    Raises:
        ValueError: Kubernetes is to be asked, and nothing says where it is.
    """
    if config.engines_kubernetes:
        # Here and not above: it takes half a second to import, which nobody who lists engines needs to wait.
        from rempart_platform.cluster.kubernetes_api import connect_kubernetes
        from rempart_platform.endpoints.kubernetes import ServiceSource

        async with connect_kubernetes() as client:
            settings, rng = config.discovery.kubernetes, random.Random()
            yield MergedSource(
                [ServiceSource(client, service, settings, observer, rng) for service in config.engines_kubernetes]
            )
    elif config.engines_dns is not None:
        yield DnsSource(*config.engines_dns, config.discovery.dns, observer)
    else:
        yield StaticSource(config.engines)
