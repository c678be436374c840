"""Servers of fastlisten.socketserver and fastlisten.http.server whose socket is a TLS listener."""

import contextlib
import re
import socketserver
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import fastlisten.http.server
from fastlisten import socketserver as dropin
from helpers import LIMIT, connect, wait_until
from helpers.certificates import Pair, client_context, server_context
from helpers.internals import listener_of
from helpers.programs import line_of, run, running
from helpers.socketservers import BOTH, THREADING, Echo, Served, server_class, serving

AT_ONCE = 0.5  # seconds: within that, shutdown() returns
SHORT = 0.3  # seconds: a deadline that a test waits for


@pytest.fixture(scope="module")
def trusting(pair: Pair) -> ssl.SSLContext:
    return client_context(pair)


def over_tls(kind: Any, pair: Pair, handler: Any = Echo, **options: Any) -> Any:
    """Make a server of this class whose socket is a TLS listener, as programs do."""
    server = kind(("127.0.0.1", 0), handler)
    server.socket.listen(64)
    server.socket = server_context(pair).wrap_socket(server.socket, server_side=True, **options)
    return server


def answer_of(server: Any, trusting: ssl.SSLContext) -> bytes:
    raw = connect(server.server_address)
    with trusting.wrap_socket(raw, server_hostname="localhost") as client:
        client.sendall(b"hello\n")
        return client.recv(100)


@BOTH
@THREADING
def test_a_request_is_an_ssl_socket(module: Any, threading_: bool, pair: Pair, trusting: Any) -> None:
    seen: list[Any] = []

    class Handler(Echo):
        def setup(self) -> None:
            request = self.request
            seen.append(
                (
                    type(request),
                    request.version(),
                    request.gettimeout(),
                    request.server_side,
                    request.do_handshake_on_connect,
                    request.suppress_ragged_eofs,
                    self.client_address == request.getpeername(),
                )
            )
            super().setup()

    server = over_tls(server_class(module, threading_), pair, Handler, suppress_ragged_eofs=False)
    with serving(server):
        for _ in range(3):
            assert answer_of(server, trusting) == b"hello\n"
    assert seen == [(ssl.SSLSocket, "TLSv1.3", None, True, True, False, True)] * 3


def test_silent_clients_keep_nobody_waiting(pair: Pair, trusting: Any) -> None:
    server = over_tls(dropin.ThreadingTCPServer, pair)
    server.daemon_threads = True
    server.handshake_timeout = 2 * LIMIT
    with serving(server), contextlib.ExitStack() as clients:
        for _ in range(20):
            clients.enter_context(connect(server.server_address))
        assert answer_of(server, trusting) == b"hello\n"
        assert (server.tls_handshakes, server.tls_failures) == (1, {})  # the others are still here
        begun = time.monotonic()
        server.shutdown()
        assert time.monotonic() - begun < AT_ONCE


def taken_by(server: Any) -> int:
    """Return how many clients the loop has taken and handed to the server's hooks."""
    listener = listener_of(server)
    return listener.stats().handled if listener else 0


def with_hook(kind: Any, name: str) -> Any:
    """A server class that has this hook overridden by what notes the call and the thread."""

    def hook(self: Any, *arguments: Any) -> Any:
        self.called.append((name, threading.current_thread()))
        return getattr(super(overriding, self), name)(*arguments)

    overriding = type("Overriding", (kind,), {name: hook, "called": []})
    return overriding


@THREADING
@pytest.mark.parametrize("name", ["get_request", "service_actions", "verify_request", "process_request"])
def test_hooks_are_called_where_they_were(threading_: bool, name: str, pair: Pair, trusting: Any) -> None:
    """In the thread of serve_forever(), after the handshake; which has its deadline there, too."""
    server = over_tls(with_hook(server_class(dropin, threading_), name), pair)
    server.handshake_timeout = SHORT
    with serving(server, poll_interval=0.05) as served, connect(server.server_address):
        assert answer_of(server, trusting) == b"hello\n"
        assert {thread for called, thread in server.called} == {served.thread}
    assert (server.tls_handshakes, server.tls_failures) == (1, {"timeout": 1})


@pytest.mark.parametrize("name", ["", "get_request", "verify_request"])
def test_shutdown_waits_for_no_handshake(name: str, pair: Pair) -> None:
    kind = with_hook(dropin.TCPServer, name) if name else dropin.TCPServer
    server = over_tls(kind, pair)
    with serving(server), connect(server.server_address) as silent:
        wait_until(lambda: getattr(server, "called", None) or taken_by(server))
        begun = time.monotonic()
        server.shutdown()
        assert time.monotonic() - begun < AT_ONCE
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(1) == b""


