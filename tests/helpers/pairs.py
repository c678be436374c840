"""A socket and a Connection beside each other: the same acts on an accepted client, the same outcomes."""

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastlisten
from helpers import LIMIT, connect, told

KINDS = ["standard", "ours"]
# Windows has no sendmsg(); what ours says there is in test_platforms.py.
SENDING = [method for method in ("send", "sendall", "sendmsg") if hasattr(socket.socket, method)]
with_sendmsg = pytest.mark.skipif("sendmsg" not in SENDING, reason="no sendmsg on this system")
# What the standard library says of a socket without a descriptor.
CLOSED = errno.EBADF if os.name == "posix" else errno.ENOTSOCK
Act = Callable[[Any, socket.socket], Any]


@contextlib.contextmanager
def pair(kind: str, path: str | None = None) -> Iterator[tuple[Any, socket.socket]]:
    """Give the accepted side, a socket or a Connection, and its client."""
    address: Any = path or ("127.0.0.1", 0)
    with fastlisten.bind(address) as listener, connect(listener) as client:
        accepted = listener.accept()[0] if kind == "standard" else listener.accept_many(1)[0]
        try:
            yield accepted, client
        finally:
            accepted.close()


def both(act: Act, path: str | None = None) -> list[Any]:
    """Return what the act gives on either side, each with a client of its own."""
    outcomes = []
    for kind in KINDS:
        with pair(kind, path) as (accepted, client):
            outcomes.append(told(act, accepted, client))
    return outcomes


def same(act: Act, path: str | None = None) -> Any:
    """Assert that the act gives the same outcome on both, and return it."""
    expected, ours = both(act, path)
    assert ours == expected
    return expected


def readable(*sides: Any) -> None:
    """Wait until there is something to read, so that a non-blocking call finds it."""
    assert len(select.select(sides, [], [], LIMIT)[0]) == len(sides)
