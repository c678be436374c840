"""asyncio servers on fastlisten's accept loop and transports.

create_server(), create_unix_server(), start_server() and start_unix_server() have the arguments, the results
and the errors of asyncio's own; they serve on the event loop that runs, asyncio's selector loop or uvloop.
On Windows' proactor loop, which waits for operations and not for descriptors, they give asyncio's own server.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import ssl as _ssl
import sys
import time
import weakref
from asyncio import sslproto, trsock
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal, cast

from fastlisten import _accept
from fastlisten._listener import (
    Listener,
    ListenerStats,
    _option,
    _permissions,
    _whole,
    bind,
    check_free,
    claim,
    serve_options,
)
from fastlisten._loop import Loop
from fastlisten._transport import Hub, Transport

__all__ = [
    "Server",
    "Transport",
    "create_server",
    "create_unix_server",
    "start_server",
    "start_unix_server",
]

Factory = Callable[[], asyncio.BaseProtocol]
ClientConnected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]

_log = logging.getLogger("fastlisten")

# How many bytes a StreamReader keeps; asyncio's default.
LIMIT = 2**16

# asyncio's own functions, from before anybody puts ours in their place.
_bind_tcp = asyncio.BaseEventLoop.create_server
_bind_unix = asyncio.SelectorEventLoop.create_unix_server
_Proactor: Any = getattr(asyncio, "ProactorEventLoop", ())

# What asyncio's Server can do and since when; before 3.12.1 wait_closed() does not wait for connections.
_CLOSES_CLIENTS = sys.version_info >= (3, 13)
_WAITS_FOR_CLIENTS = sys.version_info >= (3, 12)
_UNLINKS = sys.version_info >= (3, 13)
# What cancelling serve_forever() does to the clients has changed in a bugfix release: cpython's gh-123720.
_CUTS_CLIENTS = "close_clients" in asyncio.Server.serve_forever.__code__.co_names
# Before 3.11.7 and 3.12.1 its streams leave the task of a callback alone: cpython's gh-110894.
_WATCHES_TASKS = sys.version_info >= (3, 12, 1) or (3, 11, 7) <= sys.version_info < (3, 12)


class Server(asyncio.AbstractServer):
    """A server as asyncio.Server is one, with stats(), pause() and resume(); the functions below make it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sockets: list[socket.socket],
        factory: Factory,
        backlog: int,
        limits: _Limits,
    ) -> None:
        self._loop = loop
        self._sockets: list[socket.socket] | None = sockets
        self._backlog = backlog
        self._limits = limits
        self._hub = Hub(loop, factory, limits.max_connections or 0, limits.shed and limits.busy is None)
        self._hub.when_idle(self._client_gone)
        self._ledgers = [_ledger_of(sock) for sock in sockets]
        self._unlink: tuple[str | bytes, int] | None = None
        self._gate: _Gate | None = None
        self._since = time.time()
        self._paused = False
        self._serving = False
        self._forever: asyncio.Future[None] | None = None
        self._waiters: list[asyncio.Future[None]] | None = []
        self._attached = 0

    def __repr__(self) -> str:
        return f"<{self.__class__.__name__} sockets={self.sockets!r}>"

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop it serves on."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether it takes clients."""
        return self._serving

    @property
    def sockets(self) -> tuple[trsock.TransportSocket, ...]:
        """The listening sockets, for a look at them; none after close()."""
        return tuple(trsock.TransportSocket(sock) for sock in self._sockets or ())

    def _start(self) -> None:
        if self._serving:
            return
        if self._sockets is None:
            raise RuntimeError(f"server {self!r} is closed")
        given = [sock for sock in self._sockets if isinstance(sock, Listener)]
        for listener in given:
            check_free(listener)
        self._serving = True
        for sock in self._sockets:
            sock.listen(self._backlog)
        if self._limits.busy is None:
            for sock, ledger in zip(self._sockets, self._ledgers, strict=True):
                self._hub.add_entrance(sock, ledger)
        else:
            self._gate = _Gate(self._sockets, self._limits)
            self._ledgers = [listener._ledger for listener in self._gate.listeners]
            self._hub.add_gate(self._gate.loop)
        for listener in given:
            listener._served = True
        self._hub.serve()

    async def start_serving(self) -> None:
        """Take clients from now on; nothing happens when it does already."""
        self._start()
        await asyncio.sleep(0)

    async def serve_forever(self) -> None:
        """Serve until cancelled or closed; cancelling closes the server, and since 3.14 its clients."""
        if self._forever is not None:
            raise RuntimeError(f"server {self!r} is already being awaited on serve_forever()")
        if self._sockets is None:
            raise RuntimeError(f"server {self!r} is closed")
        self._start()
        self._forever = self._loop.create_future()
        try:
            await self._forever
        except asyncio.CancelledError:
            try:
                self.close()
                if _CUTS_CLIENTS:
                    self.close_clients()
                await self.wait_closed()
            finally:
                raise
        finally:
            self._forever = None

    def close(self) -> None:
        """Take no more clients and close the listening sockets; open connections go on."""
        sockets = self._sockets
        if sockets is None:
            return
        self._sockets = None
        self._hub.stop()
        if self._gate is not None:
            self._gate.close()
        for sock in sockets:
            sock.close()
        if self._unlink is not None:
            _remove_socket(*self._unlink)
        self._serving = False
        if self._forever is not None and not self._forever.done():
            self._forever.cancel()
            self._forever = None
        self._client_gone()

    def _client_gone(self) -> None:
        if self._sockets is None and self._hub.active == 0 and not self._attached:
            self._wake_up()

    # asyncio's own transports tell their server so that they are there; one may be given ours.

    def _attach(self, *transport: object) -> None:
        self._attached += 1

    def _detach(self, *transport: object) -> None:
        self._attached -= 1
        self._client_gone()

    def _wake_up(self) -> None:
        waiters, self._waiters = self._waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    async def wait_closed(self) -> None:
        """Wait until the server is closed and its connections are gone; before Python 3.12, as asyncio's
        own, for nothing once it is closed."""
        if self._waiters is None or (self._sockets is None and not _WAITS_FOR_CLIENTS):
            return
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        await waiter

    if _CLOSES_CLIENTS:

        def close_clients(self) -> None:
            """Close all connections, each when what was written to it is sent."""
            for transport in self._hub.clients():
                transport.close()

        def abort_clients(self) -> None:
            """Close all connections at once."""
            for transport in self._hub.clients():
                transport.abort()

    def pause(self) -> None:
        """Accept nobody until resume(); clients wait in the kernel's queue, connections go on."""
        self._hold(True)

    def resume(self) -> None:
        """Accept again after pause()."""
        self._hold(False)

    def _hold(self, paused: bool) -> None:
        self._paused = paused
        for ledger in self._ledgers:
            ledger.paused = paused
        self._hub.hold(paused)

    def stats(self) -> ListenerStats:
        """The counters of all its listening sockets together; `handled` counts connections that have ended,
        `handler_errors` what factories and protocols raised."""
        accepted = handled = active = handler_errors = refused = 0
        accept_errors: Counter[str] = Counter()
        for ledger in self._ledgers:
            counts = ledger.counts()
            accepted += counts[0]
            handled += counts[1]
            active += counts[2]
            handler_errors += counts[3]
            refused += counts[4]
            accept_errors.update(counts[5])
        queues = [_accept.queue(sock.fileno()) for sock in self._sockets or ()]
        depths = [depth for depth, _ in queues if depth is not None]
        limits = [limit for _, limit in queues if limit is not None]
        return ListenerStats(
            accepted=accepted,
            handled=handled,
            active=active,
            handler_errors=handler_errors,
            accept_errors=dict(accept_errors),
            refused=refused,
            paused=self._paused,
            threads=0,
            idle_threads=0,
            queue_depth=sum(depths) if depths else None,
            queue_limit=sum(limits) if limits else None,
            since=self._since,
        )


