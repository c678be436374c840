"""Listener: a listening socket with fastlisten's accept loop; its counters and its iteration."""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

from fastlisten._core import accept as _accept
from fastlisten._core.connection import Connection
from fastlisten._core.loop import Loop
from fastlisten._core.standard import StandardSocket, green_library, refuse_green
from fastlisten._core.state import WAIT_BOUNDS, State, queue
from fastlisten._endpoint import Endpoint, endpoint_of
from fastlisten._options import Checked, InnerOptions, checked
from fastlisten._unix_path import OwnPath

if TYPE_CHECKING:
    from ssl import SSLContext

    from fastlisten._admission import Admission
    from fastlisten._awaiting import AsyncAcceptor
    from fastlisten._options import Watchdog
    from fastlisten._proxy import Proxy
    from fastlisten._tls import TLSConnection

    Handler = Callable[[Connection], object] | Callable[[TLSConnection], object]
    OnError = Callable[[Exception, Connection], object] | Callable[[Exception, TLSConnection], object]

Exhausted = str | Callable[[OSError, int], float]


class ServeResult(NamedTuple):
    """What a stop did: connections whose handlers finished after it, and connections that were cut, with them
    those that waited for a handler with `busy=`.

    >>> finished, cut = ServeResult(finished=3, cut=0)
    """

    finished: int
    cut: int


class PendingTimes(NamedTuple):
    """How long clients have waited for a handler in a queue of ours, with busy=.

    counts: how many, for each of metrics.WAIT_BOUNDS, in seconds, those that waited so long or less and
    longer than the bound before, and then the rest.  seconds: how long all of them have.

    >>> counts, seconds = PendingTimes(counts=(2, 1), seconds=0.75)
    """

    counts: tuple[int, ...]
    seconds: float


def all_times(times: Iterable[tuple[tuple[int, ...], float]]) -> PendingTimes:
    """Those of several in one."""
    some = [*times]
    counts = tuple(map(sum, zip(*(one[0] for one in some), strict=True)))
    return PendingTimes(counts, sum(one[1] for one in some)) if some else NO_TIMES


NO_TIMES = PendingTimes((0,) * (len(WAIT_BOUNDS) + 1), 0.0)


