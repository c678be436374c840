"""The drop-in servers' admission_control: who may come in."""

import socket
from typing import Any

import pytest

from fastlisten import Admission, socketserver
from fastlisten.http.server import ThreadingHTTPServer
from helpers import CLOSED, connect, exchange, refusal, wait_until
from helpers.internals import listener_of
from helpers.proxy_headers import inet, v2
from test_dropin_first import KINDS, LOCAL, Hello, Peer, running


@KINDS
def test_who_is_denied_is_refused_and_counted(kind: Any) -> None:
    with running(kind, admission_control=Admission(deny=["127.0.0.1"])) as server:
        for _ in range(3):
            assert refusal(server.server_address) == CLOSED
        wait_until(lambda: listener_of(server).stats().refused_for == {"denied": 3})


def test_a_source_s_connections_at_a_time() -> None:
    admission = Admission(concurrent=1)
    with running(socketserver.ThreadingTCPServer, admission_control=admission) as server:
        for _ in range(2):
            with connect(server.server_address) as client:
                wait_until(lambda: admission.stats().open == 1)
                assert refusal(server.server_address) == CLOSED
                client.sendall(b"hello")
                assert b"hello" in client.recv(100)
            wait_until(lambda: admission.stats().open == 0)


def test_http_behind_a_proxy() -> None:
    admission = Admission(concurrent=5, rate=0.001, burst=1)
    with running(ThreadingHTTPServer, Hello, proxy_protocol=LOCAL, admission_control=admission) as server:
        for source in ("192.0.2.1", "192.0.2.2"):
            request = v2(inet(source)) + b"GET / HTTP/1.0\r\n\r\n"
            assert exchange(server.server_address, request).endswith(source.encode())
        wait_until(lambda: admission.stats().open == 0)
        wait_until(lambda: listener_of(server).stats().active == 0)


def test_it_is_not_passed_over() -> None:
    """Where the original's loop accepts, nobody would be asked."""

    class Own(socketserver.TCPServer):
        admission_control = Admission(rate=1)

        def get_request(self) -> tuple[socket.socket, Any]:
            return super().get_request()

    with Own(("127.0.0.1", 0), Peer) as server:
        for serve in (server.serve_forever, server.handle_request):
            with pytest.raises(ValueError, match="admission_control needs fastlisten's loop"):
                serve()