class _Limits:
    """What a server may take on, checked before any socket opens."""

    def __init__(
        self, max_connections: int | None, pending: int | None, busy: str | bytes | None, exhausted: str
    ) -> None:
        if exhausted not in ("pause", "shed"):
            raise ValueError(f"exhausted must be 'pause' or 'shed', not {exhausted!r}")
        self.options = serve_options(
            print,
            max_connections=max_connections,
            pending=pending,
            busy=busy,
            exhausted=cast(Any, exhausted),
        )
        self.max_connections = self.options.max_connections
        self.busy = self.options.busy
        self.shed = exhausted == "shed"


class _Gate:
    """The core's loop with an usher, which answers who finds no place while the event loop is busy."""

    def __init__(self, sockets: list[socket.socket], limits: _Limits) -> None:
        self._copies: list[Listener] = []
        try:
            self.listeners = [self._listener(sock) for sock in sockets]
            self.loop = Loop(self.listeners, None, limits.options)
        except BaseException:
            self._close_copies()
            raise
        try:
            claim(self.loop)
            self.loop.start()
        except BaseException:
            self.close()
            raise

    def _listener(self, sock: socket.socket) -> Listener:
        if isinstance(sock, Listener):
            return sock
        copy = Listener(fileno=sock.dup().detach())
        self._copies.append(copy)
        return copy

    def close(self) -> None:
        """End the usher; who still waits is closed."""
        self.loop.finish()
        self.loop.let_go()
        self._close_copies()

    def _close_copies(self) -> None:
        for listener in self._copies:
            listener.close()


