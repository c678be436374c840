"""create_server() and create_unix_server(): what is bound, by asyncio's own functions, and TLS on it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
import ssl as _ssl
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

from fastlisten._bind import bind
from fastlisten._core.accept import REUSE_ADDRESS
from fastlisten._options import AsyncioOptions, BindOptions, Checked, checked, declared, socket_options
from fastlisten._unix_path import OwnPath, permissions, refuse_taken
from fastlisten.aio._server import Factory, Server, checked_limits
from fastlisten.aio._tls import TlsSettings, TlsTransport
from fastlisten.aio._transport import Transport

if TYPE_CHECKING:
    from fastlisten._admission import Admission
    from fastlisten._proxy import Proxy

# asyncio's own functions, from before anybody puts ours in their place.
_bind_tcp = asyncio.BaseEventLoop.create_server
_bind_unix = asyncio.SelectorEventLoop.create_unix_server
_Proactor: Any = getattr(asyncio, "ProactorEventLoop", ())

# Whether asyncio's server unlinks its path, too.
_UNLINKS = sys.version_info >= (3, 13)


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


def _set_options(sockets: Iterable[socket.socket], options: Iterable[tuple[str, int, int, int]]) -> None:
    """Set the listeners' options; accepted connections inherit those that are for them."""
    for sock in sockets:
        tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
        for name, level, number, value in options:
            if tcp or level != socket.IPPROTO_TCP:
                sock.setsockopt(level, number, value)
            elif name != "no_delay":  # which nobody has to ask for
                raise ValueError(f"{name} is for TCP, not for {sock!r}")


def tls_server(
    loop: asyncio.AbstractEventLoop,
    context: _ssl.SSLContext | None,
    handshake_timeout: float | None,
    shutdown_timeout: float | None,
    threads: int = 0,
) -> TlsSettings:
    """How a server of this loop speaks TLS; None for asyncio's own timeouts."""
    return TlsSettings(
        loop,
        context,
        server_side=True,
        handshake_timeout=handshake_timeout,
        shutdown_timeout=shutdown_timeout,
        threads=threads,
    )


async def start_tls(
    loop: asyncio.AbstractEventLoop,
    transport: Transport,
    protocol: asyncio.BaseProtocol,
    sslcontext: _ssl.SSLContext,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
) -> TlsTransport:
    """loop.start_tls() on a transport of ours: returns the one that the protocol is to use from then on."""
    waiter: asyncio.Future[None] = loop.create_future()
    settings = TlsSettings(
        loop,
        sslcontext,
        server_side=server_side,
        server_hostname=server_hostname,
        handshake_timeout=ssl_handshake_timeout,
        shutdown_timeout=ssl_shutdown_timeout,
    )
    over_tls = TlsTransport(settings, protocol, waiter, made=True)
    over_tls.begin_on(transport)
    try:
        await waiter
    except BaseException:
        transport.close()
        raise
    return over_tls


def _tls_factory(settings: TlsSettings, factory: Factory) -> Factory:
    return lambda: TlsTransport(settings, factory())


async def _serve(
    sockets: list[socket.socket],
    factory: Factory,
    backlog: int,
    start_serving: bool,
    limits: Checked,
    *,
    ssl: _ssl.SSLContext | None,
    ssl_handshake_timeout: float | None,
    ssl_shutdown_timeout: float | None,
    options: Iterable[tuple[str, int, int, int]] = (),
    path: OwnPath | None = None,
) -> Server:
    """A Server on bound sockets, which it owns; on failure they are closed."""
    loop = asyncio.get_running_loop()
    if sys.modules.get("uvloop") is not None:
        from fastlisten.aio._uvloop_transports import teach

        teach(loop)
    settings: TlsSettings | None = None
    try:
        if ssl:  # as asyncio asks
            timeouts = ssl_handshake_timeout, ssl_shutdown_timeout
            settings = tls_server(loop, ssl, *timeouts, limits.handshake_threads)
            factory = _tls_factory(settings, factory)
        _set_options(sockets, options)
        server = Server(loop, sockets, factory, backlog, limits, path, settings)
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
    tls: dict[str, Any],
    dualstack_ipv6: bool,
    exclusive: bool,
    reuse_address: bool | None = None,
    reuse_port: bool = False,
) -> list[socket.socket]:
    """Sockets with options that have to be set before bind(), which asyncio does not know."""
    loop = asyncio.get_running_loop()
    if sock is not None:
        raise ValueError("dualstack_ipv6 and exclusive are set before bind(), which sock has behind it")
    if reuse_address is not None and bool(reuse_address) != REUSE_ADDRESS:
        raise ValueError("reuse_address is the system's own with dualstack_ipv6 and exclusive")
    with socket.socket() as unbound:  # for asyncio's checks
        await _bound(_bind_tcp, sock=unbound, backlog=backlog, **tls)
    if dualstack_ipv6:
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
            sockets.append(
                bind(
                    address,
                    backlog=backlog,
                    reuse_port=bool(reuse_port),
                    dualstack_ipv6=dualstack_ipv6,
                    exclusive=exclusive,
                )
            )
            sockets[-1].setblocking(False)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


# Of create_server()'s and create_unix_server()'s options, those that belong to one server and not to all.
_OF_ONE_SERVER = {"family", "flags", "sock", "start_serving", "mode", "cleanup_socket"}


def default_options(create: Callable[..., Any]) -> frozenset[str]:
    """The options of a function that may be defaults of a loop."""
    parameters = inspect.signature(create).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    return frozenset(named - _OF_ONE_SERVER - {name for name in named if name.startswith("ssl")})


