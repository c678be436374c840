"""What each server of `python -m benchmarks.workers` serves: a short page, and one that blocks its worker.

An ASGI application, a WSGI one, and a handler of fastlisten's.  STARTS names a file that gets a byte with
each process that imports this; with CRASH in the environment that process then ends at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

PAGE = b"hello\n"
BLOCKED_FOR = 5.0  # seconds


def began() -> None:
    """Note that a worker has begun; and end it, if that is asked for."""
    if "STARTS" in os.environ:
        with open(os.environ["STARTS"], "ab", buffering=0) as starts:
            starts.write(b".")
    if "CRASH" in os.environ:
        os._exit(1)


async def asgi(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    """The ASGI application."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/block":
        time.sleep(BLOCKED_FOR)  # as a call does that nobody has thought of
    headers = [(b"content-length", b"%d" % len(PAGE)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": PAGE})


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """The WSGI application."""
    if environ["PATH_INFO"] == "/block":
        time.sleep(BLOCKED_FOR)
    start_response("200 OK", [("Content-Length", str(len(PAGE)))])
    return [PAGE]


def handler(connection: Any) -> None:
    """The handler: as much of HTTP as these clients speak."""
    request = connection.recv(4096)
    if request.startswith(b"GET /block"):
        time.sleep(BLOCKED_FOR)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n" + PAGE)


def target(*listeners: Any) -> object:
    """What fastlisten's workers run."""
    began()
    return listeners[0].serve(handler)


if "FASTLISTEN" not in os.environ:  # whose parent imports this, too
    began()