def _ledger_of(sock: socket.socket) -> _accept.Ledger:
    if isinstance(sock, Listener):
        return sock._ledger
    return _accept.Ledger(int(sock.family), int(sock.type), sock.proto)


def _remove_socket(path: str | bytes, inode: int) -> None:
    try:
        if os.stat(path).st_ino == inode:
            os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.error("the unix socket %r stays: %s", path, error)


# --- binding --------------------------------------------------------------------------------------


class _Binder(asyncio.BaseEventLoop):
    """Runs asyncio's create_server() for its checks, its resolving and its binding, and serves nothing.

    So the errors are those of the Python that runs, on uvloop too.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._debug = loop.get_debug()
        self._running = loop
        self.sockets: list[socket.socket] = []
        self._unix_server_sockets: dict[socket.socket, int] = {}  # asyncio's unix servers keep it since 3.13

    async def getaddrinfo(self, *args: Any, **options: Any) -> Any:
        return await self._running.getaddrinfo(*args, **options)

    def _stop_serving(self, sock: socket.socket) -> None:
        self.sockets.append(sock)  # asyncio's Server gives them up here


async def _bound(how: Any, *args: Any, **options: Any) -> list[socket.socket]:
    """The sockets that asyncio's function `how` binds, not yet listening."""
    binder = _Binder(asyncio.get_running_loop())
    try:
        server = await how(binder, None, *args, start_serving=False, **options)
        server.close()
        return binder.sockets
    finally:
        binder.close()


