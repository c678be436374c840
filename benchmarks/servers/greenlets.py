"""gevent's StreamServer."""

from __future__ import annotations

import gevent.socket
from gevent.server import StreamServer

from .handlers import ADDRESS, BACKLOG, HANDLERS


def _hold(connection: gevent.socket.socket) -> None:
    connection.recv(1)


def stream_server(work: str) -> None:
    """A greenlet a connection; the server closes when the handler returns."""
    handler = _hold if work == "hold" else HANDLERS[work]
    server = StreamServer(ADDRESS, lambda connection, _: handler(connection), backlog=BACKLOG)
    server.start()
    print(server.server_port, flush=True)
    server.serve_forever()
