"""The built-in handler `echo`."""

from __future__ import annotations

import contextlib

from fastlisten import Connection

ECHO_SIZE = 65536  # bytes read at once


def echo(connection: Connection) -> None:
    """Send everything back until the client ends its side."""
    with contextlib.suppress(OSError):  # the client left, or broke TLS: nothing to tell anyone
        while data := connection.recv(ECHO_SIZE):
            connection.sendall(data)
