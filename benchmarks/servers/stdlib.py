"""The standard library's blocking servers, and the same programs on fastlisten's drop-ins.

`module` is the name of the standard module, or of the drop-in for it.
"""

from __future__ import annotations

import importlib
import socketserver
import threading
from typing import TYPE_CHECKING

from .handlers import ADDRESS, BACKLOG, HANDLERS, HTTP_ANSWER, take_on_demand

if TYPE_CHECKING:
    import http.server
    import socket


def accept_loop(work: str, module: str) -> None:
    """socket.accept() in a loop, one client after the other."""
    listener: socket.socket
    listener = importlib.import_module(module).create_server(ADDRESS, backlog=BACKLOG)
    print(listener.getsockname()[1], flush=True)
    accept = listener.accept
    if work == "take":
        take_on_demand(lambda count: [accept()[0] for _ in range(count)])
        return
    if work == "hold":
        held = []
        while True:
            held.append(accept())
    handler = HANDLERS[work]
    while True:
        connection, _ = accept()
        handler(connection)
        connection.close()


def _hold(connection: socket.socket) -> None:
    connection.recv(1)


def tcp_server(work: str, module: str, name: str) -> None:
    """socketserver's TCPServer, or ThreadingTCPServer with a thread a connection."""
    base: type[socketserver.TCPServer] = getattr(importlib.import_module(module), name)
    handler = _hold if work == "hold" else HANDLERS[work]
    if work == "hold":
        threading.stack_size(256 * 1024)  # so that 10,000 of them fit the address space

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            handler(self.request)

    class Server(base):  # type: ignore[misc, valid-type]
        request_queue_size = BACKLOG
        daemon_threads = True

    with Server(ADDRESS, Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


def http_server(_: str, module: str) -> None:
    """http.server's ThreadingHTTPServer; its handler parses the request."""
    original: type[http.server.ThreadingHTTPServer]
    library = importlib.import_module(module)
    original = library.ThreadingHTTPServer

    class Handler(library.BaseHTTPRequestHandler):  # type: ignore[misc, name-defined]
        def do_GET(self) -> None:  # noqa: N802
            self.wfile.write(HTTP_ANSWER)

    class Server(original):  # type: ignore[misc, valid-type]
        request_queue_size = BACKLOG

    with Server(ADDRESS, Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
