"""Connection beside socket.socket: the same acts on an accepted client, the same outcomes."""

import array
import contextlib
import errno
import gc
import io
import os
import select
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlisten
from helpers import (
    LIMIT,
    alarms,
    connect,
    echo,
    needs,
    not_under_wine,
    posix_only,
    read_all,
    reset,
    serving,
    told,
    wait_until,
)

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


@pytest.fixture
def connection() -> Iterator[Any]:
    with pair("ours") as (accepted, client):
        accepted_client[0] = client
        yield accepted


accepted_client: list[Any] = [None]


@pytest.fixture
def client(connection: Any) -> socket.socket:
    return accepted_client[0]


def readable(*sides: Any) -> None:
    """Wait until there is something to read, so that a non-blocking call finds it."""
    assert len(select.select(sides, [], [], LIMIT)[0]) == len(sides)


# --- receiving


@pytest.mark.parametrize(
    "arguments",
    [
        *[(0,), (1,), (3,), (100, socket.MSG_PEEK), (-1,), (2**70,), ("1",), (1.5,), (None,)],
        (5, "x"),
        (5, 2**70),
        (True,),
    ],
    ids=repr,
)
def test_recv(arguments: Any) -> None:
    def act(accepted: Any, client: socket.socket) -> Any:
        client.sendall(b"hello")
        readable(accepted)
        client.shutdown(socket.SHUT_WR)
        return accepted.recv(*arguments), accepted.recv(2)

    same(act)


@pytest.mark.parametrize(
    "arguments",
    [(), (0,), (3,), (8,), (9,), (-1,), (2, socket.MSG_PEEK), ("1",), (None,), (2**70,)],
    ids=repr,
)
def test_recv_into(arguments: Any) -> None:
    def act(accepted: Any, client: socket.socket) -> Any:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        readable(accepted)
        buffer = bytearray(8)
        count = accepted.recv_into(buffer, *arguments)
        return count, bytes(buffer), accepted.recv(1)

    same(act)


def test_recv_into_takes_names() -> None:
    def act(accepted: Any, client: socket.socket) -> Any:
        client.sendall(b"hello")
        readable(accepted)
        buffer = bytearray(8)
        return accepted.recv_into(buffer, nbytes=2, flags=socket.MSG_PEEK), bytes(buffer)

    assert same(act) == ("value", (2, b"he\0\0\0\0\0\0"))


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(6),
        memoryview(bytearray(9))[2:7],
        array.array("i", [0, 0, 0]),
        memoryview(array.array("d", [0.0, 0.0])),
        bytearray(),
        b"read only",
        memoryview(b"read only"),
        memoryview(bytearray(16))[::2],
        "text",
        None,
        17,
    ],
    ids=lambda value: type(value).__name__,
)
def test_recv_into_any_buffer(buffer: Any) -> None:
    def act(accepted: Any, client: socket.socket) -> Any:
        client.sendall(b"hello")
        readable(accepted)
        count = accepted.recv_into(buffer)
        return count, bytes(buffer)

    same(act)


def test_the_buffer_can_be_resized_again_after_recv_into(connection: Any) -> None:
    """An exported buffer that is not released would make this a BufferError."""
    connection.settimeout(0.01)
    buffer = bytearray(8)
    with pytest.raises(TimeoutError):
        connection.recv_into(buffer)
    buffer.extend(b"more")
    with pytest.raises(ValueError, match="negative"):
        connection.recv_into(buffer, -1)
    buffer.extend(b"more")


def test_the_end_of_the_stream() -> None:
    def act(accepted: Any, client: socket.socket) -> Any:
        client.sendall(b"last")
        client.shutdown(socket.SHUT_WR)
        buffer = bytearray(3)
        return (
            read_all(accepted),
            accepted.recv(10),
            accepted.recv_into(buffer),
            accepted.send(b"still open this way"),
        )

    assert same(act) == ("value", (b"last", b"", 0, 19))


def was_reset(accepted: Any, client: socket.socket) -> None:
    reset(client)
    readable(accepted)


