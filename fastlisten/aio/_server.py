"""Server, and what it may take on."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from asyncio import trsock
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

from fastlisten import _accept
from fastlisten._listener import Listener, ListenerStats, check_free, claim, serve_options
from fastlisten._loop import Loop
from fastlisten.aio._accepting import Accepting
from fastlisten.aio._hub import Hub
from fastlisten.aio._transport import Connections

Factory = Callable[[], asyncio.BaseProtocol]

_log = logging.getLogger("fastlisten")

# What asyncio's Server can do and since when; before 3.12.1 wait_closed() does not wait for connections.
_CLOSES_CLIENTS = sys.version_info >= (3, 13)
_WAITS_FOR_CLIENTS = sys.version_info >= (3, 12)
# What cancelling serve_forever() does to the clients has changed in a bugfix release: cpython's gh-123720.
_CUTS_CLIENTS = "close_clients" in asyncio.Server.serve_forever.__code__.co_names


class Server(asyncio.AbstractServer):
    """A server as asyncio.Server is one, with stats(), pause() and resume(); the functions below make it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sockets: list[socket.socket],
        factory: Factory,
        backlog: int,
        limits: Limits,
        unlink: tuple[str | bytes, int] | None = None,
    ) -> None:
        self._loop = loop
        self._sockets: list[socket.socket] | None = sockets
        self._backlog = backlog
        self._limits = limits
        self._connections = Connections(Hub(loop), factory)
        self._accepting = Accepting(
            self._connections, limits.max_connections or 0, limits.shed and limits.busy is None
        )
        self._accepting.when_idle(self._client_gone)
        self._ledgers = [_ledger_of(sock) for sock in sockets]
        self._unlink = unlink
        self._guard: OverloadGuard | None = None
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
                self._accepting.add_listener(sock, ledger)
        else:
            self._guard = OverloadGuard(self._sockets, self._limits)
            self._ledgers = [listener._ledger for listener in self._guard.listeners]
            self._accepting.add_queue(self._guard.loop)
        for listener in given:
            listener._served = True
        self._accepting.serve()

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
        self._accepting.stop()
        if self._guard is not None:
            self._guard.close()
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
        if self._sockets is None and self._connections.active == 0 and not self._attached:
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
        for ledger in self._ledgers:
            ledger.paused = paused
        self._accepting.hold(paused)

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


class Limits:
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


class OverloadGuard:
    """The core's loop with a thread that refuses who finds no place, also while the event loop is busy."""

    def __init__(self, sockets: list[socket.socket], limits: Limits) -> None:
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
        """End the thread; who still waits is closed."""
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
