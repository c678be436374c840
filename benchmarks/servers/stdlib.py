"""The standard library's blocking servers."""

from __future__ import annotations

import socket
import socketserver
import threading

from .handlers import ADDRESS, BACKLOG, HANDLERS, take_on_demand


def accept_loop(work: str) -> None:
    """socket.accept() in a loop, one client after the other."""
    listener = socket.create_server(ADDRESS, backlog=BACKLOG)
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


def _serve(base: type[socketserver.TCPServer], work: str) -> None:
    handler = _hold if work == "hold" else HANDLERS[work]

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            handler(self.request)

    class Server(base):  # type: ignore[misc, valid-type]
        request_queue_size = BACKLOG
        daemon_threads = True

    with Server(ADDRESS, Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


def tcp_server(work: str) -> None:
    """socketserver.TCPServer."""
    _serve(socketserver.TCPServer, work)


def threading_tcp_server(work: str) -> None:
    """socketserver.ThreadingTCPServer: a thread a connection."""
    if work == "hold":
        threading.stack_size(256 * 1024)  # so that 10,000 of them fit the address space
    _serve(socketserver.ThreadingTCPServer, work)
