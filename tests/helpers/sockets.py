"""Clients with time limits."""

import os
import socket
import struct
from typing import Any

from helpers.addresses import reachable
from helpers.probes import under_wine
from helpers.waiting import LIMIT


def connect(
    target: Any, timeout: float | None = LIMIT, *, source: Any = None, receive_buffer: int = 0
) -> socket.socket:
    """Connect to a listener or an address, by plain system calls, and return the client's socket.

    `target` is a listening socket, `(host, port)` or a unix path. `timeout`, in seconds, is for
    the connecting and stays set on the socket. The caller closes it.
    """
    if isinstance(target, socket.socket):
        family, address = target.family, reachable(target.getsockname())
    elif isinstance(target, str | bytes):
        family, address = socket.AF_UNIX, target
    else:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        address = reachable(target)
    client = socket.socket(family, socket.SOCK_STREAM)
    try:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(timeout)
        if source is not None:
            client.bind(source)
        client.connect(address)
    except BaseException:
        client.close()
        raise
    return client


def reset(client: socket.socket) -> None:
    """Close a TCP socket so that its peer is sent RST in place of FIN."""
    # struct linger is two ints on POSIX and two shorts on Windows.
    linger = struct.pack("HH" if os.name == "nt" else "ii", 1, 0)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    client.close()


def read_all(client: socket.socket, limit: int = 1 << 26) -> bytes:
    """Read until the peer ends its side and return what came, at most `limit` bytes."""
    parts, size = [], 0
    while size < limit and (part := client.recv(min(1 << 16, limit - size))):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def exchange(target: Any, data: bytes = b"ping", timeout: float = LIMIT) -> bytes:
    """Connect, send `data`, end the sending side and return all that the server answers."""
    with connect(target, timeout) as client:
        if data:
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


def nobody_listens(target: Any) -> bool:
    """Return whether a connect is refused; one that is not leaves at once."""
    try:
        with connect(target):
            return False
    except (ConnectionRefusedError, ConnectionResetError, FileNotFoundError):
        return True


# What refusal() returns for a close without a word: see there.
CLOSED: bytes | str = "reset" if under_wine() else b""


def refusal(target: Any) -> bytes | str:
    """Connect and return what the server tells a client that it refuses: bytes, or "reset"."""
    try:
        with connect(target) as client:
            # Wine reads a reset as an end; a client of the machine beneath does get the reset.
            return read_all(client) or ("reset" if under_wine() else b"")
    except ConnectionResetError:  # it can be quicker than the end of connect()
        return "reset"