@pytest.mark.parametrize(
    "then",
    [
        lambda accepted: accepted.recv(1),
        lambda accepted: accepted.recv_into(bytearray(1)),
        lambda accepted: accepted.send(b"x"),
        lambda accepted: accepted.sendall(b"x"),
        pytest.param(lambda accepted: accepted.sendmsg([b"x"]), marks=with_sendmsg),
        lambda accepted: accepted.getpeername(),
        lambda accepted: accepted.shutdown(socket.SHUT_RDWR),
        lambda accepted: accepted.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
        lambda accepted: [told(accepted.recv, 1), accepted.recv(1)],
        lambda accepted: [told(accepted.send, b"1"), told(accepted.send, b"1"), accepted.recv(1)],
        lambda accepted: accepted.makefile("rb").read(),
    ],
    ids=[
        "recv",
        "recv_into",
        "send",
        "sendall",
        "sendmsg",
        "getpeername",
        "shutdown",
        "SO_ERROR",
        "recv twice",
        "send twice",
        "makefile",
    ],
)
@pytest.mark.parametrize("timeout", [None, 5.0, 0.0])
def test_a_client_that_resets(then: Any, timeout: float | None) -> None:
    def act(accepted: Any, client: socket.socket) -> Any:
        accepted.settimeout(timeout)
        was_reset(accepted, client)
        return then(accepted)

    same(act)


# --- sending


@pytest.mark.parametrize("method", ["send", "sendall"])
@pytest.mark.parametrize(
    "arguments",
    [
        (b"hello",),
        (bytearray(b"hello"),),
        (memoryview(b"hello")[1:3],),
        (array.array("i", [1, 2]),),
        (b"",),
        (b"hello", socket.MSG_DONTROUTE),
        (memoryview(b"hello")[::2],),
        ("text",),
        (None,),
        (7,),
        (b"x", "flags"),
    ],
    ids=repr,
)
def test_send(method: str, arguments: Any) -> None:
    def act(accepted: Any, client: socket.socket) -> Any:
        result = getattr(accepted, method)(*arguments)
        accepted.shutdown(socket.SHUT_WR)
        return result, read_all(client)

    same(act)


@pytest.mark.parametrize("method", ["send", "sendall"])
@pytest.mark.parametrize("flags", [2**40, -(2**70)])
def test_flags_out_of_range(method: str, flags: int) -> None:
    """CPython 3.15 has other words for it in these two methods than in recv(), and than before."""
    expected, ours = both(lambda accepted, _: getattr(accepted, method)(b"x", flags))
    assert ours[0] is expected[0] is OverflowError


@needs("unix sockets")
@with_sendmsg
@pytest.mark.parametrize(
    "arguments",
    [
        ([b"a", b"bc", bytearray(b"d")],),
        ([],),
        ((b"a", memoryview(b"bc")),),
        (iter([b"a", b"b"]),),
        ([b"a"], []),
        ([b"a"], [], 0),
        ([b"a"], [], 0, None),
        (b"ab",),
        ([b"a", "b"],),
        (["text"],),
        ([b"a"], None),
        ([b"a"], [1]),
        ([b"a"], [(1, 2)]),
        ([b"a"], [(1, 2, "x")]),
        ([b"a"], [], "0"),
        (7,),
        ([b"x"] * 2000,),
    ],
    ids=lambda arguments: repr(arguments)[:40],
)
def test_sendmsg(arguments: Any) -> None:
    def act(accepted: Any, client: socket.socket) -> Any:
        given_now = [list(a) if hasattr(a, "__next__") else a for a in arguments]
        result = accepted.sendmsg(*given_now)
        accepted.shutdown(socket.SHUT_WR)
        return result, read_all(client)

    if arguments and hasattr(arguments[0], "__next__"):
        # An iterator is used up by the first side, so it is made anew for each.
        arguments = ([b"a", b"b"],)
    same(act)


