"""serve(ssl=...): the handshake, what a handler gets, and what clients cannot do."""

import contextlib
import io
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastlisten
from fastlisten import Listener, TLSConnection
from helpers import LIMIT, Serving, connect, needs, posix_only, read_all, reset, serving, wait_until
from helpers.certificates import Pair, client_context, server_context
from helpers.programs import line_of, run, running, wait_until_asleep
from helpers.serve import THREADS

SHORT = 0.3  # seconds: a deadline that a test waits for


@pytest.fixture(scope="module")
def context(pair: Pair) -> ssl.SSLContext:
    return server_context(pair)


@pytest.fixture(scope="module")
def trusting(pair: Pair) -> ssl.SSLContext:
    return client_context(pair)


def tls_client(target: Any, trusting: ssl.SSLContext, **options: Any) -> ssl.SSLSocket:
    return trusting.wrap_socket(connect(target), server_hostname="localhost", **options)


def echo(connection: TLSConnection) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


@contextlib.contextmanager
def exchange_with(
    listener: Listener, context: ssl.SSLContext, trusting: ssl.SSLContext, handler: Any, **options: Any
) -> Iterator[ssl.SSLSocket]:
    """Give a client of a handler; what the handler raised comes out at the end."""
    raised: list[Exception] = []

    def on_error(error: Exception, connection: TLSConnection) -> None:
        raised.append(error)

    with serving(listener, handler, ssl=context, on_error=on_error, **options):
        with tls_client(listener, trusting, suppress_ragged_eofs=False) as client:
            yield client
        wait_until(lambda: listener.stats().active == 0)
    for error in raised:
        raise error


def failed(listener: Listener) -> dict[str, int]:
    return dict(listener.stats().tls_failures)


# --- what a handler gets


@pytest.mark.parametrize("threads", THREADS)
def test_a_handler_talks_over_tls(listener: Listener, context: Any, trusting: Any, threads: Any) -> None:
    with serving(listener, echo, ssl=context, threads=threads):
        for number in range(3):
            with tls_client(listener, trusting) as client:
                client.sendall(b"%d" % number * 50_000)
                got = b""
                while len(got) < 50_000:
                    got += client.recv(50_000)
                assert got == b"%d" % number * 50_000
                client.unwrap().close()
        wait_until(lambda: listener.stats().handled == 3)
    stats = listener.stats()
    assert (stats.accepted, stats.active, stats.handler_errors) == (3, 0, 0)
    assert (stats.tls_handshakes, stats.tls_failures) == (3, {})


def test_the_methods_are_a_connection_s(listener: Listener, context: Any, trusting: Any) -> None:
    assert {name for name in dir(fastlisten.Connection) if name[0] != "_"} - set(dir(TLSConnection)) == {
        "sendmsg"
    }
    seen: dict[str, Any] = {}

    def handler(connection: TLSConnection) -> None:
        seen.update(
            version=connection.ssl.version(),
            cipher=connection.ssl.cipher(),
            alpn=connection.ssl.selected_alpn_protocol(),
            certificate=connection.ssl.getpeercert(),
            kind=isinstance(connection.ssl, ssl.SSLSocket),
            peer=connection.peer,
            same=connection.getpeername() == connection.peer,
            own=connection.getsockname(),
            number=connection.fileno() == connection.ssl.fileno() > 0,
            timeout=connection.gettimeout(),
            type=connection.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE),
            text=repr(connection),
            closed=connection.closed,
        )
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(LIMIT)
        buffer = bytearray(10)
        assert connection.recv_into(buffer, 2) == 2
        assert connection.recv_into(memoryview(buffer)[:1]) == 1
        assert connection.send(b"one ") == 4
        with connection.makefile("rwb") as file:
            file.write(file.readline())
        assert not connection.ktls  # nobody has asked for it
        assert connection.sendfile(io.BytesIO(b"a file"), 2) == 4
        connection.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):
            connection.recv(1)
        with connection:
            pass
        seen["after"] = (connection.closed, connection.fileno(), repr(connection), connection.peer)
        with pytest.raises(OSError, match="Bad file descriptor"):
            connection.recv(1)

    context.set_alpn_protocols(["x/1"])
    trusting.set_alpn_protocols(["y/1", "x/1"])
    with exchange_with(listener, context, trusting, handler) as client:
        client.sendall(b"abcline\n")
        assert read_all(client) == b"one line\nfile"
        peer = client.getsockname()
    assert seen["version"] == "TLSv1.3"
    assert len(seen["cipher"]) == 3
    assert (seen["alpn"], seen["certificate"], seen["kind"]) == ("x/1", None, True)
    assert (seen["peer"], seen["same"], seen["own"], seen["number"]) == (
        peer,
        True,
        listener.getsockname(),
        True,
    )
    assert (seen["timeout"], seen["type"], seen["closed"]) == (None, socket.SOCK_STREAM, False)
    assert seen["text"].startswith("<fastlisten.TLSConnection fd=")
    assert seen["after"] == (True, -1, "<fastlisten.TLSConnection [closed]>", peer)