class ListenerStats(NamedTuple):
    """The counters of a Listener since `since` (time.time()).

    accepted: clients taken from the kernel.  handled: those of them whose connection was closed since, or
    taken over by detach(), socket() or accept().  active: those who wait for a handler or whose connection is
    open.  handler_errors: handlers that raised.  accept_errors: failed accepts by errno name.  refused:
    clients told `busy`, or closed for another reason, see refused_for.  dropped: clients closed before
    anybody got them, because serving ended.  At every moment accepted = handled + active + refused + dropped.
    paused: by pause().  threads, idle_threads: of the serve() that runs.  queue_depth, queue_limit: of the
    kernel's queue, None where it does not tell.
    tls_handshakes: those that servers with ssl= have completed.  tls_failures: those that failed, {reason:
    count}: "timeout"; "closed" (by the client, or a stop); "not TLS"; "version" and "cipher" (nothing in
    common); "client certificate" (none, or not accepted); "alert" (the client refused); "other".  Such a
    client counts as handled.
    waiting: clients that have to send something before a handler gets them, with first_bytes= or proxy=; they
    are active.  refused_for: {reason: count} of `refused`: "busy"; "silent" (sent nothing in time), "left"
    (went before it did), "made way" (for want of descriptors); "no PROXY header" (in time), "invalid PROXY
    header", "untrusted" (no proxy that is trusted); with admission= "denied", "not allowed", "penalised",
    "concurrent" and "rate".
    pending_connections: clients that wait for a handler, with busy=; they are active.  pending_times: how
    long such clients have waited.  capacity: how many clients may be with handlers, or wait for one, at a
    time, told by the first of the listeners that are served together; 0 where that is not known.

    >>> import fastlisten, socket
    >>> with fastlisten.bind("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()):
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
    dropped: int
    paused: bool
    threads: int
    idle_threads: int
    queue_depth: int | None
    queue_limit: int | None
    since: float
    tls_failures: Mapping[str, int] = MappingProxyType({})
    waiting: int = 0
    refused_for: Mapping[str, int] = MappingProxyType({})
    pending_connections: int = 0
    capacity: int = 0
    pending_times: PendingTimes = NO_TIMES
    tls_handshakes: int = 0


class Listener(StandardSocket):
    """A listening socket with fastlisten's accept loop; everything else is socket.socket's.

    bind() and create_server() make Listeners that listen.  Listener(family, type, proto) is bound and
    set to listen by hand, as a socket.socket is; Listener(fileno=N) takes descriptor N over and closes it.

    TLS is for serve() alone: accept(), accept_many() and iteration give clients as they come.

    >>> import fastlisten, socket
    >>> def shout(connection):
    ...     connection.sendall(connection.recv(100).upper())
    ...     listener.stop()
    >>> listener = fastlisten.bind("127.0.0.1:0")
    >>> with listener, socket.create_connection(listener.getsockname()) as client:
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
        self._state = State(self)
        self._since = time.time()
        self._path: OwnPath | None = None
        self._endpoint: Endpoint | None = None  # after _close_early()
        self._async_acceptors: WeakValueDictionary[int, AsyncAcceptor] | None = None  # by the loop's id()
        if green_library() is not None:
            from fastlisten import _green

            self.accept = functools.partial(_green.accept, self)  # type: ignore[method-assign]
            self.accept_many = _green.accept_many  # type: ignore[method-assign]

    accept = _accept.accept
    accept_many = _accept.accept_many

    @property
    def endpoint(self) -> Endpoint:
        """Where the socket is bound, with the real port where 0 was asked for."""
        if self._endpoint is not None:
            return self._endpoint
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
        ssl: SSLContext | None = None,
        handshake_timeout: float | None = None,
        first_bytes: float | None = None,
        proxy: Proxy | None = None,
        admission: Admission | None = None,
        watchdog: Watchdog | None = None,
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
        ssl: the ssl.SSLContext of a server; the handler gets a TLSConnection then.  Its handshake is in the
        handler's thread, and holds up no accept.  Who does not get through it is closed, counted
        (ListenerStats.tls_failures) and told to the log at level DEBUG.  `busy` is sent as it is, before TLS.
        handshake_timeout: how long a whole handshake may take, in seconds; None is 10.
        first_bytes: for how long a client may send nothing, in seconds; None lets it for as long as the
        handler does.  It waits without a thread, and is closed then (ListenerStats.refused_for); so is who
        leaves without a byte, and, when descriptors run out, who has waited longest.  For `max_connections`,
        `pending` and `busy` a client counts once it has sent something.  Who has spoken when stop() is called
        is handled, and a drain lets all who are here speak, in its time and theirs; who waits after that is
        closed.  Not for protocols in which the server speaks first.
        proxy: a Proxy: whose clients have to send a PROXY header first, before TLS.  connection.peer is what
        that says then, and connection.proxy the whole of it.  Headers are waited for as first bytes are; with
        `first_bytes` the client's own are waited for after that.
        admission: an Admission: who may come in at all, and how many of one source.  Who is refused is told
        what `busy` says, and closed, without any of Python's code.  Who waits for its first bytes or its
        header, or in the queue, has a connection that counts.
        watchdog: a Notifier, which is fed whenever the loop comes round: at least every `interval` while it
        waits for clients, and not while every handler's thread is busy and a client waits in vain.

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
            ssl=ssl,
            handshake_timeout=handshake_timeout,
            first_bytes=first_bytes,
            proxy=proxy,
            admission=admission,
            watchdog=watchdog,
        )
        return ServeResult(*make_loop([self], handler, options).run())

    def __iter__(self) -> Iterator[Connection]:
        """Connections until stop(); each is the caller's to close."""
        return _connections(self)

    def __aiter__(self) -> AsyncIterator[Connection]:
        """Connections until stop() or close(), on the event loop that runs.

        They are non-blocking, so that loop.sock_recv() and the like take them, and the caller's to close.
        """
        return self._awaited().connections()

    async def accept_async(self) -> tuple[socket.socket, Any]:
        """Wait for a client on the event loop that runs; returns (socket.socket, address) as accept() does.

        The socket is non-blocking and the caller's to close.  Several tasks may wait; cancelling one loses
        no client.  Raises OSError as accept(), and RuntimeError when the Listener is served.
        """
        return await self._awaited().accept()

    def _awaited(self) -> AsyncAcceptor:
        from fastlisten._awaiting import async_acceptor  # asyncio is much to import for who never asks

        if self._async_acceptors is None:
            self._async_acceptors = WeakValueDictionary()
        return async_acceptor(self, self._state, self._async_acceptors)

    def stop(self, drain: float | None = None) -> None:
        """Ask serve() to end, and return at once; any thread, handler or signal handler may call it.

        drain: None takes nobody more from the kernel's queue and lets handlers end in their own time; who
        waits for one, with `busy=`, is handled first.  With seconds, clients that the kernel had queued are
        still handled, who has yet to speak (`first_bytes=`, `proxy=`) is waited for, and connections whose
        handlers take longer than that are cut.  0 cuts at once.

        Who comes after that waits in the kernel's queue until the Listener is closed, or another serve()
        takes him; a socket that fastlisten.serve() or the command has bound is closed as soon as nobody more
        is taken, while handlers end, so that he is refused.

        Without a serve() that runs, the next one returns at once, after such a drain.

        Raises ValueError for a drain below 0.
        """
        if drain is not None and not drain >= 0:
            raise ValueError(f"drain must not be negative, not {drain!r}")
        self._state.stop(drain)

    def pause(self) -> None:
        """Accept nobody until resume(); clients wait in the kernel's queue, handlers go on."""
        self._state.paused = True

    def resume(self) -> None:
        """Accept again after pause()."""
        self._state.paused = False

    def stats(self) -> ListenerStats:
        """The counters as they are now."""
        threads, idle = self._state.threads_now()
        depth, limit = queue(self.fileno())
        return ListenerStats(
            **self._state.counts(),
            paused=self._state.paused,
            threads=threads,
            idle_threads=idle,
            queue_depth=depth,
            queue_limit=limit,
            since=self._since,
            tls_failures=self._state.tls_failures(),
            refused_for=self._state.refused_for(),
            pending_times=PendingTimes(*self._state.pending_times()),
        )

    def close(self) -> None:
        """Close the listener; a serve() that runs ends as by stop(drain=0).

        A unix path that bind() made is unlinked, if it still is the socket that bind() made.
        """
        self._state.leave()
        self._close()

    def _close(self) -> None:
        path, self._path = self._path, None  # another thread may close it just now
        if path is not None:
            path.remove()
        super().close()

    def _close_when_emptied(self) -> None:
        """Close as soon as a stop has left nobody in the queue to be taken, not when its handlers have ended:
        who comes later is refused, and does not wait for a reset.  For who made it and serves it once."""
        self._state.when_emptied = self._close_early

    def _close_early(self) -> None:
        """Close, while the handlers of a serve() that takes nobody more go on; `endpoint` is still told."""
        if self.fileno() != -1:
            self._endpoint = self.endpoint
            self._close()

    def detach(self) -> int:
        """Give the descriptor away, as socket.detach(); a serve() that runs ends, a unix path stays."""
        self._state.leave()
        self._path = None
        if self.fileno() != -1 and self._state.made_nonblocking:
            with suppress(OSError):  # closed behind our back: detach() is not where that is told
                self.settimeout(self.gettimeout())  # sets the description's mode, which serve() changed
        return super().detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """multiprocessing sends it to another process, as it does a socket; nothing else copies one.

        It finds its reducers by the exact class, and is too much to import for being told of ours.
        """
        reduction: Any = sys.modules.get("multiprocessing.reduction")
        if reduction is None or sys._getframe(1).f_globals is not vars(
            reduction
        ):  # pickle itself has no frame
            return super().__reduce_ex__(protocol)
        return self._rebuild, reduction._reduce_socket(self)

    @classmethod
    def _rebuild(cls, rebuild: Callable[..., socket.socket], arguments: tuple[Any, ...]) -> Listener:
        with rebuild(*arguments) as sock:
            timeout = sock.gettimeout()
            listener = cls(sock.family, sock.type, sock.proto, fileno=sock.detach())
        if listener.gettimeout() != timeout:  # it would set the mode of the description, which is shared
            listener.settimeout(timeout)
        return listener

    def settimeout(self, value: float | None, /) -> None:
        """As socket.settimeout(): how long accept() waits, in seconds."""
        super().settimeout(value)
        if self._state.taker is not None:  # who takes the clients must not block in accept()
            _accept.share_nonblocking(self.fileno(), self._state)

    def setblocking(self, flag: bool, /) -> None:
        """As socket.setblocking()."""
        super().setblocking(flag)
        self.settimeout(self.gettimeout())


