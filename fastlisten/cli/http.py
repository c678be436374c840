"""The built-in handler `http`."""

from __future__ import annotations

import contextlib
import functools
import re
import socket

from fastlisten import Connection

HTTP_SIZE = 65536  # the longest request head that is read, in bytes
HTTP_HEAD_END = re.compile(rb"\r?\n\r?\n")  # a person's telnet may leave out \r
HTTP_TIMEOUT = 10.0  # seconds a client may stay silent
HTTP_BODY = 1 << 26  # the longest request body that is read and dropped, in bytes
HTTP_CONTENT = b"fastlisten\n"


def http(connection: Connection) -> None:
    """Read one HTTP/1 request and answer it with a small 200, then close."""
    connection.settimeout(HTTP_TIMEOUT)
    with contextlib.suppress(ConnectionError, TimeoutError):  # the client left or fell silent
        head = b""
        while not (end := HTTP_HEAD_END.search(head)):
            data = connection.recv(HTTP_SIZE)
            if not data:
                return
            head += data
            if len(head) > HTTP_SIZE:
                connection.sendall(_answer(b"431 Request Header Fields Too Large", b""))
                _discard(connection)
                return
        head, rest = head[: end.start()], head[end.end() :]
        content = b"" if head.startswith(b"HEAD ") else HTTP_CONTENT
        fields = head.lower()
        if b"\nexpect:" in fields and not rest:
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.sendall(_answer(b"200 OK", content))
        if rest or b"\ncontent-length:" in fields or b"\ntransfer-encoding:" in fields:
            _discard(connection)


@functools.cache
def _answer(status: bytes, content: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (
        status,
        len(HTTP_CONTENT) if status.startswith(b"200") else 0,
        content,
    )


def _discard(connection: Connection) -> None:
    """Read what the client still sends: closing with unread input makes the kernel send a reset,
    which can overtake the answer (RFC 9112, section 9.6)."""
    connection.shutdown(socket.SHUT_WR)
    left = HTTP_BODY
    while left > 0 and (data := connection.recv(HTTP_SIZE)):
        left -= len(data)