def test_the_first_answer_does_not_wait_for_an_acknowledgement(
    listener: Listener, context: Any, trusting: Any
) -> None:
    """Of the tickets that TLS 1.3 has sent before it: Nagle's algorithm and a delayed ACK took 40 ms."""
    seen: list[bool] = []

    def handler(connection: TLSConnection) -> None:
        seen.append(bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))

    with exchange_with(listener, context, trusting, handler):
        pass
    assert seen == [True]


def test_a_plain_connection_has_no_ssl(connection: Any) -> None:
    assert connection.ssl is None


def test_the_end_is_said_after_much_was_sent(listener: Listener, context: Any, trusting: Any) -> None:
    """A client that does not pass over an end without close_notify gets it all."""
    much = bytes(2 << 20)

    def handler(connection: TLSConnection) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        connection.sendall(much)

    for _ in range(3):
        with exchange_with(listener, context, trusting, handler) as client:
            assert len(read_all(client)) == len(much)


def test_the_end_waits_no_longer_than_a_write(listener: Listener, context: Any, trusting: Any) -> None:
    """For a client that does not read."""
    given_up: list[float] = []

    def handler(connection: TLSConnection) -> None:
        connection.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while True:
                connection.sendall(bytes(1 << 20))
        given_up.append(time.monotonic())

    with serving(listener, handler, ssl=context), tls_client(listener, trusting):
        wait_until(lambda: given_up and listener.stats().active == 0)
        assert time.monotonic() - given_up[0] < 2


def test_who_shuts_down_can_still_receive(listener: Listener, context: Any, trusting: Any) -> None:
    said, got = threading.Event(), []

    def handler(connection: TLSConnection) -> None:
        got.append(connection.recv(10))
        connection.shutdown(socket.SHUT_WR)
        said.set()
        while data := connection.recv(10):
            got.append(data)

    with exchange_with(listener, context, trusting, handler) as client:
        client.sendall(b"one")
        assert client.recv(10) == b""  # said with close_notify
        assert said.wait(LIMIT)  # what comes within the shutdown() OpenSSL drops
        client.sendall(b"two")
    assert got == [b"one", b"two"]


def test_what_has_come_is_not_lost_by_a_shutdown(listener: Listener, context: Any, trusting: Any) -> None:
    sent, got = threading.Event(), []

    def handler(connection: TLSConnection) -> None:
        assert sent.wait(LIMIT)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):  # the client leaves with unread bytes of TLS, and so by a reset
            while data := connection.recv(10):
                got.append(data)

    with exchange_with(listener, context, trusting, handler) as client:
        client.sendall(b"one")
        client.sendall(b"two")
        sent.set()
        wait_until(lambda: got == [b"one", b"two"])
    assert got == [b"one", b"two"]


def test_a_file_outlives_the_handler(listener: Listener, context: Any, trusting: Any) -> None:
    files = []
    with serving(listener, lambda connection: files.append(connection.makefile("wb")), ssl=context):
        with tls_client(listener, trusting, suppress_ragged_eofs=False) as client:
            wait_until(lambda: files)
            assert listener.stats().active == 1
            files[0].write(b"late")
            files[0].close()
            assert read_all(client) == b"late"
        wait_until(lambda: listener.stats().active == 0)


