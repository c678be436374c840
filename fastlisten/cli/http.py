"""The built-in handler `http`: the standard library's request handler, with one small answer."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

import fastlisten

CONTENT = b"fastlisten\n"
SILENCE = 10.0  # seconds a client may stay silent
UNREAD_SIZE = 65536  # bytes of a request body read at once
UNREAD_LIMIT = 1 << 26  # bytes of a request body that are read and dropped, at most


def http(connection: fastlisten.Connection) -> None:
    """Read one HTTP/1 request and answer it with a small 200; who leaves or falls silent gets none."""
    with contextlib.suppress(OSError):  # over TLS it has other ways to leave
        request: Any = connection  # has what the request handler uses of a socket.socket
        server: Any = None  # is not used by the request handler
        OneRequest(request, connection.peer, server)


class OneRequest(BaseHTTPRequestHandler):
    """Answers one request, whatever its method is, and ends the connection so that the answer arrives."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # a request line that says no version gets a status line too
    server_version = f"fastlisten/{fastlisten.__version__}"
    timeout = SILENCE
    expects_more = False  # whether the client may have more to send than the head that was read

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):  # do_GET() and so on, which the original looks up
            return self.answer
        raise AttributeError(name)

    def handle(self) -> None:
        """Serve one request, then take what the client still sends."""
        self.handle_one_request()
        self._drop_unread()

    def answer(self) -> None:
        """Write the answer, without reading the request's body."""
        length = self.headers.get("Content-Length", "0")
        self.expects_more = length != "0" or "Transfer-Encoding" in self.headers
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(CONTENT)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(CONTENT)

    def send_error(self, *arguments: Any, **named: Any) -> None:
        """As the original; of a request that was not understood more may come."""
        self.expects_more = True
        super().send_error(*arguments, **named)

    def _drop_unread(self) -> None:
        """Read what the client still sends: closing with unread input makes the kernel send a reset,
        which can overtake the answer (RFC 9112, section 9.6)."""
        with contextlib.suppress(OSError):  # the client has left, or has fallen silent
            self.connection.shutdown(socket.SHUT_WR)
            if not self.expects_more:
                self.connection.settimeout(0)  # of a second request only what is here
            left = UNREAD_LIMIT
            while left > 0 and (data := self.connection.recv(UNREAD_SIZE)):
                left -= len(data)

    def version_string(self) -> str:
        """Return what the answer tells of the server: not which Python it runs on."""
        return self.server_version

    def log_message(self, *_: object) -> None:
        """Log nothing: a request is counted by the listener, and that is all."""