@needs("unix sockets")
@pytest.mark.skipif(not hasattr(socket, "SCM_RIGHTS"), reason="no SCM_RIGHTS on this system")
def test_sendmsg_passes_a_descriptor(unix_paths: Path) -> None:
    results = []
    for kind in KINDS:
        read, write = os.pipe()
        with pair(kind, str(unix_paths / kind)) as (accepted, client), open(read, "rb") as pipe:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", write))]
            results.append(accepted.sendmsg([b"take it"], rights))
            os.close(write)
            data, descriptors, _, _ = socket.recv_fds(client, 100, 1)
            os.write(descriptors[0], b"through it")
            os.close(descriptors[0])
            assert (data, pipe.read()) == (b"take it", b"through it")
    assert results == [7, 7]


def fill(accepted: Any) -> None:
    """Send until the kernel takes no more, and no more a while later, when it has moved what it had."""
    timeout = accepted.gettimeout()
    accepted.setblocking(False)
    refused = False
    for _ in range(10_000):
        try:
            accepted.send(b"x" * 65536)
            refused = False
        except BlockingIOError:
            if refused:
                break
            refused = True
            select.select([], [accepted], [], 0.05)
    accepted.settimeout(timeout)


@pytest.mark.parametrize("timeout", [0.0, 0.03])
@pytest.mark.parametrize(
    "send",
    [
        lambda accepted: accepted.send(b"x" * 100),
        lambda accepted: accepted.sendall(b"x" * 100),
        pytest.param(lambda accepted: accepted.sendmsg([b"x" * 100]), marks=with_sendmsg),
        lambda accepted: accepted.sendall(b"x" * (1 << 24)),
    ],
    ids=["send", "sendall", "sendmsg", "sendall much"],
)
def test_a_client_that_does_not_read(send: Any, timeout: float) -> None:
    def act(accepted: Any, _: socket.socket) -> Any:
        fill(accepted)
        accepted.settimeout(timeout)
        return send(accepted)

    outcome = same(act)
    assert outcome[0] is (TimeoutError if timeout else BlockingIOError)


def test_the_timeout_of_sendall_is_for_all_of_it() -> None:
    """A client that reads a little at a time does not renew it."""
    for kind in KINDS:
        with pair(kind) as (accepted, client):
            stop = threading.Event()

            def sip(client: socket.socket = client, stop: threading.Event = stop) -> None:
                while not stop.wait(0.02):
                    client.recv(20_000)

            sipping = threading.Thread(target=sip)
            sipping.start()
            try:
                accepted.settimeout(0.3)
                begun = time.monotonic()
                with pytest.raises(TimeoutError, match=r"^timed out$"):
                    accepted.sendall(b"x" * (1 << 27))
                assert 0.29 < time.monotonic() - begun < LIMIT
            finally:
                stop.set()
                sipping.join()


@pytest.mark.parametrize("method", SENDING)
def test_sending_after_both_ends_are_done(method: str) -> None:
    data: Any = [b"x"] if method == "sendmsg" else b"x"

    def after_shutdown(accepted: Any, _: socket.socket) -> Any:
        accepted.shutdown(socket.SHUT_WR)
        return getattr(accepted, method)(data)

    outcome = same(after_shutdown)
    assert outcome[0] is BrokenPipeError


class Counted(io.BytesIO):
    """A file without a descriptor: the sending falls back to reads."""


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [(), (3,), (0, 4), (100_000, 50_000), (0, None), (10**9,), (0, 0), (0, -1), (0, 1.5), ("1",)],
    ids=repr,
)
def test_sendfile(real: bool, arguments: Any, tmp_path: Path) -> None:
    contents = os.urandom(300_000)
    (tmp_path / "file").write_bytes(contents)

    def act(accepted: Any, client: socket.socket) -> Any:
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(read_all(client)))
        reader.start()
        try:
            with open(tmp_path / "file", "rb") if real else Counted(contents) as file:
                sent = told(accepted.sendfile, file, *arguments)
                position = file.tell()
        finally:
            accepted.shutdown(socket.SHUT_WR)
            reader.join(LIMIT)
        return sent, position, received

    same(act)


