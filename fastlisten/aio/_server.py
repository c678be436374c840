"""Server: what asyncio.Server is, on our accept loop and transports."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
import warnings
import weakref
from asyncio import trsock
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastlisten._core.accept import Shortage
from fastlisten._core.acceptor import Acceptor
from fastlisten._core.first_bytes import first_bytes_of
from fastlisten._core.overload import HANDLERS_AT_MOST, Overload
from fastlisten._core.standard import refuse_green
from fastlisten._core.state import State, Taker, queue
from fastlisten._listener import Listener, ListenerStats, all_times
from fastlisten._options import AsyncioOptions, Checked, checked
from fastlisten._unix_path import OwnPath
from fastlisten.aio._accepting import Accepting
from fastlisten.aio._hub import Hub
from fastlisten.aio._tls import TlsSettings
from fastlisten.aio._transport import Connections

Factory = Callable[[], asyncio.BaseProtocol]

_log = logging.getLogger("fastlisten")

# What asyncio's Server can do and since when; before 3.12.1 wait_closed() does not wait for connections, and
# on uvloop it never does.
_CLOSES_CLIENTS = sys.version_info >= (3, 13)
_WAITS_FOR_CLIENTS = sys.version_info >= (3, 12)
# What cancelling serve_forever() does to the clients has changed in a bugfix release: cpython's gh-123720.
_CUTS_CLIENTS = "close_clients" in asyncio.Server.serve_forever.__code__.co_names


class Server(asyncio.AbstractServer):
    """A server as asyncio.Server is one, with stats(), pause() and resume(); create_server() makes it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sockets: list[socket.socket],
        factory: Factory,
        backlog: int,
        limits: Checked,
        path: OwnPath | None = None,
        tls: TlsSettings | None = None,
    ) -> None:
        self._loop = loop
        self._waits = _WAITS_FOR_CLIENTS and isinstance(loop, asyncio.BaseEventLoop)  # uvloop's does not
        self._sockets: list[socket.socket] | None = None  # they are the caller's yet
        self._backlog = backlog
        self._limits = limits
        self._connections = Connections(Hub(loop), factory)
        shortage = Shortage("pause" if limits.busy is not None else limits.exhausted)
        self._accepting = Accepting(self._connections, limits.max_connections or 0, shortage)
        self._accepting.when_idle(self._client_gone)
        self._states = [_state_of(sock) for sock in sockets]
        self._taker = ServerTaker(self, self._accepting)
        self._path = path
        self._tls = tls
        self._ssl_context = tls and tls.context  # others read it from asyncio's own
        self._since = time.time()
        self._paused = False
        self._serving = False
        self._forever: asyncio.Future[None] | None = None
        self._waiters: list[asyncio.Future[None]] | None = []
        self._deadline: asyncio.TimerHandle | None = None  # of a drain
        self._attached = 0
        self._sockets = sockets

    def __del__(self, warn: Any = warnings.warn) -> None:
        if self.__dict__.get("_sockets") is None:
            return
        warn(f"unclosed server {self!r}", ResourceWarning, source=self)
        sockets, self._sockets = self._sockets, None
        self._accepting.abandon()
        self._give_back()
        for sock in sockets or ():
            sock.close()

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
        if self._sockets is None or self._deadline is not None:
            raise RuntimeError(f"server {self!r} is closed")
        try:
            for state in self._states:
                state.take(self._taker)
            for sock in self._sockets:
                sock.listen(self._backlog)
            if self._limits.busy is None:
                if (first_bytes := first_bytes_of(self._limits)) is not None:
                    self._accepting.add_first_bytes(first_bytes)
                for sock, state in zip(self._sockets, self._states, strict=True):
                    self._accepting.add_listener(sock, state)
            else:
                self._accepting.add_queue(self._overload(self._sockets))
        except BaseException:
            self._give_back()
            raise
        most, pending = self._limits.max_connections or 0, self._limits.pending or 0
        for state in self._states[:1]:  # there are none for an empty list of hosts
            state.capacity = most and most + pending
        self._serving = True
        self._accepting.serve()

    def _overload(self, sockets: list[socket.socket]) -> Overload:
        """A thread that refuses who finds no place, also while the event loop is busy."""
        limits = self._limits
        most, pending = limits.max_connections or 0, limits.pending or 0
        # An event loop has as many handlers as there may be connections; who is not with it yet waits.
        handlers = HANDLERS_AT_MOST if most else 0 if pending else 1
        listeners = [(sock.fileno(), state) for sock, state in zip(sockets, self._states, strict=True)]
        shortage = Shortage(limits.exhausted, limits.busy)
        acceptor = Acceptor(listeners, True, 0, shortage, first_bytes_of(limits))
        return Overload(acceptor, pending, handlers, most, limits.busy)

    def _give_back(self) -> None:
        for state in self._states:
            state.give_back(self._taker)

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

    def close(self, drain: float | None = None) -> None:
        """Take no more clients and close the listening sockets; open connections go on.

        drain: with seconds, who is queued now, in the kernel or for `busy`, is still served, and the sockets
        close when all of them are taken.  After that time the sockets close in any case, and connections that
        are still open are aborted.  0 does so at once.  A call in a drain ends it, or shortens its time.
        serve_forever() ends with the drain; wait_closed() waits for it, on every version of Python.

        Raises ValueError for a drain below 0.
        """
        if drain is not None and not drain >= 0:
            raise ValueError(f"drain must not be negative, not {drain!r}")
        if self._loop.is_closed():
            drain = None  # nobody can be served any more
        if drain and self._serving:
            for state in self._states:
                state.paused = False  # a drain takes its clients all the same
            self._accepting.drain(drain, self._close_sockets)
            self._serving = False
        elif not drain or not self._draining():
            self._close_sockets()
        if drain is None:
            self._end_forever()
        else:
            self._abort_within(drain)

    def _stop(self, drain: float | None) -> None:
        """Close, unless that was done already."""
        if self._serving:
            self.close(drain)

    def _draining(self) -> bool:
        return self._sockets is not None and self._deadline is not None

    async def __aexit__(self, *raised: object) -> None:
        """Close, or let a drain come to its end unless something was raised; and wait_closed()."""
        if raised[0] is not None or not self._draining():
            self.close()
        await self.wait_closed()

    def _abort_within(self, seconds: float) -> None:
        """Abort what is left of a drain after this time, if that is not due before."""
        if self._waiters is None:
            return
        if self._deadline is not None:
            if self._deadline.when() <= self._loop.time() + seconds:
                return
            self._deadline.cancel()
        self._deadline = self._loop.call_later(seconds, self._abort)

    def _abort(self) -> None:
        """The time of a drain is over."""
        self._close_sockets()
        for transport in self._connections.clients():
            transport.abort()
        self._end_forever()

    def _close_sockets(self) -> None:
        sockets, self._sockets = self._sockets, None
        if sockets is None:
            return
        self._accepting.stop()
        self._give_back()
        for sock in sockets:
            sock.close()
        if self._tls is not None and self._tls.threads is not None:
            self._tls.threads.close()
        if self._path is not None:
            _remove(self._path)
        self._serving = False
        self._client_gone()

    def _end_forever(self) -> None:
        if self._forever is not None and not self._forever.done():
            self._forever.cancel()
            self._forever = None

    def _client_gone(self) -> None:
        if self._sockets is None and self._connections.active == 0 and not self._attached:
            self._wake_up()
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
                self._end_forever()

    # asyncio's own transports tell their server so that they are there; one may be given ours.  And others
    # read asyncio's count of them.

    @property
    def _active_count(self) -> int:
        return self._connections.active + self._attached

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
        """Wait until the server is closed and its connections are gone; before Python 3.12, and on uvloop, as
        their own, for nothing once it is closed without a drain."""
        if self._waiters is None:
            return
        if self._sockets is None and self._deadline is None and not self._waits:
            return
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        await waiter

    if _CLOSES_CLIENTS:

        def close_clients(self) -> None:
            """Close all connections, each when what was written to it is sent."""
            for transport in self._connections.clients():
                transport.close()

        def abort_clients(self) -> None:
            """Close all connections at once."""
            for transport in self._connections.clients():
                transport.abort()

    def pause(self) -> None:
        """Accept nobody until resume(); clients wait in the kernel's queue, connections go on."""
        self._hold(True)

    def resume(self) -> None:
        """Accept again after pause()."""
        self._hold(False)

    def _hold(self, paused: bool) -> None:
        self._paused = paused
        for state in self._states:
            state.paused = paused
        self._accepting.hold(paused)

    def stats(self) -> ListenerStats:
        """The counters of all its listening sockets together; `handled` counts connections that have ended,
        `handler_errors` what factories and protocols raised."""
        totals: Counter[str] = Counter()
        accept_errors: Counter[str] = Counter()
        tls_failures: Counter[str] = Counter()
        refused_for: Counter[str] = Counter()
        for state in self._states:
            counts: dict[str, Any] = {**state.counts()}
            accept_errors.update(counts.pop("accept_errors"))
            tls_failures.update(state.tls_failures())
            refused_for.update(state.refused_for())
            totals.update(counts)
        queues = [queue(sock.fileno()) for sock in self._sockets or ()]
        depths = [depth for depth, _ in queues if depth is not None]
        limits = [limit for _, limit in queues if limit is not None]
        return ListenerStats(
            **totals,
            accept_errors=dict(accept_errors),
            paused=self._paused,
            threads=0,
            idle_threads=0,
            queue_depth=sum(depths) if depths else None,
            queue_limit=sum(limits) if limits else None,
            since=self._since,
            tls_failures=dict(tls_failures),
            refused_for=dict(refused_for),
            pending_times=all_times(state.pending_times() for state in self._states),
        )


