"""Servers of socketserver and of its drop-in, for the tests of both."""

import contextlib
import socketserver
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fastlisten import socketserver as dropin
from helpers import LIMIT

BOTH = pytest.mark.parametrize("module", [socketserver, dropin], ids=["original", "dropin"])
THREADING = pytest.mark.parametrize("threading_", [False, True], ids=["inline", "threads"])


class Echo(socketserver.StreamRequestHandler):
    """Answers one line with itself."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


def server_class(module: Any, threading_: bool, kind: Any = "TCPServer") -> Any:
    """The TCPServer or UnixStreamServer of a module, or its threading variant."""
    return getattr(module, ("Threading" if threading_ else "") + kind)


# How often the original's loop looks whether it is to end, in seconds; 0.5 by default.
POLL_INTERVAL = 0.02


class Served:
    """serve_forever() of a server in a thread, and what came out of it."""

    def __init__(self, server: Any, **arguments: Any) -> None:
        arguments.setdefault("poll_interval", POLL_INTERVAL)
        self.error: BaseException | None = None
        self.server = server
        self.thread = threading.Thread(target=self._run, kwargs=arguments)
        self.thread.start()

    def _run(self, **arguments: Any) -> None:
        try:
            self.server.serve_forever(**arguments)
        except BaseException as error:
            self.error = error

    def wait(self) -> Any:
        """Wait for serve_forever() to end by itself, and return what it raised."""
        self.thread.join(LIMIT)
        assert not self.thread.is_alive(), "serve_forever() has not ended"
        return self.error


@contextlib.contextmanager
def serving(server: Any, **arguments: Any) -> Iterator[Any]:
    """Serve in a thread; shut down and close at the end."""
    with server:
        served = Served(server, **arguments)
        try:
            yield served
        finally:
            if served.thread.is_alive():
                server.shutdown()
            error = served.wait()
        if error is not None:
            raise error
