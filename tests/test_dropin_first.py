"""The drop-in servers' first_bytes_timeout and proxy_protocol: what a client has to send first."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from fastlisten import Proxy, socketserver
from fastlisten.http.server import ThreadingHTTPServer
from helpers import LIMIT, connect, exchange, needs, read_all, wait_until
from helpers.certificates import Pair, client_context, server_context
from helpers.internals import listener_of
from helpers.proxy_headers import inet, v1, v2

LOCAL = Proxy(["127.0.0.1", "::1"], timeout=LIMIT)
KINDS = pytest.mark.parametrize("kind", [socketserver.TCPServer, socketserver.ThreadingTCPServer])


class Peer(socketserver.BaseRequestHandler):
    """Tells who the client is, and what it sent."""

    def handle(self) -> None:
        data = self.request.recv(100)
        self.request.sendall(repr((self.client_address, data)).encode())


@contextlib.contextmanager
def running(kind: Any, handler: Any = Peer, context: Any = None, **attributes: Any) -> Iterator[Any]:
    """Serve in a thread with a class that has these attributes."""
    with type("Server", (kind,), attributes)(("127.0.0.1", 0), handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            wait_until(lambda: listener_of(server))
            yield server
        finally:
            server.shutdown()
            thread.join()


@KINDS
def test_a_silent_client_holds_nobody_up(kind: Any) -> None:
    with running(kind, first_bytes_timeout=LIMIT) as server, connect(server.server_address) as silent:
        wait_until(lambda: listener_of(server).stats().waiting == 1)
        assert b"ping" in exchange(server.server_address)
        silent.sendall(b"late")
        assert b"late" in read_all(silent)


@KINDS
def test_a_client_is_closed_when_its_time_is_over(kind: Any) -> None:
    with running(kind, first_bytes_timeout=0.1) as server, connect(server.server_address) as silent:
        assert read_all(silent) == b""
        wait_until(lambda: listener_of(server).stats().refused_for == {"silent": 1})


@KINDS
def test_the_client_s_address_is_the_header_s(kind: Any) -> None:
    with running(kind, proxy_protocol=LOCAL) as server:
        for header in (v1(), v2(inet())):
            answer = exchange(server.server_address, header + b"hello")
            assert answer == repr((("192.0.2.1", 1000), b"hello")).encode()


class Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.address_string().encode())

    def log_message(self, *arguments: Any) -> None:
        pass


def test_http() -> None:
    with running(ThreadingHTTPServer, Hello, proxy_protocol=LOCAL, first_bytes_timeout=LIMIT) as server:
        answer = exchange(server.server_address, v1() + b"GET / HTTP/1.0\r\n\r\n")
        assert answer.endswith(b"\r\n\r\n192.0.2.1")


@needs("the openssl command")
@KINDS
def test_before_tls(kind: Any, pair: Pair) -> None:
    with (
        running(kind, context=server_context(pair), proxy_protocol=LOCAL) as server,
        connect(server.server_address) as plain,
    ):
        plain.sendall(v1())
        with client_context(pair).wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(b"secret")
            assert client.recv(100) == repr((("192.0.2.1", 1000), b"secret")).encode()


def test_a_header_is_not_passed_over() -> None:
    """Where the original's loop accepts, nobody would read it."""

    class Own(socketserver.TCPServer):
        proxy_protocol = LOCAL

        def get_request(self) -> tuple[socket.socket, Any]:
            return super().get_request()

    with Own(("127.0.0.1", 0), Peer) as server:
        for serve in (server.serve_forever, server.handle_request):
            with pytest.raises(ValueError, match="proxy_protocol needs fastlisten's loop"):
                serve()