class ServerTaker(Taker):
    """A Server, as its listeners' states know it."""

    activity = "an asyncio server accepts from"

    def __init__(self, server: Server, accepting: Accepting) -> None:
        # The thread that refuses holds the states, and they this: a server that is dropped must end.
        self._server = weakref.ref(server)
        self._accepting = weakref.ref(accepting)
        self._left = False

    def stop(self, drain: float | None) -> None:
        """A listener was told to stop, from any thread: the server is closed, with this drain."""
        server = self._server()
        if server is not None and not self._left:
            with suppress(RuntimeError):  # its event loop is closed
                server._loop.call_soon_threadsafe(server._stop, drain)

    def bring_back(self) -> None:
        """The thread that refuses does not go on sleeping in accept()."""
        accepting = self._accepting()
        if accepting is not None:
            accepting.bring_back()

    def help(self, state: State, sock: socket.socket) -> None:
        """The server takes who is queued for another listener, too."""
        accepting = self._accepting()
        if accepting is not None:
            accepting.help(state, sock)

    def leave(self, state: State) -> None:
        """The server takes no more clients from a listener that is closed without it."""
        self._left = True
        accepting = self._accepting()
        if accepting is not None:
            accepting.leave(state)

    def stand_still(self, still: bool) -> None:
        """A thread forks: the thread that refuses has no client in hand."""
        accepting = self._accepting()
        if accepting is not None:
            accepting.stand_still(still)

    def after_fork(self) -> bool:
        """The server is the child's as much as its parent's; who waits in the queue is the parent's."""
        accepting = self._accepting()
        if accepting is not None:
            accepting.after_fork()
        return True


def checked_limits(handshake_threads: Any, *, exhausted: Any, **limits: Any) -> Checked:
    """What a server may take on: max_connections, pending, busy, exhausted and so on, checked.

    Raises RuntimeError where sockets are green: nothing would let a greenlet run.
    """
    refuse_green("an asyncio server")
    if exhausted not in ("pause", "shed"):
        raise ValueError(f"exhausted must be 'pause' or 'shed', not {exhausted!r}")
    limits |= {"exhausted": exhausted, "handshake_threads": handshake_threads}
    return checked(AsyncioOptions, "create_server", **limits)


def _state_of(sock: socket.socket) -> State:
    return sock._state if isinstance(sock, Listener) else State(sock)


def _remove(path: OwnPath) -> None:
    try:
        path.remove()
    except OSError as error:
        text = "a unix socket's path stays, and is to be removed by hand: %s"
        _log.error(text, error, extra={"event": "path stays", "reason": str(error)})
