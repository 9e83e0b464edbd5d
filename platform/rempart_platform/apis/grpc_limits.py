"""Limits of a gRPC server, as its channel options."""

from dataclasses import dataclass

from rempart_platform.bounds import require_positive


@dataclass(frozen=True, slots=True)
class GrpcLimits:
    """Limits of one gRPC server."""

    max_message_bytes: int = 4 * 1024 * 1024
    """Of one message that a client sends."""
    max_metadata_bytes: int = 64 * 1024
    """Of the metadata of a call."""
    max_streams: int = 100
    """Calls at a time on one connection."""
    handshake_timeout_s: float = 10.0
    """From the accept to the end of the handshake."""
    idle_timeout_s: float = 300.0
    """A connection without calls is closed."""
    keepalive_s: float = 30.0
    """A silent peer is pinged this often, and given up when it does not answer within as long."""
    min_ping_interval_s: float = 10.0
    """A client that pings more often without data is cut."""
    write_timeout_s: float = 30.0
    """How long a client may leave its flow-control window full."""

    def __post_init__(self) -> None:
        require_positive(self)

    def server_options(self) -> list[tuple[str, int]]:
        """For `grpc.aio.server(options=...)`."""
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.max_concurrent_streams", self.max_streams),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_timeout_s * 1000)),
            ("grpc.max_connection_idle_ms", int(self.idle_timeout_s * 1000)),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_s * 1000)),
            ("grpc.http2.min_ping_interval_without_data_ms", int(self.min_ping_interval_s * 1000)),
            ("grpc.so_reuseport", 0),
        ]