def _tcp_options(
    *, defer_accept: int | None, fast_open: int | None, no_delay: bool, keep_alive: bool | None
) -> list[tuple[str, int, int, int]]:
    """Socket options of a listener by name; accepted connections inherit no_delay and keep_alive."""
    options = []
    for name, constant, value in (
        ("defer_accept", "TCP_DEFER_ACCEPT", defer_accept),
        ("fast_open", "TCP_FASTOPEN", fast_open),
    ):
        if value is not None:
            options.append((name, socket.IPPROTO_TCP, _option(name, constant), _whole(name, value, 0)))
    if no_delay:
        options.append(("", socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))
    if keep_alive:
        options.append(("", socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
    return options


def _set_options(sockets: Iterable[socket.socket], options: list[tuple[str, int, int, int]]) -> None:
    for sock in sockets:
        tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
        for name, level, number, value in options:
            if tcp or level != socket.IPPROTO_TCP:
                sock.setsockopt(level, number, value)
            elif name:
                raise ValueError(f"{name} is for TCP, not for {sock!r}")


def _over_tls(
    loop: asyncio.AbstractEventLoop,
    factory: Factory,
    context: _ssl.SSLContext,
    handshake_timeout: float | None,
    shutdown_timeout: float | None,
) -> asyncio.BaseProtocol:
    """A protocol that speaks TLS with the client and has the factory's protocol behind it."""
    return sslproto.SSLProtocol(
        cast(asyncio.BaseEventLoop, loop),
        factory(),
        context,
        cast(Any, None),  # nobody waits for the handshake
        server_side=True,
        ssl_handshake_timeout=cast(Any, handshake_timeout),
        ssl_shutdown_timeout=cast(Any, shutdown_timeout),
    )


async def _serve(
    sockets: list[socket.socket],
    factory: Factory,
    *,
    backlog: int,
    ssl: _ssl.SSLContext | None,
    ssl_handshake_timeout: float | None,
    ssl_shutdown_timeout: float | None,
    start_serving: bool,
    limits: _Limits,
    options: list[tuple[str, int, int, int]],
    unlink: tuple[str | bytes, int] | None = None,
) -> Server:
    """A Server on bound sockets, which it owns; on failure they are closed."""
    loop = asyncio.get_running_loop()
    if ssl:  # as asyncio asks
        factory = functools.partial(
            _over_tls, loop, factory, ssl, ssl_handshake_timeout, ssl_shutdown_timeout
        )
    try:
        _set_options(sockets, options)
        server = Server(loop, sockets, factory, backlog, limits)
        server._unlink = unlink
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    if start_serving:
        try:
            server._start()
        except BaseException:
            server.close()
            raise
        await asyncio.sleep(0)
    return server


async def _bind_specially(
    host: Any,
    port: Any,
    *,
    family: int,
    flags: int,
    sock: socket.socket | None,
    backlog: int,
    reuse_address: bool | None,
    tls: dict[str, Any],
    **options: Any,
) -> list[socket.socket]:
    """Sockets with options that have to be set before bind(), which asyncio does not know."""
    loop = asyncio.get_running_loop()
    if sock is not None:
        raise ValueError("dualstack_ipv6 and exclusive are set before bind(), which sock has behind it")
    if reuse_address is not None and bool(reuse_address) != (os.name == "posix"):
        raise ValueError("reuse_address is the system's own with dualstack_ipv6 and exclusive")
    with socket.socket() as unbound:  # for asyncio's checks
        await _bound(_bind_tcp, sock=unbound, backlog=backlog, **tls)
    if options["dualstack_ipv6"]:
        host, family = host or "::", socket.AF_INET6
    hosts = [host] if host is None or isinstance(host, str) else list(host)
    addresses: dict[Any, None] = {}
    for name in hosts:
        for answer in await loop.getaddrinfo(
            name or None, port, family=family, type=socket.SOCK_STREAM, flags=flags
        ):
            addresses[answer[4]] = None
    sockets: list[socket.socket] = []
    try:
        for address in addresses:
            sockets.append(bind(address, backlog=backlog, **options))
            sockets[-1].setblocking(False)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


async def create_server(
    protocol_factory: Factory,
    host: Any = None,
    port: Any = None,
    *,
    family: int = socket.AF_UNSPEC,
    flags: int = socket.AI_PASSIVE,
    sock: socket.socket | None = None,
    backlog: int = 100,
    ssl: _ssl.SSLContext | None = None,
    reuse_address: bool | None = None,
    reuse_port: bool | None = None,
    keep_alive: bool | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    start_serving: bool = True,
    dualstack_ipv6: bool = False,
    exclusive: bool = False,
    defer_accept: int | None = None,
    fast_open: int | None = None,
    no_delay: bool = True,
    max_connections: int | None = None,
    pending: int | None = None,
    busy: str | bytes | None = None,
    exhausted: Literal["pause", "shed"] = "pause",
) -> Server:
    """loop.create_server() of the running loop, with its arguments; returns a Server, the caller's to close.

    dualstack_ipv6, exclusive, defer_accept, fast_open: as fastlisten.bind().  no_delay: TCP_NODELAY on the
    connections, which asyncio always sets.
    max_connections, pending, busy, exhausted: as Listener.serve(); `busy` is answered while the event loop is
    blocked, too, and `pending` clients may then wait.  A connection that speaks TLS counts from its
    handshake on.

    Raises what asyncio's own raises for the same mistakes, ValueError for options this system lacks.
    """
    limits = _Limits(max_connections, pending, busy, exhausted)
    options = _tcp_options(
        defer_accept=defer_accept, fast_open=fast_open, no_delay=no_delay, keep_alive=keep_alive
    )
    tls: dict[str, Any] = {
        "ssl": ssl,
        "ssl_handshake_timeout": ssl_handshake_timeout,
        "ssl_shutdown_timeout": ssl_shutdown_timeout,
    }
    asked: dict[str, Any] = {"family": family, "flags": flags, "sock": sock, "backlog": backlog}
    if reuse_address is not None:
        asked["reuse_address"] = reuse_address
    if reuse_port is not None:
        asked["reuse_port"] = reuse_port
    loop = asyncio.get_running_loop()
    if isinstance(loop, _Proactor):
        _refuse(
            dualstack_ipv6=dualstack_ipv6,
            exclusive=exclusive,
            defer_accept=defer_accept is not None,
            fast_open=fast_open is not None,
            max_connections=max_connections is not None,
            busy=busy is not None,
            exhausted=exhausted != "pause",
        )
        own = await _bind_tcp(loop, protocol_factory, host, port, start_serving=start_serving, **asked, **tls)
        return cast(Server, own)
    if dualstack_ipv6 or exclusive:
        sockets = await _bind_specially(
            host,
            port,
            family=family,
            flags=flags,
            sock=sock,
            backlog=backlog,
            reuse_address=reuse_address,
            tls=tls,
            dualstack_ipv6=dualstack_ipv6,
            exclusive=exclusive,
            reuse_port=bool(reuse_port),
        )
    else:
        sockets = await _bound(_bind_tcp, host, port, **asked, **tls)
    return await _serve(
        sockets,
        protocol_factory,
        backlog=backlog,
        start_serving=start_serving,
        limits=limits,
        options=options,
        **tls,
    )


async def create_unix_server(
    protocol_factory: Factory,
    path: str | bytes | os.PathLike[str] | None = None,
    *,
    sock: socket.socket | None = None,
    backlog: int = 100,
    ssl: _ssl.SSLContext | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    start_serving: bool = True,
    cleanup_socket: bool = _UNLINKS,
    mode: int | None = None,
    max_connections: int | None = None,
    pending: int | None = None,
    busy: str | bytes | None = None,
    exhausted: Literal["pause", "shed"] = "pause",
) -> Server:
    """loop.create_unix_server() of the running loop, with its arguments; returns a Server.

    cleanup_socket: unlink the path on close, if it is still the socket that was made; asyncio's default,
    which is True since Python 3.13.  mode: permission bits of the path, as fastlisten.bind().
    max_connections, pending, busy, exhausted: as create_server().
    """
    limits = _Limits(max_connections, pending, busy, exhausted)
    tls: dict[str, Any] = {
        "ssl": ssl,
        "ssl_handshake_timeout": ssl_handshake_timeout,
        "ssl_shutdown_timeout": ssl_shutdown_timeout,
    }
    more = {"cleanup_socket": False} if _UNLINKS else {}  # what it unlinks, the Server does
    with _permissions(mode):  # no other task runs inside: asyncio's function waits for nothing
        sockets = await _bound(_bind_unix, path, sock=sock, backlog=backlog, **more, **tls)
    unlink = None
    if cleanup_socket:
        name = sockets[0].getsockname()
        if name and name[0] not in (0, "\0"):
            with contextlib.suppress(FileNotFoundError):
                unlink = name, os.stat(name).st_ino
    return await _serve(
        sockets,
        protocol_factory,
        backlog=backlog,
        start_serving=start_serving,
        limits=limits,
        options=[],
        unlink=unlink,
        **tls,
    )


def _refuse(**asked: bool) -> None:
    for name, given in asked.items():
        if given:
            raise ValueError(f"{name} needs a selector event loop, and this is a proactor")


# --- streams --------------------------------------------------------------------------------------


def _stream_protocol(client_connected_cb: ClientConnected, limit: int) -> Factory:
    loop = asyncio.get_running_loop()
    if not _WATCHES_TASKS:
        client_connected_cb = functools.partial(_watched, client_connected_cb)
    if not isinstance(loop, asyncio.BaseEventLoop):
        client_connected_cb = functools.partial(_with_start_tls, client_connected_cb)

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, client_connected_cb, loop=loop)

    return factory


def _watched(
    callback: ClientConnected, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Awaitable[None] | None:
    """Call it, and have a coroutine that raises reported and its connection closed."""
    answer = callback(reader, writer)
    return _guarded(answer, writer) if asyncio.iscoroutine(answer) else answer


async def _guarded(coroutine: Awaitable[None], writer: asyncio.StreamWriter) -> None:
    try:
        await coroutine
    except Exception as error:
        asyncio.get_running_loop().call_exception_handler(
            {
                "message": "Unhandled exception in client_connected_cb",
                "exception": error,
                "transport": writer.transport,
            }
        )
        writer.transport.close()


class _StartsTls:
    """The event loop, as StreamWriter.start_tls() asks for it: with asyncio's start_tls().

    uvloop's own takes uvloop's transports only.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.start_tls = functools.partial(asyncio.BaseEventLoop.start_tls, cast(Any, loop))


def _with_start_tls(
    callback: ClientConnected, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Awaitable[None] | None:
    """Call it with a writer that can start TLS on our transport."""
    writer.start_tls = functools.partial(_start_tls, weakref.ref(writer))  # type: ignore[method-assign]
    return callback(reader, writer)


async def _start_tls(weak: Callable[[], Any], context: _ssl.SSLContext, **options: Any) -> None:
    writer = weak()
    loop, writer._loop = writer._loop, _StartsTls(writer._loop)
    try:
        await asyncio.StreamWriter.start_tls(writer, context, **options)
    finally:
        writer._loop = loop


async def start_server(
    client_connected_cb: ClientConnected,
    host: Any = None,
    port: Any = None,
    *,
    limit: int = LIMIT,
    **kwds: Any,
) -> Server:
    """asyncio.start_server(): call `client_connected_cb(reader, writer)` for each client.

    client_connected_cb: a plain function or a coroutine function, which becomes a task.  limit: how many
    bytes a reader keeps.  The other arguments are create_server()'s.
    """
    return await create_server(_stream_protocol(client_connected_cb, limit), host, port, **kwds)


async def start_unix_server(
    client_connected_cb: ClientConnected,
    path: str | bytes | os.PathLike[str] | None = None,
    *,
    limit: int = LIMIT,
    **kwds: Any,
) -> Server:
    """asyncio.start_unix_server(): start_server() on a unix path, with create_unix_server()'s arguments."""
    return await create_unix_server(_stream_protocol(client_connected_cb, limit), path, **kwds)
