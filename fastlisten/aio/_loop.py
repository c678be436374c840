"""Event loops whose servers and accepted connections are ours: EventLoop, loop_factory(), run()."""

from __future__ import annotations

import asyncio
import inspect
import socket
import ssl as _ssl
import sys
from asyncio import futures
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, TypeVar

from fastlisten._core.state import State
from fastlisten.aio import _create
from fastlisten.aio._hub import Hub
from fastlisten.aio._server import Factory, Server
from fastlisten.aio._transport import Connections, adopt, hubs_of

_T = TypeVar("_T")

# asyncio's own, from before anybody puts ours in its place.
_SelectorEventLoop = asyncio.SelectorEventLoop

# Of create_server()'s and create_unix_server()'s options, those that belong to one server and not to all.
_OF_ONE_SERVER = {"family", "flags", "sock", "start_serving", "mode", "cleanup_socket"}


def _options_of(create: Callable[..., Any]) -> frozenset[str]:
    """The options of a function that may be defaults of a loop."""
    parameters = inspect.signature(create).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    return frozenset(named - _OF_ONE_SERVER - {name for name in named if name.startswith("ssl")})


_TCP_OPTIONS = _options_of(_create.create_server)
_UNIX_OPTIONS = _options_of(_create.create_unix_server)


class Serving:
    """What makes a selector event loop's servers and accepted connections ours; a mixin, first of the bases."""

    server_options: ClassVar[dict[str, Any]] = {}  # what create_server() is given unless its caller says it

    _adopted: Connections | None = None  # those that connect_accepted_socket() was given

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
        if sock.type != socket.SOCK_STREAM:
            raise ValueError(f"a stream socket is needed, not {sock!r}")
        if isinstance(sock, _ssl.SSLSocket):
            raise TypeError("a socket that speaks TLS already cannot be taken")
        if not ssl and not (ssl_handshake_timeout is None and ssl_shutdown_timeout is None):
            raise ValueError("ssl_handshake_timeout and ssl_shutdown_timeout are for TLS, and ssl is not given")
        sock.setblocking(False)
        waiter: asyncio.Future[None] = loop.create_future()
        if self._adopted is None:
            self._adopted = Connections(Hub(loop), protocol_factory)
        over_tls = None
        if ssl:
            context = None if isinstance(ssl, bool) else ssl
            over_tls = _create.over_tls(
                loop, protocol_factory, context, ssl_handshake_timeout, ssl_shutdown_timeout, waiter
            )
        protocol = over_tls or protocol_factory()
        transport = adopt(self._adopted, State(sock), sock, protocol)
        if over_tls is None:
            loop.call_soon(futures._set_result_unless_cancelled, waiter, None)
        try:
            await waiter
        except BaseException:
            transport.close()
            raise
        if over_tls is None:
            return transport, protocol
        return over_tls._app_transport, over_tls._app_protocol

    def set_debug(self, enabled: bool) -> None:
        """As asyncio's; a connection that holds up the loop is then told of by its own name."""
        super().set_debug(enabled)
        for hub in hubs_of(self):
            hub.timed = enabled

    def close(self) -> None:
        """As asyncio's."""
        super().close()
        self._adopted = None


class EventLoop(Serving, _SelectorEventLoop):
    """asyncio.SelectorEventLoop with fastlisten's servers."""


def new_event_loop() -> EventLoop:
    """An EventLoop; the caller closes it."""
    return EventLoop()


def loop_factory(base: Callable[[], asyncio.AbstractEventLoop] | None = None, **options: Any) -> type[Serving]:
    """A class of event loops whose servers are ours, for asyncio.Runner(loop_factory=...) and its like.

    base: the class of event loops to build on, EventLoop by default: asyncio.SelectorEventLoop, uvloop.Loop,
    or one derived from them.  options: those of create_server(), which it has as defaults.
    Raises TypeError for an option that create_server() does not have and for a base that is no class of
    selector loops, ValueError for a bad value.
    """
    unknown = options.keys() - _TCP_OPTIONS
    if unknown:
        names = ", ".join(sorted(_TCP_OPTIONS))
        raise TypeError(f"no option of a loop: {', '.join(sorted(unknown))}; there are: {names}")
    _create.check_defaults(options)
    kind = EventLoop if base is None else serving(base)
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "server_options": options})


def serving(base: Any) -> type[Serving]:
    """A class of event loops like `base` whose servers are ours.

    Raises TypeError when that is no class of asyncio's or uvloop's selector loops.
    """
    if isinstance(base, type):
        if issubclass(base, Serving):
            return base
        if issubclass(base, _SelectorEventLoop):
            return type(base.__name__, (Serving, base), {"__module__": base.__module__})
        uvloop = sys.modules.get("uvloop.loop")
        if uvloop is not None and issubclass(base, uvloop.Loop):
            from fastlisten.aio._uvloop import ServingUvloop

            return type(base.__name__, (ServingUvloop, base), {"__module__": base.__module__})
    raise TypeError(f"{base!r} is no class of selector event loops, asyncio's or uvloop's")


def run(
    main: Coroutine[Any, Any, _T],
    *,
    debug: bool | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> _T:
    """asyncio.run() on an EventLoop, or on what `loop_factory` makes; returns what `main` does."""
    with asyncio.Runner(debug=debug, loop_factory=loop_factory or new_event_loop) as runner:
        return runner.run(main)