def test_socket_gives_the_ssl_socket(listener: Listener, context: Any, trusting: Any) -> None:
    taken: list[Any] = []

    def handler(connection: TLSConnection) -> None:
        with connection:
            taken.append(connection.socket())
        taken.append(connection)

    with serving(listener, handler, ssl=context), tls_client(listener, trusting) as client:
        wait_until(lambda: listener.stats().handled == 1 and len(taken) == 2)
        sock, connection = taken
        assert (type(sock), sock.version(), connection.closed) == (ssl.SSLSocket, "TLSv1.3", True)
        for act in (
            lambda: connection.recv(1),
            connection.socket,
            lambda: connection.shutdown(socket.SHUT_RD),
        ):
            with pytest.raises(OSError, match="Bad file descriptor"):
                act()
        sock.sendall(b"still here")
        assert client.recv(100) == b"still here"
        number = sock.fileno()
        sock.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            socket.socket(fileno=number)


def test_detach_gives_the_descriptor(listener: Listener, context: Any, trusting: Any) -> None:
    given: list[int] = []
    with (
        serving(listener, lambda connection: given.append(connection.detach()), ssl=context),
        tls_client(listener, trusting, suppress_ragged_eofs=True) as client,
    ):
        wait_until(lambda: given)
        with socket.socket(fileno=given[0]) as raw:
            assert raw.getpeername() == client.getsockname()
        assert client.recv(1) == b""


def test_on_error_gets_the_connection_open(listener: Listener, context: Any, trusting: Any) -> None:
    def handler(connection: TLSConnection) -> None:
        raise LookupError("no such page")

    def on_error(error: Exception, connection: TLSConnection) -> None:
        connection.sendall(f"{connection.ssl.version()} {error}".encode())

    with (
        serving(listener, handler, ssl=context, on_error=on_error),
        tls_client(listener, trusting, suppress_ragged_eofs=False) as client,
    ):
        assert read_all(client) == b"TLSv1.3 no such page"
    assert listener.stats().handler_errors == 1