def test_sendfile_refuses_what_the_library_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")

    def as_text(accepted: Any, _: socket.socket) -> Any:
        with open(tmp_path / "file") as file:
            return accepted.sendfile(file)

    def unblocked(accepted: Any, _: socket.socket) -> Any:
        accepted.setblocking(False)
        with open(tmp_path / "file", "rb") as file:
            return accepted.sendfile(file)

    def no_file(accepted: Any, _: socket.socket) -> Any:
        return accepted.sendfile(None)

    def names(accepted: Any, client: socket.socket) -> Any:
        with open(tmp_path / "file", "rb") as file:
            sent = accepted.sendfile(file=file, offset=1, count=2)
        return sent, client.recv(10)

    assert same(as_text)[0] is ValueError
    assert same(unblocked)[0] is ValueError
    assert same(no_file)[0] is AttributeError
    assert same(names) == ("value", (2, b"ex"))


@needs("Linux")
def test_sendfile_times_out(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.truncate(1 << 28)  # sparse

    def act(accepted: Any, _: socket.socket) -> Any:
        accepted.settimeout(0.05)
        with open(tmp_path / "file", "rb") as file:
            return accepted.sendfile(file)

    assert same(act)[:2] == (TimeoutError, None)


# --- the settings


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


# --- files


@pytest.mark.parametrize(
    ("positional", "named"),
    [
        ((), {}),
        (("r",), {}),
        (("rb",), {}),
        (("rb", 0), {}),
        (("rb",), {"buffering": 3}),
        (("r",), {"encoding": "latin-1", "newline": "\r\n"}),
        (("r",), {"errors": "replace", "encoding": "ascii"}),
        (("rwb",), {"buffering": 0}),
        (("r", 0), {}),
        (("x",), {}),
        (("rb+",), {}),
        ((None,), {}),
        (("r",), {"encoding": 5}),
        (("r", "x"), {}),
        (("rb",), {"no_such": 1}),
    ],
    ids=repr,
)
def test_makefile_for_reading(positional: Any, named: Any) -> None:
    def act(accepted: Any, client: socket.socket) -> Any:
        client.sendall("one\r\ntw\xf6\r\n".encode())
        client.shutdown(socket.SHUT_WR)
        with accepted.makefile(*positional, **named) as file:
            lines = [file.readline() for _ in range(3)]
            return lines, file.readable(), file.writable(), type(file), file.fileno() > 2

    outcomes = both(act)
    if "no_such" in named:
        outcomes = [outcome[0] for outcome in outcomes]
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("mode", ["w", "wb", "rw", "rwb", "br"])
@pytest.mark.parametrize("buffering", [None, 0, 1, 100])
def test_makefile_for_writing(mode: str, buffering: int | None) -> None:
    def act(accepted: Any, client: socket.socket) -> Any:
        with accepted.makefile(mode, buffering) as file:
            result = told(file.write, b"line\n" if "b" in mode else "line\n")
            file.flush()
        accepted.shutdown(socket.SHUT_WR)
        return result, read_all(client)

    same(act)


def test_closing_and_its_files() -> None:
    """As with a socket, the descriptor stays open until the last of its files is closed."""

    def act(accepted: Any, client: socket.socket) -> Any:
        file = accepted.makefile("rb")
        other = accepted.makefile("wb")
        accepted.close()
        seen = [told(accepted.recv, 1)[:2] if accepted.fileno() == -1 else "open"]
        other.write(b"from the file")
        other.close()
        client.sendall(b"to the file")
        client.shutdown(socket.SHUT_WR)
        seen.append(file.read())
        file.close()
        seen.append(read_all(client))
        seen.append(accepted.fileno())
        return seen

    same(act)


def test_a_file_left_open_is_closed_with_its_handler() -> None:
    """What a handler keeps of makefile() does not keep its client waiting."""
    kept: list[Any] = []

    def handler(connection: Any) -> None:
        kept.append(connection.makefile("rb"))

    with (
        fastlisten.bind(("127.0.0.1", 0)) as listener,
        serving(listener, handler),
        connect(listener) as client,
    ):
        # The file holds the descriptor as it does with socketserver; closing it lets go.
        wait_until(lambda: kept)
        kept.pop().close()
        assert client.recv(1) == b""


# --- ownership


def test_detach(connection: Any, client: socket.socket) -> None:
    number = connection.fileno()
    assert connection.detach() == number
    assert connection.fileno() == -1
    assert connection.closed
    with pytest.raises(OSError) as caught:  # noqa: PT011
        connection.recv(1)
    assert caught.value.errno == CLOSED
    with socket.socket(fileno=number) as taken:
        taken.sendall(b"alive")
        assert client.recv(10) == b"alive"
    assert client.recv(1) == b""


def test_detach_and_socket_of_a_closed_one() -> None:
    def act(accepted: Any, _: socket.socket) -> Any:
        accepted.close()
        return accepted.detach()

    expected, ours = both(act)
    assert ours == expected
    with pair("ours") as (connection, _):
        connection.close()
        with pytest.raises(OSError) as caught:  # noqa: PT011
            connection.socket()
        assert caught.value.errno == CLOSED


@pytest.mark.parametrize("timeout", [None, 0.0, 3.5])
def test_socket_owns_the_descriptor(connection: Any, client: socket.socket, timeout: float | None) -> None:
    connection.settimeout(timeout)
    number = connection.fileno()
    with connection.socket() as taken:
        assert type(taken) is socket.socket
        assert taken.fileno() == number
        assert (taken.family, taken.type, taken.proto) == (
            socket.AF_INET,
            socket.SOCK_STREAM,
            0 if taken.proto == 0 else socket.IPPROTO_TCP,
        )
        assert taken.gettimeout() == timeout
        assert taken.get_inheritable() is False
        assert connection.fileno() == -1
        assert connection.closed
        connection.close()  # does nothing: it has no descriptor any more
        taken.sendall(b"alive")
        assert client.recv(10) == b"alive"
    assert client.recv(1) == b""


def test_the_loop_leaves_what_was_taken_over() -> None:
    taken: list[Any] = []

    def handler(connection: Any) -> None:
        taken.append(connection.socket() if len(taken) % 2 else connection.detach())

    with (
        fastlisten.bind(("127.0.0.1", 0)) as listener,
        serving(listener, handler),
        connect(listener) as one,
        connect(listener) as two,
    ):
        wait_until(lambda: len(taken) == 2)
        owners = [socket.socket(fileno=taken[0]), taken[1]]
        for owner in owners:
            owner.sendall(b"%d" % owner.getpeername()[1])
        for client in (one, two):
            assert client.recv(20) == b"%d" % client.getsockname()[1]
        for owner in owners:
            owner.close()


def test_close_is_idempotent_and_final(connection: Any, client: socket.socket) -> None:
    assert connection.closed is False
    assert connection.close() is None
    assert connection.closed is True
    connection.close()
    assert connection.fileno() == -1
    assert client.recv(1) == b""


@pytest.mark.parametrize(
    "then",
    [
        lambda accepted: accepted.recv(1),
        lambda accepted: accepted.recv_into(bytearray(1)),
        lambda accepted: accepted.send(b"x"),
        lambda accepted: accepted.sendall(b"x"),
        lambda accepted: accepted.sendall(b""),
        pytest.param(lambda accepted: accepted.sendmsg([b"x"]), marks=with_sendmsg),
        lambda accepted: accepted.shutdown(socket.SHUT_RDWR),
        lambda accepted: accepted.settimeout(1),
        lambda accepted: accepted.settimeout(None),
        lambda accepted: accepted.gettimeout(),
        lambda accepted: accepted.setblocking(True),
        lambda accepted: accepted.setblocking(False),
        lambda accepted: accepted.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE),
        lambda accepted: accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        lambda accepted: accepted.getpeername(),
        lambda accepted: accepted.getsockname(),
        lambda accepted: accepted.fileno(),
        lambda accepted: accepted.makefile("rb").read(1),
        lambda accepted: accepted.sendfile(io.BytesIO(b"x")),
        lambda accepted: accepted.recv(-1),
        lambda accepted: accepted.recv("x"),
        lambda accepted: accepted.send("x"),
        lambda accepted: accepted.__enter__().recv(1),
    ],
)
@pytest.mark.parametrize("end", ["close", "detach"])
def test_everything_on_a_closed_one(then: Any, end: str) -> None:
    """EBADF and the order of checks, as there."""

    def act(accepted: Any, _: socket.socket) -> Any:
        number = getattr(accepted, end)()
        if number is not None:
            socket.close(number)
        return then(accepted)

    same(act)


