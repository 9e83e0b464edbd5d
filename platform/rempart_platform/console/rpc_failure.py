"""A failed call to a router, in one line for the person at the console."""

from typing import Protocol

import grpc


class RpcFailure(Protocol):
    """What every kind of gRPC error has."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...


def failed_call(error: grpc.RpcError) -> grpc.Call:
    """What a call raises is the call."""
    assert isinstance(error, grpc.Call)
    return error


def describe(error: RpcFailure, address: str) -> str:
    """What went wrong; for a caller's own mistakes, what the router says of them."""
    details = " ".join((error.details() or "").split())
    match error.code():
        case grpc.StatusCode.UNAVAILABLE if "connect" in details:
            return f"no router answers at {address}: {details}"
        case grpc.StatusCode.UNAUTHENTICATED:
            return f"the router at {address} refuses the key: {details}"
        case code:
            return f"{code.name}: {details}"