def test_a_handshake_in_a_thread_outlives_shutdown(pair: Pair, trusting: Any) -> None:
    """As a request does."""
    server = over_tls(dropin.ThreadingTCPServer, pair)
    with serving(server), connect(server.server_address) as raw:
        wait_until(lambda: taken_by(server))
        server.shutdown()
        with trusting.wrap_socket(raw, server_hostname="localhost") as client:
            client.sendall(b"hello\n")
            assert client.recv(100) == b"hello\n"


@THREADING
def test_handle_request_has_the_deadline(threading_: bool, pair: Pair, trusting: Any) -> None:
    server = over_tls(server_class(dropin, threading_), pair)
    server.handshake_timeout = SHORT
    with server, connect(server.server_address) as silent:
        server.handle_request()
        assert silent.recv(1) == b""
        served = threading.Thread(target=server.handle_request)
        served.start()
        assert answer_of(server, trusting) == b"hello\n"
        served.join(LIMIT)
    assert (server.tls_handshakes, server.tls_failures) == (1, {"timeout": 1})


@BOTH
def test_a_handler_may_do_the_handshake(module: Any, pair: Pair, trusting: Any) -> None:
    seen = []

    class Handler(Echo):
        def setup(self) -> None:
            seen.append((self.request.version(), self.request.do_handshake_on_connect))
            self.request.do_handshake()
            super().setup()

    server = over_tls(module.ThreadingTCPServer, pair, Handler, do_handshake_on_connect=False)
    with serving(server):
        assert answer_of(server, trusting) == b"hello\n"
    assert seen == [(None, False)]


@THREADING
def test_what_is_wrong_with_the_server_ends_it(threading_: bool, pair: Pair) -> None:
    """As in the original, where the error of a get_request() comes out of serve_forever()."""
    server = over_tls(server_class(dropin, threading_), pair)
    server.handshake_timeout = "soon"
    with server:
        served = Served(server)
        connect(server.server_address).close()
        assert isinstance(served.wait(), TypeError)


def test_a_plain_server_has_no_handshakes() -> None:
    with dropin.TCPServer(("127.0.0.1", 0), Echo) as server:
        assert (server.tls_handshakes, server.tls_failures) == (0, {})


def test_a_mix_in_gives_it_to_others(pair: Pair, trusting: Any) -> None:
    class Server(dropin.AcceptMixIn, socketserver.ThreadingTCPServer):
        daemon_threads = True

    server = over_tls(Server, pair)
    with serving(server), connect(server.server_address):
        assert answer_of(server, trusting) == b"hello\n"


# --- http.server, which has TLS from 3.14 on

needs_https = pytest.mark.skipif(
    sys.version_info < (3, 14), reason="http.server has HTTPSServer from 3.14 on"
)


@needs_https
@pytest.mark.parametrize("name", ["HTTPSServer", "ThreadingHTTPSServer"])
def test_https_server(name: str, pair: Pair, trusting: Any, tmp_path: Path, capfd: Any) -> None:
    import http.client
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *arguments: Any) -> None:
            pass

    kind: Any = getattr(fastlisten.http.server, name)
    server = kind(("127.0.0.1", 0), Handler, certfile=pair.cert, keyfile=pair.key)
    server.handshake_timeout = SHORT
    with serving(server), connect(server.server_address):
        client = http.client.HTTPSConnection("localhost", server.server_port, timeout=LIMIT, context=trusting)
        client.request("GET", "/")
        response = client.getresponse()
        assert (response.status, response.read()) == (200, b"ok")
        client.close()
        begun = time.monotonic()
        server.shutdown()
        assert time.monotonic() - begun < AT_ONCE
    assert capfd.readouterr() == ("", "")


@needs_https
def test_a_certificate_without_its_key_is_the_original_s_error(pair: Pair) -> None:
    """And no socket is left of it."""
    import http.server

    for module in (http.server, fastlisten.http.server):
        kind: Any = module.HTTPSServer
        with pytest.raises(ssl.SSLError, match="PEM lib"):
            kind(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler, certfile=pair.cert)


@needs_https
def test_the_command_line_of_http_server(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "hello.txt").write_bytes(b"hello\n")
    command = [sys.executable, "-u", "-m", "fastlisten.http.server", "--bind", "127.0.0.1", "0"]
    command += ["--directory", str(tmp_path), "--tls-cert", str(pair.cert), "--tls-key", str(pair.key)]
    with running(command, folder=tmp_path) as process:
        match = re.search(r"https://127\.0\.0\.1:(\d+)/", line_of(process))
        assert match
        with connect(("127.0.0.1", int(match[1]))):  # silent
            url = f"https://localhost:{match[1]}/hello.txt"
            curl = ["curl", "-sS", "--connect-to", "::127.0.0.1:", "--cacert", str(pair.cert), url]
            assert run(curl).stdout == "hello\n"