def test_with(client: socket.socket, connection: Any) -> None:
    with connection as entered:
        assert entered is connection
        connection.sendall(b"x")
    assert connection.closed
    assert client.recv(10) == b"x"
    assert client.recv(10) == b""


class LostError(Exception):
    pass


def test_with_and_an_exception(client: socket.socket, connection: Any) -> None:
    with pytest.raises(LostError), connection:
        raise LostError
    assert connection.closed
    assert client.recv(10) == b""


def test_repr_names_descriptor_and_peer(connection: Any, client: socket.socket) -> None:
    text = repr(connection)
    assert "Connection" in text
    assert f"fd={connection.fileno()}" in text
    assert str(client.getsockname()[1]) in text
    connection.close()
    assert "closed" in repr(connection)


def test_an_open_one_that_is_collected_closes_with_a_warning() -> None:
    with fastlisten.bind(("127.0.0.1", 0)) as listener, connect(listener) as client:
        connections = listener.accept_many(1)
        with pytest.warns(ResourceWarning, match="unclosed.*Connection"):
            connections.clear()  # the last reference; no collector is needed
        assert client.recv(1) == b""


def test_a_closed_one_is_collected_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    with pair("ours") as (connection, _):
        connection.close()
        del connection
    with pair("ours") as (connection, _):
        socket.close(connection.detach())
        del connection
    gc.collect()
    assert [str(w.message) for w in recwarn.list] == []


