"""A TLS server of each kind that there is, for tests that are the same for all of them."""

import asyncio
import contextlib
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

from fastlisten import aio, bind
from fastlisten import socketserver as dropin
from helpers import LIMIT, LOOPBACK, serving, socketservers
from helpers.aio import LOOPS


class Talk:
    """What is said on one connection, whoever reads and writes: this one echoes.

    tls: the SSLObject or SSLSocket.  ended: no more is to be read.
    """

    ended = False

    def __init__(self, tls: Any) -> None:
        self.tls = tls

    def answer(self, data: bytes) -> bytes:
        """What is to be sent for what has come."""
        return data


class Web(Talk):
    """Answers requests of HTTP/1.1 and 1.0 with the version of TLS, whether the session was resumed, and
    the name in the client's certificate."""

    asked = b""

    def answer(self, data: bytes) -> bytes:
        *requests, self.asked = (self.asked + data).split(b"\r\n\r\n")
        words = ["resumed" if self.tls.session_reused else "new", self.tls.version()]
        if certificate := self.tls.getpeercert():
            words.append(certificate["subject"][0][0][1])
        content = " ".join(words).encode()
        for request in requests:
            self.ended = b"HTTP/1.1\r\n" not in request or b"\r\nConnection: close" in request
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(content)
        if self.ended:
            head += b"Connection: close\r\n"
        return (head + b"\r\n" + content) * len(requests)


class TlsServer:
    """A server that runs.

    port: where, on 127.0.0.1.  failures: what it counts of handshakes that fail.  reports: what it tells its
    owner of.  begun, talked: of connections that were through, how many there were, and how many are over.
    """

    port: int
    failures: Callable[[], dict[str, int]]

    def __init__(self, talk: type[Talk]) -> None:
        self.talk = talk
        self.reports: list[Any] = []
        self.begun = self.talked = 0

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def over(self) -> int:
        """How many clients have come and gone."""
        return self.talked + sum(self.failures().values())

    def begin(self, tls: Any) -> Talk:
        """A handshake is through."""
        self.begun += 1
        return self.talk(tls)

    def talk_on(self, connection: Any, tls: Any) -> None:
        """Handle a connection that blocks, until its client leaves in some way."""
        talk = self.begin(tls)
        try:
            while not talk.ended and (data := connection.recv(1 << 16)):
                connection.sendall(talk.answer(data))
        except OSError:  # which an SSLError is
            pass
        finally:
            self.talked += 1


Way = Callable[..., contextlib.AbstractContextManager[None]]
"""Has a TlsServer serve with a context, and so many seconds for a handshake."""


def _serve(**options: Any) -> Way:
    @contextlib.contextmanager
    def way(server: TlsServer, context: ssl.SSLContext, seconds: float) -> Iterator[None]:
        def handler(connection: Any) -> None:
            server.talk_on(connection, connection.ssl)

        def on_error(error: Exception, connection: Any) -> None:
            server.reports.append(error)

        tls = {"ssl": context, "handshake_timeout": seconds, "on_error": on_error}
        with bind(LOOPBACK) as listener, serving(listener, handler, **tls, **options):
            server.port = listener.getsockname()[1]
            server.failures = lambda: dict(listener.stats().tls_failures)
            yield

    return way


def _dropin(threading_: bool) -> Way:
    @contextlib.contextmanager
    def way(server: TlsServer, context: ssl.SSLContext, seconds: float) -> Iterator[None]:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                server.talk_on(self.request, self.request)

        class Server(socketservers.server_class(dropin, threading_)):  # type: ignore[misc]
            handshake_timeout = seconds

            def handle_error(self, request: Any, client_address: Any) -> None:
                server.reports.append(client_address)

        made: Any = Server(("127.0.0.1", 0), Handler)
        made.socket = context.wrap_socket(made.socket, server_side=True)
        server.port = made.server_address[1]
        server.failures = lambda: dict(made.tls_failures)
        with socketservers.serving(made):
            yield

    return way


def _asyncio(factory: Callable[[], asyncio.AbstractEventLoop], **options: Any) -> Way:
    @contextlib.contextmanager
    def way(server: TlsServer, context: ssl.SSLContext, seconds: float) -> Iterator[None]:
        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                self.transport, self.talk = transport, server.begin(transport.get_extra_info("ssl_object"))

            def data_received(self, data: bytes) -> None:
                self.transport.write(self.talk.answer(data))
                if self.talk.ended:
                    self.transport.close()

            def connection_lost(self, error: Exception | None) -> None:
                server.talked += 1

        async def main() -> None:
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            loop.set_exception_handler(lambda _, report: server.reports.append(report))
            made = await aio.create_server(
                Protocol, "127.0.0.1", 0, ssl=context, ssl_handshake_timeout=seconds, **options
            )
            server.port = made.sockets[0].getsockname()[1]
            server.failures = lambda: dict(made.stats().tls_failures)
            stops.append(lambda: loop.call_soon_threadsafe(stop.set))
            ready.set()
            await stop.wait()
            made.close(drain=0)
            await made.wait_closed()

        def run() -> None:
            try:
                with asyncio.Runner(loop_factory=factory) as runner:
                    runner.run(main())
            finally:
                ready.set()

        ready, stops = threading.Event(), list[Callable[[], object]]()
        thread = threading.Thread(target=run, name="asyncio")
        thread.start()
        assert ready.wait(LIMIT)
        try:
            yield
        finally:
            for stop in stops:
                stop()
            thread.join(LIMIT)

    return way


WAYS: dict[str, Way] = {
    "serve": _serve(),
    "serve-threads": _serve(threads=(1, 4)),
    "TCPServer": _dropin(threading_=False),
    "ThreadingTCPServer": _dropin(threading_=True),
}
ON_ASYNCIO: dict[str, Way] = {}
for _plain, _name in {"asyncio": "EventLoop", "uvloop": "UvloopEventLoop"}.items():
    if _plain in LOOPS:
        ON_ASYNCIO[_plain] = _asyncio(LOOPS[_plain])
        ON_ASYNCIO[_name] = _asyncio(getattr(aio, _name))
        ON_ASYNCIO[f"{_name}-handshake_threads"] = _asyncio(getattr(aio, _name), handshake_threads=1)
WAYS |= ON_ASYNCIO


@contextlib.contextmanager
def tls_server(
    way: str, context: ssl.SSLContext, talk: type[Talk] = Talk, handshake_timeout: float = LIMIT
) -> Iterator[TlsServer]:
    """Serve in that way until the block ends; what the server counts can be asked for after that, too."""
    server = TlsServer(talk)
    with WAYS[way](server, context, handshake_timeout):
        yield server
