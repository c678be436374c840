"""Event loops whose servers and accepted connections are ours: a mixin, and EventLoop."""

from __future__ import annotations

import asyncio
import socket
import ssl as _ssl
from typing import Any, ClassVar

from fastlisten._core.state import State
from fastlisten.aio import _create
from fastlisten.aio._hub import Hub
from fastlisten.aio._server import Factory, Server
from fastlisten.aio._tls import TlsTransport
from fastlisten.aio._transport import Connections, Transport, adopt, hubs_of

# asyncio's own, from before anybody puts ours in its place.
SelectorEventLoop = asyncio.SelectorEventLoop

# Those of create_server()'s options that create_unix_server() has, too.
_UNIX_OPTIONS = _create.default_options(_create.create_unix_server)


class Serving:
    """A mixin, first of the bases: the servers and accepted connections of a selector event loop are ours."""

    server_options: ClassVar[dict[str, Any]] = {}  # what create_server() is given unless its caller says it

    _adopted: tuple[Connections, State] | None = None  # those that connect_accepted_socket() was given

    async def create_server(
        self, protocol_factory: Factory, host: Any = None, port: Any = None, **options: Any
    ) -> Server:
        """fastlisten.aio.create_server(), with this loop's options as defaults."""
        return await _create.create_server(protocol_factory, host, port, **(self.server_options | options))

    async def create_unix_server(self, protocol_factory: Factory, path: Any = None, **options: Any) -> Server:
        """fastlisten.aio.create_unix_server(), with those of this loop's options as defaults that it has."""
        defaults = {name: self.server_options[name] for name in _UNIX_OPTIONS & self.server_options.keys()}
        return await _create.create_unix_server(protocol_factory, path, **(defaults | options))

    async def connect_accepted_socket(
        self,
        protocol_factory: Factory,
        sock: socket.socket,
        *,
        ssl: _ssl.SSLContext | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """As asyncio's: a transport and a protocol for a client that was accepted elsewhere.

        sock: the client's stream socket, the transport's from now on.
        Raises ValueError and TypeError where asyncio's own does, and what ends a TLS handshake.
        """
        loop = asyncio.get_running_loop()
        timeouts = {
            "ssl_handshake_timeout": ssl_handshake_timeout,
            "ssl_shutdown_timeout": ssl_shutdown_timeout,
        }
        without_tls = not ssl and any(timeout is not None for timeout in timeouts.values())
        if sock.type != socket.SOCK_STREAM or isinstance(sock, _ssl.SSLSocket) or without_tls:
            refuse: Any = SelectorEventLoop.connect_accepted_socket  # in asyncio's words
            await refuse(self, protocol_factory, sock, ssl=ssl, **timeouts)
        sock.setblocking(False)
        waiter: asyncio.Future[None] = loop.create_future()
        if self._adopted is None:
            self._adopted = Connections(Hub(loop), None), State(sock)
        protocol = protocol_factory()
        over_tls: TlsTransport | None = None
        if ssl:
            context = None if isinstance(ssl, bool) else ssl
            settings = _create.tls_server(loop, context, ssl_handshake_timeout, ssl_shutdown_timeout)
            over_tls = TlsTransport(settings, protocol, waiter)
        transport = adopt(*self._adopted, sock, over_tls or protocol)
        if over_tls is None:
            loop.call_soon(_done, waiter)
        try:
            await waiter
        except BaseException:
            transport.close()
            raise
        return over_tls or transport, protocol

    async def start_tls(self, transport: Any, protocol: Any, sslcontext: Any, **options: Any) -> Any:
        """As asyncio's; over a transport of ours it is our own TLS."""
        if type(transport) is Transport and isinstance(sslcontext, _ssl.SSLContext):
            return await _create.start_tls(
                asyncio.get_running_loop(), transport, protocol, sslcontext, **options
            )
        return await super().start_tls(transport, protocol, sslcontext, **options)  # type: ignore[misc]

    def set_debug(self, enabled: bool) -> None:
        """As asyncio's; a connection that holds up the loop is then told of by its own name."""
        super().set_debug(enabled)  # type: ignore[misc]
        for hub in hubs_of(self):
            hub.timed = enabled

    def close(self) -> None:
        """As asyncio's."""
        super().close()  # type: ignore[misc]
        self._adopted = None


def _done(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class EventLoop(Serving, SelectorEventLoop):  # type: ignore[misc]
    """asyncio.SelectorEventLoop with fastlisten's servers."""