def test_what_a_handler_raises_is_logged(
    listener: Listener, context: Any, trusting: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(connection: TLSConnection) -> None:
        raise LookupError("no such page")

    with serving(listener, handler, ssl=context), tls_client(listener, trusting) as client:
        assert client.recv(1) == b""
        wait_until(lambda: caplog.records)
    assert "LookupError: no such page" in caplog.text


@needs("unix sockets")
def test_several_endpoints_one_context(unix_path: str, context: Any, trusting: Any) -> None:
    with fastlisten.bind("127.0.0.1:0") as first, fastlisten.bind(f"unix:{unix_path}") as second:
        served = Serving(lambda: fastlisten.serve(echo, first, second, ssl=context, threads=2))
        try:
            for target in (first, unix_path):
                with tls_client(target, trusting) as client:
                    client.sendall(b"hello")
                    assert client.recv(10) == b"hello"
            with connect(unix_path) as plain:
                plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
                with contextlib.suppress(ConnectionResetError):
                    read_all(plain)
            assert (failed(first), failed(second)) == ({}, {"not TLS": 1})
        finally:
            first.stop()
            served.wait()


# --- handshakes that fail


@pytest.mark.parametrize("drips", [False, True], ids=["silent", "drips"])
def test_a_handshake_has_a_deadline(listener: Listener, context: Any, trusting: Any, drips: bool) -> None:
    """Whatever the client does; and others are served meanwhile."""
    with serving(listener, echo, ssl=context, threads=(1, 4), handshake_timeout=SHORT):
        with connect(listener) as slow:
            begun = time.monotonic()
            if drips:
                slow.sendall(b"\x16\x03\x01\x02\x00\x01")  # a ClientHello of 512 bytes begins
            with tls_client(listener, trusting) as client:
                client.sendall(b"hello")
                assert client.recv(10) == b"hello"
            if drips:
                slow.settimeout(SHORT / 10)
            while True:
                try:
                    assert slow.recv(10) == b""
                    break
                except TimeoutError:
                    slow.sendall(b"\x00")
                except ConnectionResetError:
                    break
            assert SHORT - 0.05 < time.monotonic() - begun < SHORT + (5 if drips else 1)
        wait_until(lambda: failed(listener) == {"timeout": 1})
    assert listener.stats().handler_errors == 0


def test_a_reset_after_the_handshake_is_the_handler_s(
    listener: Listener, context: Any, trusting: Any
) -> None:
    got: list[Any] = []

    def handler(connection: TLSConnection) -> None:
        connection.sendall(b"!")
        try:
            got.append(connection.recv(1))  # SSLSocket takes it for an end, on some versions
        except ConnectionResetError:
            got.append(b"")

    with serving(listener, handler, ssl=context):
        client = tls_client(listener, trusting)
        assert client.recv(1) == b"!"
        reset(client)
        wait_until(lambda: got == [b""])
    assert (failed(listener), listener.stats().handler_errors) == ({}, 0)


# --- the loop goes on


def test_a_stop_ends_handshakes(listener: Listener, context: Any) -> None:
    with connect(listener), connect(listener), serving(listener, echo, ssl=context, threads=2) as served:
        wait_until(lambda: listener.stats().active == 2)
        begun = time.monotonic()
        listener.stop(drain=0.1)
        assert served.wait() == (0, 2)
        assert time.monotonic() - begun < 2
    assert failed(listener) == {"closed": 2}


def test_a_cut_ends_what_a_handler_waits_for(listener: Listener, context: Any, trusting: Any) -> None:
    got: list[bytes] = []

    def handler(connection: TLSConnection) -> None:
        connection.sendall(b"!")
        got.append(connection.recv(1))
        with connection.makefile("rb") as file:
            got.append(file.read())

    with serving(listener, handler, ssl=context) as served, tls_client(listener, trusting) as client:
        assert client.recv(1) == b"!"
        listener.stop(drain=0.1)
        assert served.wait() == (0, 1)
    assert got == [b"", b""]


def test_an_inline_serve_goes_on_after_the_deadline(listener: Listener, context: Any, trusting: Any) -> None:
    with serving(listener, echo, ssl=context, handshake_timeout=SHORT), connect(listener):
        wait_until(lambda: listener.stats().active == 1)
        with tls_client(listener, trusting) as client:
            client.sendall(b"hello")
            assert client.recv(10) == b"hello"
    assert failed(listener) == {"timeout": 1}


def test_who_finds_no_place_is_told_before_tls(listener: Listener, context: Any, trusting: Any) -> None:
    with (
        serving(listener, echo, ssl=context, threads=1, pending=1, busy=b"full"),
        tls_client(listener, trusting) as first,
        connect(listener) as second,
    ):
        wait_until(lambda: listener.stats().active == 2)
        with connect(listener) as third:
            assert read_all(third) == b"full"
        first.unwrap().close()
        with trusting.wrap_socket(second, server_hostname="localhost") as over:
            over.sendall(b"hello")
            assert over.recv(10) == b"hello"


def test_max_connections_counts_handshakes(listener: Listener, context: Any, trusting: Any) -> None:
    with (
        serving(listener, echo, ssl=context, threads=4, max_connections=1, handshake_timeout=SHORT),
        connect(listener),
    ):
        wait_until(lambda: listener.stats().active == 1)
        with tls_client(listener, trusting) as client:  # once the other's time is over
            assert failed(listener) == {"timeout": 1}
            client.sendall(b"hello")
            assert client.recv(10) == b"hello"


@posix_only("a signal to a process")
def test_ctrl_c_ends_a_handshake(pair: Pair) -> None:
    program = f"""
import ssl, threading, fastlisten, signal
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain({str(pair.cert)!r}, {str(pair.key)!r})
with fastlisten.bind("127.0.0.1:0") as listener:
    print(listener.getsockname()[1], flush=True)
    try:
        listener.serve(print, ssl=context)
    except KeyboardInterrupt:
        stats = listener.stats()
        print(stats.active, stats.handled)
"""
    with running(program) as process, connect(("127.0.0.1", int(line_of(process)))) as client:
        client.sendall(b"\x16")
        wait_until_asleep(process)
        process.send_signal(signal.SIGINT)
        assert line_of(process) in ("0 1", "0 0")
        assert process.wait(LIMIT) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


# --- options


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"ssl": True}, TypeError, "ssl must be an ssl.SSLContext or None, not bool"),
        ({"ssl": "cert.pem"}, TypeError, "ssl must be"),
        ({"ssl": ssl.create_default_context()}, ValueError, "^ssl: "),
        ({"handshake_timeout": 1.0}, ValueError, "handshake_timeout is only meaningful with ssl"),
        ({"ssl": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "handshake_timeout": 0}, ValueError, "above 0"),
        ({"ssl": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "handshake_timeout": -1.0}, ValueError, "above 0"),
        (
            {"ssl": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "handshake_timeout": float("nan")},
            ValueError,
            "nan",
        ),
        ({"ssl": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "handshake_timeout": "1"}, TypeError, "not str"),
    ],
)
def test_what_is_wrong_is_told_before_a_socket_opens(
    options: Any, error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Listener, "listen", None)
    with pytest.raises(error, match=text):
        fastlisten.serve(echo, "127.0.0.1:0", **options)