# --- serving --------------------------------------------------------------------------------------


def serve_options(handler: Handler, **options: Any) -> Checked:
    """The options of serve() as one checked value; TypeError or ValueError names what is wrong."""
    if not callable(handler):
        raise TypeError(f"handler must be callable, not {type(handler).__name__}")
    found = checked(InnerOptions, "serve", **options)
    if found.handshake_timeout is not None and found.ssl is None:
        raise ValueError("handshake_timeout is only meaningful with ssl")
    return found


def make_loop(listeners: Sequence[Listener], handler: Handler | None, options: Checked) -> Loop:
    """The core's loop for these listeners; ValueError when one is there twice, RuntimeError where sockets are
    green."""
    refuse_green("serve()")
    if len({*listeners}) < len(listeners):
        raise ValueError("a listener is given more than once")
    handle, on_error = handler_of(handler, options)
    options = Checked({**vars(options), "on_error": on_error})
    return Loop([(listener.fileno(), listener._state) for listener in listeners], handle, options)


def handler_of(handler: Handler | None, options: Checked) -> tuple[Any, Any]:
    """What a Connection is handed to, and who gets what that raises; with ssl= TLS is between."""
    if options.ssl is None:
        return handler, options.on_error
    from fastlisten._tls import HANDSHAKE_TIMEOUT, TLSHandler  # only for who has a context

    seconds = HANDSHAKE_TIMEOUT if options.handshake_timeout is None else options.handshake_timeout
    tls: Any = TLSHandler(handler, options.on_error, options.ssl, seconds)  # type: ignore[arg-type]
    return tls, options.on_error and tls.on_error


def _connections(listener: Listener) -> Iterator[Connection]:
    loop = make_loop([listener], None, checked(InnerOptions, "iter"))
    try:
        loop.open()
        yield from iter(loop.next, None)  # no signal handler and no fork comes before the caller has it
    finally:
        loop.close()
