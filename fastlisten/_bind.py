"""bind() and create_server(): from an endpoint to a Listener."""

from __future__ import annotations

import socket
from contextlib import nullcontext, suppress
from typing import Any, TypeVar

from fastlisten._core import standard
from fastlisten._core.accept import REUSE_ADDRESS
from fastlisten._endpoint import INETD, SYSTEMD, Endpoint, endpoint_of, resolve
from fastlisten._listener import Listener
from fastlisten._options import BindOptions, Checked, checked, socket_options
from fastlisten._unix_path import OwnPath, permissions, replacing

PASSED = (SYSTEMD, INETD)  # endpoints of sockets that another program has opened

Address = Endpoint | str | bytes | tuple[Any, ...]

# What socket.listen() takes when it is not told: enough for a burst, little enough to notice overload.
DEFAULT_BACKLOG = min(socket.SOMAXCONN, 128)

SomeListener = TypeVar("SomeListener", bound=Listener)


def bind(
    endpoint: Address,
    *,
    backlog: int | None = None,
    reuse_port: bool = False,
    dualstack_ipv6: bool = False,
    exclusive: bool = False,
    defer_accept: int | None = None,
    fast_open: int | None = None,
    no_delay: bool = False,
    keep_alive: bool = False,
    mode: int | None = None,
    replace_stale: bool = False,
) -> Listener:
    """Bind to an endpoint and listen; returns the Listener, the caller's to close.

    endpoint: an Endpoint, text that parses to one, or an address as socket.bind() takes it.  "fd:N" adopts
    a listener that was inherited; "systemd:" and "systemd:NAME" take the one that systemd has passed, and
    "inetd:" takes inetd's from the standard streams, which lead nowhere then.
    backlog: how many clients may wait in the kernel's queue; listen(2).
    reuse_port: share the port with other listeners that ask for the same (SO_REUSEPORT).
    dualstack_ipv6: have an IPv6 listener take IPv4 clients too.
    exclusive: let nobody else bind the port (SO_EXCLUSIVEADDRUSE, Windows).
    defer_accept: accept a client when its first bytes are there, or after so many seconds; tcp(7).
    fast_open: how many TCP Fast Open requests may be pending; RFC 7413.
    no_delay, keep_alive: TCP_NODELAY and SO_KEEPALIVE on the accepted connections.
    mode: permission bits of a unix path, in force from the moment it exists.
    replace_stale: take over a unix path whose socket nobody listens on any more, as a server leaves it that
    was killed; anything else there is EADDRINUSE still.

    Raises ValueError for text that is no endpoint, for an option that this system or this kind of endpoint
    lacks, and where systemd has passed several sockets of that name; TypeError and OverflowError for an
    argument of another type or size, AttributeError for a unix path where Python has no AF_UNIX, all before a
    socket opens; OSError as socket.bind() does (socket.gaierror for a host without an address), for systemd
    and inetd as inherited() does, and FileNotFoundError where systemd has passed no socket of that name.

    >>> import fastlisten
    >>> with fastlisten.bind("127.0.0.1:0", backlog=100, keep_alive=True) as listener:
    ...     listener.endpoint.host
    '127.0.0.1'
    """
    options = checked(
        BindOptions,
        "bind",
        backlog=backlog,
        reuse_port=reuse_port,
        dualstack_ipv6=dualstack_ipv6,
        exclusive=exclusive,
        defer_accept=defer_accept,
        fast_open=fast_open,
        no_delay=no_delay,
        keep_alive=keep_alive,
        mode=mode,
        replace_stale=replace_stale,
    )
    return bind_checked(endpoint_of(endpoint), options)


def passed_connection(where: Endpoint) -> socket.socket | None:
    """The client's connection that was passed where a listening socket might have been, the caller's to
    close; None if there is none.  Raises as bind()."""
    if not where.host.startswith(PASSED):
        return None
    from fastlisten._inherited import connection_at

    return connection_at(where)


def status_options(where: Endpoint) -> Checked:
    """The options of bind() for a status port: the path that a killed service left does not keep it down."""
    return checked(BindOptions, "bind", replace_stale=_path_of(where) is not None)


def bind_status(where: Endpoint) -> Listener:
    """A status port's listener.  Raises as bind()."""
    return bind_checked(where, status_options(where))


