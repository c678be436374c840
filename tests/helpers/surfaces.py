"""Listening sockets by the standard library and by fastlisten: the same acts, the same outcomes."""

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fastlisten
from helpers import LIMIT, Told, connect, tells_the_queue, told
from helpers.addresses import LOOPBACK

INET, STREAM = socket.AF_INET, socket.SOCK_STREAM


class Surface(NamedTuple):
    """The names an act uses."""

    create_server: Any
    socket: Any


STANDARD = Surface(socket.create_server, socket.socket)
OURS = Surface(fastlisten.create_server, fastlisten.Listener)
Act = Callable[[Surface], Any]


def same(act: Act) -> Told:
    """Assert that both surfaces give the same outcome, and return it."""
    expected = told(act, STANDARD)
    assert told(act, OURS) == expected
    return expected


@contextlib.contextmanager
def taken(family: int = INET, host: str = "127.0.0.1") -> Iterator[Any]:
    """Give an address that another socket listens on."""
    with socket.socket(family, STREAM) as other:
        other.bind((host, 0))
        other.listen(1)
        yield other.getsockname()[:2]


def on_bind(on: Surface, address: Any) -> Any:
    with on.socket(INET, STREAM) as fresh:
        fresh.bind(address)
        return fresh.getsockname()[0]


def option(on_socket: socket.socket, name: str, level: int = socket.SOL_SOCKET) -> Any:
    number = getattr(socket, name, None)
    return None if number is None else on_socket.getsockopt(level, number)


def facts(listener: socket.socket) -> dict[str, Any]:
    """Read back what can be read of a listener."""
    found = {
        "family": listener.family,
        "type": listener.type,
        "proto": listener.proto,
        "timeout": listener.gettimeout(),
        "blocking": listener.getblocking(),
        "inheritable": listener.get_inheritable(),
        "SO_REUSEADDR": option(listener, "SO_REUSEADDR"),
        "SO_REUSEPORT": option(listener, "SO_REUSEPORT"),
        "SO_KEEPALIVE": option(listener, "SO_KEEPALIVE"),
        "SO_ACCEPTCONN": option(listener, "SO_ACCEPTCONN"),
    }
    if listener.family in (INET, socket.AF_INET6):
        found["TCP_NODELAY"] = option(listener, "TCP_NODELAY", socket.IPPROTO_TCP)
        found["queue"] = queue_limit(listener)
        found["host"] = listener.getsockname()[0]
    if listener.family == socket.AF_INET6:
        found["V6ONLY"] = listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    if os.name == "posix":
        import fcntl

        found["flags"] = fcntl.fcntl(listener, fcntl.F_GETFL)
        found["close on exec"] = fcntl.fcntl(listener, fcntl.F_GETFD)
    return found


def queue_limit(listener: socket.socket) -> int | None:
    """Return the backlog that Linux has set: tcpi_sacked of a listener, see tcp(7)."""
    if not tells_the_queue():
        return None
    # struct tcp_info begins with eight bytes; then rto, ato, snd_mss, rcv_mss, unacked, sacked.
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    return int(struct.unpack_from("=8x6I", info)[5])


def wait_until_queued(listener: Any) -> None:
    import select

    assert select.select([listener], [], [], LIMIT)[0]


def accepted_facts(listener: Any) -> dict[str, Any]:
    with connect(listener) as client:
        wait_until_queued(listener)
        accepted, address = listener.accept()
        with accepted:
            found = facts(accepted)
            found["class"] = type(accepted)
            found["address"] = type(address), address == client.getsockname()
            found["peer"] = accepted.getpeername() == address
            return found


def with_server(on: Surface, act: Callable[[socket.socket], Any], **named: Any) -> Any:
    with on.create_server(LOOPBACK, **named) as listener:
        return act(listener)