def test_the_class_cannot_be_made_by_hand() -> None:
    with pytest.raises(TypeError):
        fastlisten.Connection()
    with pytest.raises(TypeError):
        fastlisten.Connection(5)


def test_its_size(connection: Any) -> None:
    """At most 128 bytes beyond the peer's address, which is 28 bytes at most for TCP."""
    assert sys.getsizeof(connection) <= 128 + 28


def test_arguments_are_counted() -> None:
    for name, arguments in [
        ("recv", ()),
        ("recv", (1, 0, 0)),
        ("recv_into", ()),
        ("recv_into", (bytearray(1), 1, 0, 0)),
        ("send", ()),
        ("send", (b"", 0, 0)),
        ("sendall", ()),
        *(("sendmsg", ()) for _ in SENDING if _ == "sendmsg"),
        ("shutdown", ()),
        ("settimeout", ()),
        ("setblocking", ()),
        ("getsockopt", (1,)),
        ("setsockopt", (1, 1)),
        ("getpeername", (1,)),
        ("close", (1,)),
        ("fileno", (1,)),
    ]:
        expected, ours = both(lambda accepted, _, n=name, a=arguments: getattr(accepted, n)(*a))
        assert (name, ours[0]) == (name, expected[0]) == (name, TypeError)


# --- exchanges


@pytest.mark.parametrize("timeout", [None, 20.0])
@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 300_000), max_size=6),
    st.integers(1000, 100_000),
    st.sampled_from(SENDING),
    st.booleans(),
)
def test_whatever_is_sent_arrives(
    timeout: float | None, sizes: list[int], step: int, method: str, narrow: bool
) -> None:
    """Any sizes, through narrow buffers and partial sends, in order and complete."""
    with fastlisten.bind(("127.0.0.1", 0)) as listener:
        if narrow:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with connect(listener, receive_buffer=4096 if narrow else 0) as client:
            connection = listener.accept_many(1)[0]
            connection.settimeout(timeout)
            parts = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
            failed: list[BaseException] = []

            def send() -> None:
                try:
                    with connection:
                        for part in parts:
                            if method == "sendall":
                                connection.sendall(part)
                                continue
                            view = memoryview(part)
                            while len(view):
                                whole = view if method == "send" else [view[:7], view[7:]]
                                view = view[getattr(connection, method)(whole) :]
                except BaseException as error:
                    failed.append(error)

            sender = threading.Thread(target=send)
            sender.start()
            received = []
            while part := client.recv(step):
                received.append(part)
            sender.join(LIMIT)
    assert not failed
    assert b"".join(received) == b"".join(parts)


