"""Connection beside socket.socket: timeouts, options, addresses and shutdown."""

import errno
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import fastlisten
from helpers import LIMIT, alarms, connect, needs, not_under_wine, told
from helpers.pairs import KINDS, pair, same


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR, 9, -1, "1", 1.5])
def test_shutdown(how: Any) -> None:
    def act(accepted: Any, client: socket.socket) -> Any:
        accepted.shutdown(how)
        client.settimeout(0.05)
        return told(client.recv, 1), accepted.closed if hasattr(accepted, "closed") else False

    same(act)


@not_under_wine("its shutdown() leaves a blocked recv() waiting; a cut of the loop's does not rely on that")
def test_shutdown_releases_a_thread_in_recv(connection: Any) -> None:
    received: list[Any] = []
    begun = threading.Event()

    def receive() -> None:
        begun.set()
        try:
            received.append(connection.recv(10))
        except BrokenPipeError as error:  # Winsock: WSAESHUTDOWN
            assert os.name == "nt"
            received.append(b"" if error.errno == errno.ESHUTDOWN else error)

    thread = threading.Thread(target=receive)
    thread.start()
    assert begun.wait(LIMIT)
    connection.shutdown(socket.SHUT_RDWR)
    thread.join(LIMIT)
    assert received == [b""]


@pytest.mark.parametrize("value", [None, 0, 0.0, 1.5, 1e9, True, -1, float("nan"), 1e30, "1", []])
def test_settimeout(value: Any) -> None:
    def act(accepted: Any, _: socket.socket) -> Any:
        accepted.settimeout(value)
        return accepted.gettimeout(), flags(accepted)

    same(act)


def flags(accepted: Any) -> Any:
    """Return the descriptor's flags: a timeout sets O_NONBLOCK there, as on the original."""
    if os.name == "nt":
        return None
    import fcntl

    return (
        fcntl.fcntl(accepted.fileno(), fcntl.F_GETFL),
        fcntl.fcntl(accepted.fileno(), fcntl.F_GETFD),
    )


@pytest.mark.parametrize("value", [True, False, 1, 0, 5, "x", None, []])
def test_setblocking(value: Any) -> None:
    def act(accepted: Any, _: socket.socket) -> Any:
        accepted.setblocking(value)
        return accepted.gettimeout(), flags(accepted)

    same(act)


@pytest.mark.parametrize("default", [None, 0.0, 2.5])
def test_the_default_timeout_is_taken_on_when_accepted(default: float | None) -> None:
    socket.setdefaulttimeout(default)
    try:
        assert same(lambda accepted, _: accepted.gettimeout()) == ("value", default)
    finally:
        socket.setdefaulttimeout(None)


@pytest.mark.parametrize(
    "receive",
    [
        lambda accepted: accepted.recv(10),
        lambda accepted: accepted.recv_into(bytearray(10)),
        lambda accepted: accepted.makefile("rb").read(1),
    ],
    ids=["recv", "recv_into", "makefile"],
)
@pytest.mark.parametrize("timeout", [0.0, 0.03])
def test_a_silent_client(receive: Any, timeout: float) -> None:
    def act(accepted: Any, _: socket.socket) -> Any:
        accepted.settimeout(timeout)
        begun = time.monotonic()
        outcome = told(receive, accepted)
        assert timeout <= time.monotonic() - begun + 0.001 < timeout + 2
        return outcome, told(accepted.send, b"still of use")

    outcome = same(act)
    if timeout:
        assert outcome[1][0][:2] == (TimeoutError, None)


@needs("signals between processes")
@pytest.mark.parametrize("kind", KINDS)
def test_signals_do_not_lengthen_a_timed_recv(kind: str) -> None:
    rung: list[int] = []
    with pair(kind) as (accepted, _):
        accepted.settimeout(0.3)
        with alarms(lambda *_: rung.append(1), 0.02):
            begun = time.monotonic()
            with pytest.raises(TimeoutError, match=r"^timed out$"):
                accepted.recv(1)
            took = time.monotonic() - begun
    assert len(rung) > 3
    assert 0.29 < took < LIMIT


@needs("signals between processes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize("call", ["recv", "sendall"])
def test_what_a_signal_handler_raises_comes_out(kind: str, timeout: float, call: str) -> None:
    class RungError(Exception):
        pass

    def ring(*_: Any) -> None:
        raise RungError

    data = b"x" * (1 << 27)
    with pair(kind) as (accepted, _):
        accepted.settimeout(timeout)
        with pytest.raises(RungError), alarms(ring, 0.05):
            accepted.recv(1) if call == "recv" else accepted.sendall(data)


@pytest.mark.parametrize(
    "arguments",
    [
        (socket.SOL_SOCKET, socket.SO_TYPE),
        (socket.SOL_SOCKET, socket.SO_LINGER, 8),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 4),
        (socket.SOL_SOCKET, socket.SO_LINGER, 0),
        (socket.SOL_SOCKET, socket.SO_LINGER, -1),
        (socket.SOL_SOCKET, socket.SO_LINGER, 2000),
        (socket.SOL_SOCKET, 9999),
        (socket.SOL_SOCKET, "x"),
        ("x", 1),
        (socket.SOL_SOCKET, socket.SO_TYPE, "x"),
    ],
    ids=repr,
)
def test_getsockopt(arguments: Any) -> None:
    same(lambda accepted, _: accepted.getsockopt(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, True),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, struct.pack("i", 1)),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, bytearray(struct.pack("i", 1))),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, None),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, None, 4),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, "1"),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1.5),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 2**40),
        (socket.IPPROTO_TCP, 9999, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, b""),
    ],
    ids=repr,
)
def test_setsockopt(arguments: Any) -> None:
    def act(accepted: Any, _: socket.socket) -> Any:
        result = accepted.setsockopt(*arguments)
        return result, accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    same(act)


def test_the_two_addresses(connection: Any, client: socket.socket) -> None:
    assert connection.peer == client.getsockname()
    assert connection.getpeername() == client.getsockname()
    assert connection.getsockname() == client.getpeername()
    assert type(connection.peer) is tuple
    assert connection.fileno() > 2
    connection.close()
    assert connection.peer == client.getsockname()  # known without the descriptor


@needs("the IPv6 loopback address")
def test_the_two_addresses_over_ipv6() -> None:
    with (
        fastlisten.bind(("::1", 0)) as listener,
        connect(listener) as client,
        listener.accept_many(1)[0] as connection,
    ):
        assert connection.peer == client.getsockname()
        assert connection.getpeername() == client.getsockname()
        assert connection.getsockname() == client.getpeername()
        assert len(connection.peer) == 4


@needs("unix sockets")
def test_the_two_addresses_over_unix(unix_paths: Path) -> None:
    path = str(unix_paths / "s")
    for source in (None, str(unix_paths / "c")):
        with (
            fastlisten.bind(path) as listener,
            connect(listener, source=source),
            listener.accept_many(1)[0] as connection,
        ):
            assert connection.peer == (source or "")
            assert connection.getpeername() == (source or "")
            assert connection.getsockname() == path


@needs("Linux")
def test_the_two_addresses_over_an_abstract_name() -> None:
    name = f"unix:@fastlisten-test-connection-{os.getpid()}"
    with (
        fastlisten.bind(name) as listener,
        connect(listener, source="") as client,
        listener.accept_many(1)[0] as connection,
    ):
        assert connection.peer == client.getsockname()
        assert connection.getsockname() == client.getpeername()
        assert connection.peer[:1] == b"\0"
