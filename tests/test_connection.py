"""Connection beside socket.socket: its files, who owns its descriptor, and its end."""

import gc
import io
import socket
import sys
from typing import Any

import pytest

import fastlisten
from helpers import connect, read_all, serving, told, wait_until
from helpers.pairs import CLOSED, SENDING, both, pair, same, with_sendmsg

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
