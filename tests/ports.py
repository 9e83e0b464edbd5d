"""Ports for servers that must be found where they were: started again, or asked before they can say where they are."""

import random
import socket
from collections.abc import Iterator


def free_ports() -> Iterator[int]:
    """Different ports that nobody listens on, for as long as you ask.

    They lie below those that systems give to whoever asks for any, and to outgoing connections: such a port would be
    free when it is looked at, and taken before it is used.
    """
    candidates = range(20_000, 32_000)
    for port in random.sample(candidates, len(candidates)):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        yield port