def test_a_client_s_context_without_names_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    with pytest.raises(ValueError, match="PROTOCOL_TLS_CLIENT"):
        fastlisten.serve(echo, "127.0.0.1:0", ssl=context)


def test_ssl_is_imported_by_who_asks_for_it() -> None:
    run("import sys, fastlisten, fastlisten.socketserver\nassert 'ssl' not in sys.modules")


def test_a_context_s_own_class_of_sockets_is_used(listener: Listener, pair: Pair, trusting: Any) -> None:
    class Own(ssl.SSLSocket):
        pass

    context = server_context(pair)
    context.sslsocket_class = Own
    taken: list[Any] = []
    with (
        serving(listener, lambda connection: taken.append(connection.socket()), ssl=context),
        tls_client(listener, trusting),
    ):
        wait_until(lambda: taken)
    assert type(taken[0]) is Own
    taken[0].close()


# --- files

KTLS = 1 << 3  # SSL_OP_ENABLE_KTLS; ssl has its name since 3.12


def kernel_has_tls() -> bool:
    try:
        with socket.socket() as listening, socket.socket() as sock:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            sock.connect(listening.getsockname())
            sock.setsockopt(socket.IPPROTO_TCP, 31, b"tls")  # TCP_ULP
    except OSError:
        return False
    return True


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_a_file_is_sent_whether_or_not_the_kernel_encrypts(
    listener: Listener, pair: Pair, trusting: ssl.SSLContext, tmp_path: Path, size: int
) -> None:
    context = server_context(pair)
    context.options |= KTLS
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    path = tmp_path / "file"
    path.write_bytes(data)
    found = []

    def handler(connection: TLSConnection) -> None:
        found.append(connection.ktls)
        connection.sendall(b"<")
        with path.open("rb") as file:
            assert connection.sendfile(file) == size
        connection.sendall(b">")

    with exchange_with(listener, context, trusting, handler) as client:
        assert read_all(client) == b"<" + data + b">"
    if not kernel_has_tls():
        assert found == [False]


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux does")
def test_with_ktls_the_file_goes_by_the_kernel(
    listener: Listener,
    pair: Pair,
    trusting: ssl.SSLContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told that the kernel encrypts where it does not, what comes out of it is the file in clear."""
    monkeypatch.setattr("fastlisten._tls.SOL_TLS", socket.SOL_SOCKET)
    monkeypatch.setattr("fastlisten._tls.TLS_TX", socket.SO_TYPE)
    context = server_context(pair)
    context.num_tickets = 0
    path = tmp_path / "file"
    path.write_bytes(b"\0in clear" * 10)

    def handler(connection: TLSConnection) -> None:
        assert connection.ktls
        with path.open("rb") as file:
            assert connection.sendfile(file, 1, 8) == 8
        connection.recv(1)

    with (
        serving(listener, handler, ssl=context),
        tls_client(listener, trusting) as client,
        socket.socket(fileno=client.detach()) as raw,
    ):
        raw.settimeout(LIMIT)
        assert raw.recv(8, socket.MSG_WAITALL) == b"in clear"
