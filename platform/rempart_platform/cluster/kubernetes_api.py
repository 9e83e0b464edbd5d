"""Where the Kubernetes API is: by a kubeconfig file, or as a service account in the cluster; and how it fails."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from kubernetes_asyncio.client import ApiClient, Configuration
from kubernetes_asyncio.client.exceptions import ApiException
from kubernetes_asyncio.config import ConfigException, load_incluster_config, load_kube_config
from yaml import YAMLError


class KubernetesError(Exception):
    """The API refused or made no sense.

    Args:
        reason: one of few words or an HTTP status, for a metric.
        message: what it said.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


KUBERNETES_AWAY = (KubernetesError, ApiException, aiohttp.ClientError, OSError)
"""All that says "not now": among them TimeoutError, which is an OSError. Anything else is a mistake of ours."""


def reason_of(error: BaseException) -> str:
    """One of few words for an error of KUBERNETES_AWAY."""
    match error:
        case KubernetesError():
            return error.reason
        case ApiException():
            return str(error.status)
        case TimeoutError():
            return "timeout"
        case _:
            return "connection"


def _kubeconfig() -> str:
    return str(Path(os.environ.get("KUBECONFIG") or "~/.kube/config").expanduser())


@asynccontextmanager
async def connect_kubernetes() -> AsyncIterator[ApiClient]:
    """A client by $KUBECONFIG, else by the pod's service account, else by ~/.kube/config. Connects when first used.

    Raises:
        ValueError: there is neither, or it cannot be read.
    """
    configuration = Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            await load_kube_config(_kubeconfig(), client_configuration=configuration, persist_config=False)
    except (ConfigException, OSError, TypeError, YAMLError) as error:  # TypeError: the file's shape is another
        raise ValueError(
            f"Kubernetes is to be asked, but there is no service account and no kubeconfig: {error}"
        ) from error
    async with ApiClient(configuration) as client:
        yield client
