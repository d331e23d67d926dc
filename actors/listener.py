"""The socket of the HTTP door, made before anything slow starts, so that a port in use is told at once."""

from __future__ import annotations

import socket

from pipeline.errors import ServiceError

_UNTAKEN_TIMEOUT_MS = 30_000
"""A client that takes nothing for so long is disconnected: otherwise it would hold its connection for ever."""


def listen(host: str, port: int, *, untaken_timeout_ms: int = _UNTAKEN_TIMEOUT_MS) -> socket.socket:
    """Return a socket that listens on `host`:`port` (0: a free one).

    The kernel disconnects a client that takes nothing of what it was sent for `untaken_timeout_ms` (Linux).

    Raises:
        ServiceError: if the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux (tcp(7)); accepted sockets inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, untaken_timeout_ms)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as exc:
        listener.close()
        raise ServiceError(
            f"cannot listen on {host}:{port}: {exc.strerror or exc}. "
            "Stop what uses it, or set service.port or service.host"
        ) from exc
    listener.setblocking(False)
    return listener
