"""bind(), create_server(), serve() and Listener."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastlisten import _accept
from fastlisten._connection import Connection
from fastlisten._endpoint import Endpoint, endpoint_of, resolve
from fastlisten._loop import Loop

if TYPE_CHECKING:
    from fastlisten._awaiting import AsyncAcceptor

Handler = Callable[[Connection], object]
OnError = Callable[[Exception, Connection], object]
Exhausted = str | Callable[[OSError, int], float]
Address = Endpoint | str | bytes | tuple[Any, ...]

# What socket.listen() takes when it is not told: enough for a burst, little enough to notice overload.
DEFAULT_BACKLOG = min(socket.SOMAXCONN, 128)


class ServeResult(NamedTuple):
    """What a stop did: connections whose handlers finished after it, and connections that were cut.

    >>> finished, cut = ServeResult(finished=3, cut=0)
    """

    finished: int
    cut: int


class ListenerStats(NamedTuple):
    """The counters of a Listener since `since` (time.time()).

    accepted: clients taken from the kernel.  handled: handlers that returned or raised.  active:
    Connections handed out and not yet closed.  handler_errors: handlers that raised.  accept_errors: failed
    accepts by errno name.  refused: clients told `busy`.  paused: by pause().  threads, idle_threads: of
    the serve() that runs.  queue_depth, queue_limit: of the kernel's queue, None where it does not tell.

    >>> with bind("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()):
    ...     connections = listener.accept_many()
    ...     (listener.stats().accepted, listener.stats().active)
    ...     connections[0].close()
    ...     (listener.stats().accepted, listener.stats().active)
    (1, 1)
    (1, 0)
    """

    accepted: int
    handled: int
    active: int
    handler_errors: int
    accept_errors: Mapping[str, int]
    refused: int
    paused: bool
    threads: int
    idle_threads: int
    queue_depth: int | None
    queue_limit: int | None
    since: float


class ServeOptions(NamedTuple):
    """How to serve, checked before any socket opens.

    threads: (least, most), (0, 0) for none.  The last three are for the drop-in socketserver: serve() leaves
    without waiting for the handlers of its threads; whether those are daemon threads; and for how many
    microseconds a handler keeps others from being accepted before another thread does that, 0 for the
    loop's own answer.
    """

    threads: tuple[int, int]
    max_connections: int | None
    pending: int | None
    busy: bytes | None
    exhausted: Exhausted
    on_error: OnError | None
    leave: bool = False
    daemon: bool = True
    tick: int = 0


def _whole(name: str, value: object, least: int) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return min(value, 2**31 - 1)


def _thread_range(threads: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(threads, tuple):
        number = _whole("threads", threads, 0)
        return number, number
    if len(threads) != 2:
        raise ValueError(f"threads must be a number or (least, most), not {threads!r}")
    least, most = (_whole("threads", number, 1) for number in threads)
    if least > most:
        raise ValueError(f"threads: the least, {least}, is above the most, {most}")
    return least, most


def serve_options(
    handler: Handler,
    *,
    threads: int | tuple[int, int] = 0,
    max_connections: int | None = None,
    pending: int | None = None,
    busy: str | bytes | None = None,
    exhausted: Exhausted = "pause",
    on_error: OnError | None = None,
) -> ServeOptions:
    """The options of serve() as one checked value; TypeError or ValueError names what is wrong."""
    if not callable(handler):
        raise TypeError(f"handler must be callable, not {type(handler).__name__}")
    if on_error is not None and not callable(on_error):
        raise TypeError(f"on_error must be callable, not {type(on_error).__name__}")
    if max_connections is not None:
        max_connections = _whole("max_connections", max_connections, 1)
    if pending is not None:
        pending = _whole("pending", pending, 0)
    if busy == "reset":
        busy = b""
    elif isinstance(busy, str):
        raise ValueError(f"busy must be 'reset' or bytes, not {busy!r}")
    elif busy is not None and not isinstance(busy, bytes):
        raise TypeError(f"busy must be 'reset' or bytes, not {type(busy).__name__}")
    if not callable(exhausted) and exhausted not in ("pause", "shed"):
        raise ValueError(f"exhausted must be 'pause', 'shed' or callable, not {exhausted!r}")
    return ServeOptions(_thread_range(threads), max_connections, pending, busy, exhausted, on_error)


class Listener(socket.socket):
    """A listening socket with fastlisten's accept loop; everything else is socket.socket's.

    bind() and create_server() make Listeners that listen.  Listener(family, type, proto) is bound and
    set to listen by hand, as a socket.socket is; Listener(fileno=N) takes descriptor N over and closes it.

    >>> def shout(connection):
    ...     connection.sendall(connection.recv(100).upper())
    ...     listener.stop()
    >>> with bind("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()) as client:
    ...     client.sendall(b"hello")
    ...     listener.serve(shout)
    ...     client.recv(100)
    ServeResult(finished=1, cut=0)
    b'HELLO'
    """

    def __init__(
        self,
        family: int = -1,
        type: int = -1,  # noqa: A002
        proto: int = -1,
        fileno: int | None = None,
    ) -> None:
        super().__init__(family, type, proto, fileno)
        self._ledger = _accept.Ledger(int(self.family), int(self.type), self.proto)
        self._since = time.time()
        self._loop: Loop | None = None
        self._unlink: _OwnPath | None = None
        self._arrivals: AsyncAcceptor | None = None
        self._served = False  # an asyncio server has it, and closes it
        _listeners.add(self)

    accept = _accept.accept
    accept_many = _accept.accept_many

    @property
    def endpoint(self) -> Endpoint:
        """Where the socket is bound, with the real port where 0 was asked for."""
        address = self.getsockname()
        # A unix path is text there, and "a.sock" is no endpoint's text; as bytes it is a path.
        return endpoint_of(os.fsencode(address) if isinstance(address, str) else address)

    def serve(
        self,
        handler: Handler,
        *,
        threads: int | tuple[int, int] = 0,
        max_connections: int | None = None,
        pending: int | None = None,
        busy: str | bytes | None = None,
        exhausted: Exhausted = "pause",
        on_error: OnError | None = None,
    ) -> ServeResult:
        """Call `handler(connection)` for each client until stop(); the connection is closed on return.

        threads: 0 runs the handler in this thread; N, or (least, most), in that many threads.
        max_connections: at so many that are not yet closed no more are accepted.
        pending: how many clients may wait for a handler when `busy` is given.
        busy: what the client over that is told at once: "reset", or bytes sent before the close; None lets
        clients wait in the kernel's queue.
        exhausted: when descriptors or memory run out, "pause", or "shed" clients through a descriptor kept
        for that, or a callable(exception, attempt) that returns the seconds to pause; what it raises, and
        ValueError for what is no such number, ends the loop.
        on_error(exception, connection): gets what a handler raised; without it the log gets it.

        Returns a ServeResult.  Raises what ends the loop: KeyboardInterrupt and SystemExit, also out of a
        handler; OSError of the listener; RuntimeError when somebody else serves this Listener already, or
        waits for its clients on an event loop.
        """
        options = serve_options(
            handler,
            threads=threads,
            max_connections=max_connections,
            pending=pending,
            busy=busy,
            exhausted=exhausted,
            on_error=on_error,
        )
        return run_loop(Loop([self], handler, options))

    def __iter__(self) -> Iterator[Connection]:
        """Connections until stop(); each is the caller's to close."""
        return _connections(self)

    def __aiter__(self) -> AsyncIterator[Connection]:
        """Connections until stop() or close(), on the event loop that runs.

        They are non-blocking, so that loop.sock_recv() and the like take them, and the caller's to close.
        """
        from fastlisten._awaiting import async_acceptor  # asyncio is much to import for those who never ask

        return async_acceptor(self, check_unserved).connections()

    async def accept_async(self) -> tuple[socket.socket, Any]:
        """Wait for a client on the event loop that runs; returns (socket.socket, address) as accept() does.

        The socket is non-blocking and the caller's to close.  Several tasks may wait; cancelling one loses
        no client.  Raises OSError as accept(), and RuntimeError when the Listener is served.
        """
        from fastlisten._awaiting import async_acceptor

        return await async_acceptor(self, check_unserved).accept()

    def stop(self, drain: float | None = None) -> None:
        """Ask serve() to end, and return at once; any thread, handler or signal handler may call it.

        drain: None takes nobody more from the kernel's queue and lets handlers end in their own time.  With
        seconds, clients that the kernel had queued are still handled, and connections whose handlers take
        longer than that are cut.  0 cuts at once.

        Without a serve() that runs, the next one returns at once.  Raises ValueError for a drain below 0.
        """
        if drain is not None and not drain >= 0:
            raise ValueError(f"drain must not be negative, not {drain!r}")
        self._ledger.stop(drain)
        loop = self._loop
        if loop is not None:
            loop.stop(drain)

    def pause(self) -> None:
        """Accept nobody until resume(); clients wait in the kernel's queue, handlers go on."""
        self._ledger.paused = True

    def resume(self) -> None:
        """Accept again after pause()."""
        self._ledger.paused = False

    def stats(self) -> ListenerStats:
        """The counters as they are now."""
        accepted, handled, active, handler_errors, refused, accept_errors = self._ledger.counts()
        loop = self._loop
        threads, idle = (0, 0) if loop is None else loop.threads_now()
        depth, limit = _accept.queue(self.fileno())
        return ListenerStats(
            accepted=accepted,
            handled=handled,
            active=active,
            handler_errors=handler_errors,
            accept_errors=accept_errors,
            refused=refused,
            paused=self._ledger.paused,
            threads=threads,
            idle_threads=idle,
            queue_depth=depth,
            queue_limit=limit,
            since=self._since,
        )

    def close(self) -> None:
        """Close the listener; a serve() that runs ends as by stop(drain=0).

        A unix path that bind() made is unlinked, if it still is the socket that bind() made.
        """
        self._leave_loop()
        if self._unlink is not None:
            self._unlink.remove()
            self._unlink = None
        super().close()

    def detach(self) -> int:
        """Give the descriptor away, as socket.detach(); a serve() that runs ends, a unix path stays."""
        self._leave_loop()
        self._unlink = None
        if self.fileno() != -1:
            with suppress(OSError):  # closed behind our back: detach() is not where that is told
                self.settimeout(self.gettimeout())  # sets the description's mode, which serve() changed
        return super().detach()

    def settimeout(self, value: float | None, /) -> None:
        """As socket.settimeout(): how long accept() waits, in seconds."""
        super().settimeout(value)
        if self._loop is not None:
            _accept.share_nonblocking(self)  # the loop must not block in accept()

    def setblocking(self, flag: bool, /) -> None:
        """As socket.setblocking()."""
        super().setblocking(flag)
        self.settimeout(self.gettimeout())

    def _leave_loop(self) -> None:
        if self._arrivals is not None:
            self._arrivals.end()
        loop = self._loop
        if loop is not None:
            self.stop(drain=0)
            loop.release(self)


SomeListener = TypeVar("SomeListener", bound=Listener)


class _OwnPath(NamedTuple):
    """A unix socket's path, to be unlinked by the process that made it while it is what was made."""

    path: str | bytes
    device: int
    inode: int
    process: int

    @classmethod
    def of(cls, path: str | bytes) -> _OwnPath:
        made = os.stat(path)
        return cls(path, made.st_dev, made.st_ino, os.getpid())

    def remove(self) -> None:
        if os.getpid() != self.process:
            return  # the process that forked us still listens there
        try:
            now = os.stat(self.path)
            if (now.st_dev, now.st_ino) == (self.device, self.inode) and stat.S_ISSOCK(now.st_mode):
                os.unlink(self.path)
        except FileNotFoundError:
            pass


def check_unserved(listener: Listener) -> None:
    """RuntimeError when a serve() or an asyncio server accepts from this Listener, and hears its requests."""
    if listener._served:
        raise RuntimeError(f"an asyncio server accepts from {listener!r}")
    if listener._loop is not None:
        raise RuntimeError(f"serve() runs already on {listener!r}")


def check_free(listener: Listener) -> None:
    """check_unserved(), and RuntimeError when somebody waits in accept_async() or `async for`."""
    check_unserved(listener)
    if listener._arrivals is not None and listener._arrivals.waiting:
        raise RuntimeError(f"somebody waits on an event loop for the clients of {listener!r}")


def claim(loop: Loop) -> None:
    """Make this the loop of its listeners, until its let_go(); RuntimeError when one is claimed already."""
    if len({*loop.listeners}) < len(loop.listeners):
        raise ValueError("a listener is given more than once")
    loop.claim(_claims, check_free)


def run_loop(loop: Loop) -> ServeResult:
    """Claim the loop's listeners, run it, let them go.  Raises as claim(), and what ends the loop."""
    try:
        claim(loop)  # in here, for a signal may end it half-way
        return ServeResult(*loop.run())
    finally:
        loop.let_go()


def _connections(listener: Listener) -> Iterator[Connection]:
    loop = Loop([listener], None, serve_options(print))
    try:
        claim(loop)
        loop.start()
        while (connection := loop.next()) is not None:
            yield connection
    finally:
        loop.finish()
        loop.let_go()


def serve(
    handler: Handler,
    *endpoints: Address | Listener,
    backlog: int | None = None,
    reuse_port: bool = False,
    dualstack_ipv6: bool = False,
    exclusive: bool = False,
    defer_accept: int | None = None,
    fast_open: int | None = None,
    no_delay: bool = False,
    keep_alive: bool = False,
    mode: int | None = None,
    **options: Any,
) -> ServeResult:
    """Bind the endpoints and serve them in one loop, with one set of threads and limits, in turn.

    endpoints: as bind() takes them; Listeners are served too and stay open, what serve() bound it closes.
    The other arguments are those of bind() and of Listener.serve().  stop() of any of the listeners ends
    the loop.  Returns and raises as Listener.serve().

    >>> with bind("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()):
    ...     serve(lambda connection: listener.stop(), listener, "127.0.0.1:0")
    ServeResult(finished=1, cut=0)
    """
    checked = serve_options(handler, **options)
    if not endpoints:
        raise TypeError("serve() needs at least one endpoint")
    bound: list[Listener] = []
    try:
        listeners = []
        for endpoint in endpoints:
            if not isinstance(endpoint, Listener):
                endpoint = bind(
                    endpoint,
                    backlog=backlog,
                    reuse_port=reuse_port,
                    dualstack_ipv6=dualstack_ipv6,
                    exclusive=exclusive,
                    defer_accept=defer_accept,
                    fast_open=fast_open,
                    no_delay=no_delay,
                    keep_alive=keep_alive,
                    mode=mode,
                )
                bound.append(endpoint)
            listeners.append(endpoint)
        return run_loop(Loop(listeners, handler, checked))
    finally:
        for listener in reversed(bound):
            listener.close()


# --- binding --------------------------------------------------------------------------------------


def _option(name: str, constant: str) -> int:
    """The number of a socket option; where the system has none, the standard library's ValueError."""
    number = getattr(socket, constant, None)
    if number is None:
        raise ValueError(f"{name}: {constant} not supported on this platform")
    return int(number)


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
) -> Listener:
    """Bind to an endpoint and listen; returns the Listener, the caller's to close.

    endpoint: an Endpoint, text that parses to one, or an address as socket.bind() takes it.  "fd:N" adopts
    a listener that was inherited.
    backlog: how many clients may wait in the kernel's queue; listen(2).
    reuse_port: share the port with other listeners that ask for the same (SO_REUSEPORT).
    dualstack_ipv6: have an IPv6 listener take IPv4 clients too.
    exclusive: let nobody else bind the port (SO_EXCLUSIVEADDRUSE, Windows).
    defer_accept: accept a client when its first bytes are there, or after so many seconds; tcp(7).
    fast_open: how many TCP Fast Open requests may be pending; RFC 7413.
    no_delay, keep_alive: TCP_NODELAY and SO_KEEPALIVE on the accepted connections.
    mode: permission bits of a unix path, in force from the moment it exists.

    Raises ValueError for text that is no endpoint and for an option that this system or this kind of
    endpoint lacks, TypeError and OverflowError for an argument of another type or size, AttributeError for a
    unix path where Python has no AF_UNIX, all before a socket opens; OSError as socket.bind() does
    (socket.gaierror for a host without an address).

    >>> with bind("127.0.0.1:0", backlog=100, keep_alive=True) as listener:
    ...     listener.endpoint.host
    '127.0.0.1'
    """
    where = endpoint_of(endpoint)
    unix_path = where.host[5:] if where.host.startswith("unix:") else None
    options: list[tuple[int, int, int]] = []
    if reuse_port:
        options.append((socket.SOL_SOCKET, _option("reuse_port", "SO_REUSEPORT"), 1))
        if where.port == 0 and unix_path is None:
            raise ValueError("reuse_port with port 0 could share a stranger's port")
    if exclusive:
        options.append((socket.SOL_SOCKET, _option("exclusive", "SO_EXCLUSIVEADDRUSE"), 1))
    if keep_alive:
        options.append((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
    tcp = {
        "TCP_DEFER_ACCEPT": ("defer_accept", defer_accept),
        "TCP_FASTOPEN": ("fast_open", fast_open),
        "TCP_NODELAY": ("no_delay", 1 if no_delay else None),
    }
    for constant, (name, value) in tcp.items():
        if value is not None:
            if unix_path is not None:
                raise ValueError(f"{name} is for TCP, not for {where}")
            number = _option(name, constant)
            options.append((socket.IPPROTO_TCP, number, _whole(name, value, 0)))
    if mode is not None and (unix_path is None or unix_path.startswith("@")):
        raise ValueError(f"mode is for unix paths, not for {where}")

    if where.host.startswith("fd:"):
        if reuse_port or exclusive or dualstack_ipv6:
            raise ValueError(f"{where} is bound already")
        return _adopt(int(where.host[3:]), options, backlog)
    if unix_path is None:
        # All addresses, and a name's, are of both families; IPv6 can take both.
        both = dualstack_ipv6 and (not where.host or where.family == socket.AF_UNSPEC)
        where = resolve(where, socket.AF_INET6 if both else socket.AF_UNSPEC)[0]
    if dualstack_ipv6:
        if not socket.has_dualstack_ipv6():
            raise ValueError("dualstack_ipv6 not supported on this platform")
        if where.family != socket.AF_INET6:
            raise ValueError("dualstack_ipv6 requires AF_INET6 family")

    address: Any = where.sockaddr
    listener = Listener(where.family, socket.SOCK_STREAM)
    try:
        if _accept.REUSE_ADDRESS and not exclusive:
            with suppress(OSError):  # as socket.create_server() does
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for level, number, value in options:
            listener.setsockopt(level, number, value)
        if where.family == socket.AF_INET6 and hasattr(socket, "IPV6_V6ONLY"):
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dualstack_ipv6 else 1)
        with _permissions(mode):
            listener.bind(address)
        if unix_path is not None and not unix_path.startswith("@"):
            listener._unlink = _OwnPath.of(unix_path)
        listener.listen(DEFAULT_BACKLOG if backlog is None else backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def create_server(
    address: tuple[Any, ...] | str | bytes,
    *,
    family: int = socket.AF_INET,
    backlog: int | None = None,
    reuse_port: bool = False,
    dualstack_ipv6: bool = False,
) -> Listener:
    """socket.create_server(), with its arguments, its checks and its errors; returns a Listener.

    >>> with create_server(("127.0.0.1", 0)) as listener:
    ...     isinstance(listener, socket.socket)
    True
    """
    sock = socket.create_server(
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


def _adopt(fd: int, options: list[tuple[int, int, int]], backlog: int | None) -> Listener:
    listener = Listener(fileno=fd)
    try:
        if listener.type != socket.SOCK_STREAM:
            raise ValueError(f"fd:{fd} is not a stream socket")
        for level, number, value in options:
            listener.setsockopt(level, number, value)
        if backlog is not None or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.listen(DEFAULT_BACKLOG if backlog is None else backlog)
    except BaseException:
        listener.detach()  # it stays the caller's
        raise
    return listener


@contextmanager
def _permissions(mode: int | None) -> Iterator[None]:
    """Have what is made inside carry `mode`.  The umask is the process's: keep the time short, and one at a
    time.  A later chmod() would leave the path open to others for a moment."""
    if mode is None:
        yield
        return
    with _umask:
        before = os.umask(0o777 & ~mode)
        try:
            yield
        finally:
            os.umask(before)


# --- fork -----------------------------------------------------------------------------------------

_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
_claims = threading.Lock()
_umask = threading.Lock()


def _after_fork_in_child() -> None:
    """The wake-ups are shared with the parent, whose loop must not hear ours; and only one thread is left."""
    global _claims, _umask
    _claims, _umask = threading.Lock(), threading.Lock()
    for listener in list(_listeners):
        listener._ledger.after_fork()
        shared = listener._ledger.wake
        if shared is not None:
            for old, new in zip(shared, _accept.wake_pair(), strict=True):
                os.dup2(new, old, inheritable=False)
                os.close(new)
        if listener._loop is not None and not listener._loop.survives_fork():
            listener._loop.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