def check_defaults(options: dict[str, Any]) -> None:
    """Check those of create_server()'s options that a value can be wrong for by itself.

    Raises TypeError and ValueError as create_server() does.
    """
    limits = {name: options[name] for name in declared(AsyncioOptions).keys() & options.keys()}
    checked_limits(**({"exhausted": "pause", "handshake_threads": 0} | limits))
    _socket_options(**{name: options[name] for name in declared(BindOptions).keys() & options.keys()})


def _socket_options(**options: Any) -> list[tuple[str, int, int, int]]:
    """Those of bind() that are for setsockopt(), checked."""
    return socket_options(checked(BindOptions, "create_server", **options))


def _tls(
    context: _ssl.SSLContext | None, handshake_timeout: float | None, shutdown_timeout: float | None
) -> dict[str, Any]:
    """The keywords by which asyncio's functions take what belongs to TLS."""
    return {
        "ssl": context,
        "ssl_handshake_timeout": handshake_timeout,
        "ssl_shutdown_timeout": shutdown_timeout,
    }


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None: asyncio tells None from nothing in some of its options."""
    return {name: value for name, value in options.items() if value is not None}


def _path_made(sock: socket.socket) -> OwnPath | None:
    """The path of a unix socket; None when it is on no path."""
    name = sock.getsockname()
    if name and name[0] not in (0, "\0"):
        with contextlib.suppress(FileNotFoundError):
            return OwnPath(name)
    return None


def _refuse(limits: Checked, **asked: bool) -> None:
    """ValueError for what asyncio's own server, on a proactor, does not have."""
    for name, option in declared(AsyncioOptions).items():
        asked[name] = vars(limits)[name] != option.check(name, option.default)
    for name, given in asked.items():
        if given:
            raise ValueError(f"{name} needs a selector event loop, and this is a proactor")


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
    handshake_threads: int = 0,
    first_bytes: float | None = None,
    proxy: Proxy | None = None,
    admission: Admission | None = None,
) -> Server:
    """loop.create_server() of the running loop, with its arguments; returns a Server, the caller's to close.

    dualstack_ipv6, exclusive, defer_accept, fast_open: as fastlisten.bind().  no_delay: TCP_NODELAY on the
    connections, which asyncio always sets.  max_connections, pending, busy, exhausted: as Listener.serve();
    `busy` is answered while the event loop is blocked, too, and `pending` clients may then wait.
    handshake_threads: in how many threads TLS's handshakes run, without the GIL; 0: on the event loop.
    first_bytes, proxy, admission: as Listener.serve(): until then there is no protocol for a client, whose
    address is a transport's get_extra_info("peername"), and whose ProxyHeader its get_extra_info("proxy").

    Raises what asyncio's own raises for the same mistakes, ValueError for options this system lacks.
    """
    limits = checked_limits(
        handshake_threads,
        max_connections=max_connections,
        pending=pending,
        busy=busy,
        exhausted=exhausted,
        first_bytes=first_bytes,
        proxy=proxy,
        admission=admission,
    )
    options = _socket_options(
        defer_accept=defer_accept, fast_open=fast_open, no_delay=no_delay, keep_alive=keep_alive
    )
    tls = _tls(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
    asked: dict[str, Any] = {"family": family, "flags": flags, "sock": sock, "backlog": backlog}
    asked |= _given(reuse_address=reuse_address, reuse_port=reuse_port)
    loop = asyncio.get_running_loop()
    if isinstance(loop, _Proactor):
        special = dict.fromkeys(_given(defer_accept=defer_accept, fast_open=fast_open), True)
        _refuse(limits, dualstack_ipv6=dualstack_ipv6, exclusive=exclusive, **special)
        own = await _bind_tcp(loop, protocol_factory, host, port, start_serving=start_serving, **asked, **tls)
        return cast(Server, own)
    if dualstack_ipv6 or exclusive:
        sockets = await _bind_specially(
            host, port, tls=tls, dualstack_ipv6=dualstack_ipv6, exclusive=exclusive, **asked
        )
    else:
        sockets = await _bound(_bind_tcp, host, port, **asked, **tls)
    return await _serve(sockets, protocol_factory, backlog, start_serving, limits, options=options, **tls)


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
    handshake_threads: int = 0,
    first_bytes: float | None = None,
    proxy: Proxy | None = None,
    admission: Admission | None = None,
) -> Server:
    """loop.create_unix_server() of the running loop, with its arguments; returns a Server.

    cleanup_socket: unlink the path on close, if it is still the socket that was made; asyncio's default,
    which is True since Python 3.13.  mode: permission bits of the path, as fastlisten.bind().
    The others, from max_connections on: as create_server().
    """
    limits = checked_limits(
        handshake_threads,
        max_connections=max_connections,
        pending=pending,
        busy=busy,
        exhausted=exhausted,
        first_bytes=first_bytes,
        proxy=proxy,
        admission=admission,
    )
    tls = _tls(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
    more = {"cleanup_socket": False} if _UNLINKS else {}  # what it unlinks, the Server does
    if sock is None and path is not None:
        path = os.fspath(path)
        refuse_taken(path)  # asyncio takes it over
    with permissions(mode):  # no other task runs inside: asyncio's function waits for nothing
        sockets = await _bound(_bind_unix, path, sock=sock, backlog=backlog, **more, **tls)
    made = _path_made(sockets[0]) if cleanup_socket and sock is None else None  # whose else it is, keeps it
    return await _serve(sockets, protocol_factory, backlog, start_serving, limits, path=made, **tls)
