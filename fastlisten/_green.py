"""What a Listener does where gevent or eventlet has made the standard library's sockets green."""

from __future__ import annotations

import select
import socket
import time
from typing import Any

from fastlisten._core.accept import accept_now
from fastlisten._core.standard import refuse_green


def accept(listener: socket.socket) -> tuple[socket.socket, Any]:
    """Listener.accept() that lets other greenlets run meanwhile; the socket that it returns is green, too."""
    timeout = listener.gettimeout()
    deadline = None if timeout is None else time.monotonic() + timeout
    while (connection := accept_now(listener)) is None:
        if timeout == 0:
            raise BlockingIOError("nobody is queued")
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([listener], [], [], left)[0] and left is not None:
            raise TimeoutError("timed out")
    address = connection.peer
    family, kind, protocol = listener.family, listener.type, listener.proto
    return socket.socket(family, kind, protocol, fileno=connection.detach()), address


def accept_many(limit: int = 64) -> Any:
    """Listener.accept_many() refuses: its Connections would block every greenlet."""
    refuse_green("accept_many()")
