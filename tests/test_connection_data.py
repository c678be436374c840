"""Connection beside socket.socket: receiving and sending."""

import array
import io
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import LIMIT, needs, read_all, reset, told
from helpers.pairs import KINDS, SENDING, both, pair, readable, same, with_sendmsg

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