def _path_of(where: Endpoint) -> str | None:
    """That of a unix socket with a path."""
    return where.host[5:] if where.host.startswith("unix:") and where.host[5:6] != "@" else None


def bind_checked(where: Endpoint, options: Checked) -> Listener:
    """bind() with options that were checked, one by one."""
    unix, path = where.host.startswith("unix:"), _path_of(where)
    settings = socket_options(options, not_tcp=where if unix else None)
    if options.reuse_port and where.port == 0 and not unix:
        raise ValueError("reuse_port with port 0 could share a stranger's port")
    if path is None and (options.mode is not None or options.replace_stale):
        name = "replace_stale" if options.mode is None else "mode"
        raise ValueError(f"{name} is for unix paths, not for {where}")
    if where.host.startswith("fd:"):
        if options.reuse_port or options.exclusive or options.dualstack_ipv6:
            raise ValueError(f"{where} is bound already")
        return _inherit(int(where.host[3:]), settings, options.backlog)
    if where.host.startswith(PASSED):
        from fastlisten._inherited import bind_inherited  # for who was started by another program

        return bind_inherited(where, settings, options)
    if not unix:
        where = _resolved(where, options.dualstack_ipv6)

    listener = Listener(where.family, socket.SOCK_STREAM)
    try:
        if REUSE_ADDRESS and not options.exclusive:
            with suppress(OSError):  # as socket.create_server() does
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for _, level, number, value in settings:
            listener.setsockopt(level, number, value)
        if where.family == socket.AF_INET6 and hasattr(socket, "IPV6_V6ONLY"):
            only = 0 if options.dualstack_ipv6 else 1
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        address: Any = where.sockaddr
        with replacing(path) if path is not None and options.replace_stale else nullcontext():
            with permissions(options.mode):
                listener.bind(address)
            if path is not None:
                listener._path = OwnPath(path)
            listener.listen(DEFAULT_BACKLOG if options.backlog is None else options.backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _resolved(where: Endpoint, dualstack_ipv6: bool) -> Endpoint:
    """The first address of an endpoint; all addresses, and a name's, are of both families, and IPv6 can take
    both."""
    both = dualstack_ipv6 and (not where.host or where.family == socket.AF_UNSPEC)
    where = resolve(where, socket.AF_INET6 if both else socket.AF_UNSPEC)[0]
    if dualstack_ipv6:
        if not socket.has_dualstack_ipv6():
            raise ValueError("dualstack_ipv6 not supported on this platform")
        if where.family != socket.AF_INET6:
            raise ValueError("dualstack_ipv6 requires AF_INET6 family")
    return where


def create_server(
    address: tuple[Any, ...] | str | bytes,
    *,
    family: int = socket.AF_INET,
    backlog: int | None = None,
    reuse_port: bool = False,
    dualstack_ipv6: bool = False,
) -> Listener:
    """socket.create_server(), with its arguments, its checks and its errors; returns a Listener.

    >>> import fastlisten, socket
    >>> with fastlisten.create_server(("127.0.0.1", 0)) as listener:
    ...     isinstance(listener, socket.socket)
    True
    """
    sock = standard.create_server(
        address,
        family=family,
        backlog=backlog,
        reuse_port=reuse_port,
        dualstack_ipv6=dualstack_ipv6,
    )
    return adopt(sock, Listener)


def adopt(sock: socket.socket, kind: type[SomeListener]) -> SomeListener:
    """A Listener, of this class, in place of a socket; closes the socket when that fails."""
    with sock:
        timeout = sock.gettimeout()
        listener = kind(sock.family, sock.type, sock.proto, fileno=sock.fileno())
        sock.detach()
    if listener.gettimeout() != timeout:
        listener.settimeout(timeout)
    return listener


def _inherit(fd: int, settings: list[tuple[str, int, int, int]], backlog: int | None) -> Listener:
    """A Listener on a descriptor of the caller's, which is set to listen if it does not yet."""
    listener = Listener(fileno=fd)
    try:
        if listener.type != socket.SOCK_STREAM:
            raise ValueError(f"fd:{fd} is not a stream socket")
        for _, level, number, value in settings:
            listener.setsockopt(level, number, value)
        if backlog is not None or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.listen(DEFAULT_BACKLOG if backlog is None else backlog)
    except BaseException:
        listener.detach()  # it stays the caller's
        raise
    return listener