PARTIAL = """
import json, threading, socket, fastlisten
from helpers import connect, read_all
data = bytes(range(256)) * 40
with fastlisten.bind(("127.0.0.1", 0)) as listener, connect(listener) as client:
    with listener.accept_many(1)[0] as connection:
        connection.settimeout({timeout})
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    received = []
    # The client's calls are cut short too.
    print(json.dumps(read_all(client) == data))
"""


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize(
    "plan",
    [[(-1, 50), (-7, 100)], [("EINTR", 5), (-9, 3), ("EINTR", 3)], [("EINTR", 1)]],
    ids=repr,
)
def test_sendall_goes_on_after_partial_sends_and_signals(
    faults: Any, timeout: float | None, plan: Any
) -> None:
    assert faults.python(PARTIAL.format(timeout=timeout), send=plan) is True


SPURIOUS = """
import json, fastlisten
from helpers import connect
with fastlisten.bind(("127.0.0.1", 0)) as listener, connect(listener) as client:
    with listener.accept_many(1)[0] as connection:
        connection.settimeout(5.0)
        client.sendall(b"here")
        print(json.dumps([connection.recv(10).decode(), connection.send(b"x")]))
"""


def test_a_timed_call_that_finds_nothing_after_all_waits_again(faults: Any) -> None:
    """poll(2), BUGS: what is reported ready may still block."""
    plan = [("EAGAIN", 3)]
    assert faults.python(SPURIOUS, recv=plan, send=plan) == ["here", 1]


def test_errors_of_the_calls_come_out_as_they_are(faults: Any) -> None:
    code = """
import json, fastlisten, sys, socket
from helpers import connect, told
seen = []
for standard in (True, False):
    with fastlisten.bind(("127.0.0.1", 0)) as listener, connect(listener):
        accepted = listener.accept()[0] if standard else listener.accept_many(1)[0]
        with accepted:
            seen.append([repr(told(accepted.recv, 1)), repr(told(accepted.send, b"x")),
                         repr(told(accepted.sendall, b"x")), repr(told(accepted.sendmsg, [b"x"]))])
print(json.dumps(seen))
"""
    codes = ["EPIPE", "ENOBUFS", "EIO"]
    seen = faults.python(code, recv=[("EIO", 2)], send=[(c, 1) for c in codes * 2])
    assert seen[0] == seen[1]
    assert "BrokenPipeError" in seen[1][1]


@posix_only("the echo needs no port of its own there; the loop's tests cover it")
def test_an_echo_of_a_hundred_clients() -> None:
    with fastlisten.bind(("127.0.0.1", 0)) as listener, serving(listener, echo, threads=4):
        for number in range(100):
            with connect(listener) as client:
                text = b"%d" % number
                client.sendall(text)
                assert client.recv(10) == text


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate for localhost that is valid for a day."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
            "-keyout",
            "key",
            "-out",
            "certificate",
        ],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=50,
    )
    return folder


@needs("the openssl command")
@pytest.mark.parametrize("threads", [0, 2])
def test_tls(certificate: Path, threads: int) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate / "certificate", certificate / "key")
    trusting = ssl.create_default_context(cafile=str(certificate / "certificate"))

    def handler(connection: Any) -> None:
        with server.wrap_socket(connection.socket(), server_side=True) as secure:
            echo(secure)

    with (
        fastlisten.bind(("127.0.0.1", 0)) as listener,
        serving(listener, handler, threads=threads),
    ):
        for _ in range(3):
            with (
                connect(listener) as plain,
                trusting.wrap_socket(plain, server_hostname="localhost") as client,
            ):
                client.sendall(b"secret" * 10_000)
                received = b""
                while len(received) < 60_000:
                    received += client.recv(1 << 16)
                assert received == b"secret" * 10_000
