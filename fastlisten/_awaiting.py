"""Listener.accept_async() and `async for`, on the event loop that runs.

Imported when somebody asks for it: a program that never awaits does without asyncio.
"""

from __future__ import annotations

import asyncio
import logging
import math
import select
import socket
import weakref
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from fastlisten import _accept
from fastlisten._connection import Connection

if TYPE_CHECKING:
    from fastlisten._listener import Listener

_log = logging.getLogger("fastlisten")

# The pause after accept() ran out of descriptors or memory, in seconds; the same as everywhere else.
PAUSE_FIRST, PAUSE_LAST = 0.010, 0.100

_Proactor: Any = getattr(asyncio, "ProactorEventLoop", ())


class AsyncAcceptor:
    """Who waits on an event loop for the clients of one Listener.

    A waiter is only told to look: it accepts in its own task, so that nobody accepted can be lost when the
    task is cancelled.  The descriptors are registered with the loop only while somebody waits.
    """

    def __init__(self, listener: Listener, check: Callable[[Listener], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self._listener = listener
        self._check = check
        self._waiters: list[asyncio.Future[None]] = []
        self._watched: list[int] = []
        self._iterators: weakref.WeakSet[AsyncConnections] = weakref.WeakSet()
        self._to_drain: float | None = None  # how many of the kernel's queue a stop still takes

    async def accept(self) -> tuple[socket.socket, Any]:
        """What Listener.accept_async() does."""
        while (connection := self.take()) is None:
            await self.wait()
        address = connection.peer
        return connection.socket(), address

    def take(self) -> Connection | None:
        """The next client, if one is queued and the Listener is not paused; a drain takes it all the same."""
        self._check(self._listener)  # one descriptor has one watcher on an event loop, and one wake-up
        if self._to_drain is None:
            return None if self._listener._ledger.paused else _accept.take(self._listener)
        connection = _accept.take(self._listener)
        self._to_drain = 0 if connection is None else self._to_drain - 1
        return connection

    async def wait(self) -> None:
        """Wait until there may be something to do: a client, or pause, resume, stop or close."""
        waiter = self.loop.create_future()
        self._waiters.append(waiter)
        try:
            if not self._watched:
                self._watch()
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            if not self._waiters:
                self._unwatch()

    @property
    def waiting(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiters)

    def _watch(self) -> None:
        ledger = self._listener._ledger
        ledger.arm()
        assert ledger.wake is not None
        self.loop.add_reader(ledger.wake[0], self._woken, ledger.wake[0])
        self._watched.append(ledger.wake[0])
        if not ledger.paused:
            self.loop.add_reader(self._listener.fileno(), self._wake_one)
            self._watched.append(self._listener.fileno())

    def _unwatch(self) -> None:
        while self._watched:
            self.loop.remove_reader(self._watched.pop())

    def _wake_one(self) -> None:
        # Readiness is told again on each turn of the loop, so that others come to theirs.
        while self._waiters and not _told(self._waiters.pop(0)):
            pass
        if not self._waiters:
            self._unwatch()

    def _woken(self, waker: int) -> None:
        _accept.unring(waker)
        self.wake()

    def wake(self) -> None:
        """Have all that wait look again, and no descriptor watched until they wait again."""
        self._unwatch()
        while self._waiters:
            _told(self._waiters.pop())

    def end(self) -> None:
        """The Listener is about to be closed or detached."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self.loop:
            self._end()
        elif self.loop.is_closed():
            self._disarm()
        else:  # another thread's
            self.loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self.wake()
        self._disarm()

    def _disarm(self) -> None:
        if self._listener._loop is None:
            self._listener._ledger.disarm()

    def connections(self) -> AsyncConnections:
        """What `async for` goes through."""
        iterator = AsyncConnections(self._listener, self)
        self._iterators.add(iterator)
        return iterator

    def look_for_stop(self) -> bool:
        """Whether stop() was called: it ends all iterations that there are, with a drain as soon as they have
        taken what the kernel had queued.  Later ones may follow."""
        ledger = self._listener._ledger
        if not ledger.stopping:
            return False
        if ledger.draining and self._to_drain is None:
            depth, _ = _accept.queue(self._listener.fileno())
            self._to_drain = math.inf if depth is None else depth
        if not ledger.draining or not self._to_drain:
            self._to_drain = None
            ledger.answered()
            for iterator in self._iterators:
                iterator.ended = True
            self.wake()
        return True


def _told(waiter: asyncio.Future[None]) -> bool:
    """Tell who waits; False when its task was cancelled and has not left wait() yet."""
    if waiter.done():
        return False
    waiter.set_result(None)
    return True


class ThreadedAsyncAcceptor(AsyncAcceptor):
    """AsyncAcceptor on a proactor, which watches nothing: a thread of the loop's executor waits instead.

    The proactor's own accept would lose a client that comes while its task is cancelled.
    """

    _looking: asyncio.Future[Any] | None = None
    _to_disarm = False

    def _watch(self) -> None:
        if self._looking is not None:
            return  # it is about to end, and then all that wait look again
        ledger = self._listener._ledger
        ledger.arm()
        assert ledger.wake is not None
        watched = [ledger.wake[0]] if ledger.paused else [ledger.wake[0], self._listener.fileno()]
        self._looking = self.loop.run_in_executor(None, select.select, watched, [], [])
        self._looking.add_done_callback(self._looked)

    def _unwatch(self) -> None:
        if self._looking is not None:
            self._listener._ledger.ring()

    def _looked(self, looking: asyncio.Future[Any]) -> None:
        self._looking = None
        if not looking.cancelled():
            looking.exception()  # of a listener that was closed meanwhile: who waits is told by accept()
        wake = self._listener._ledger.wake
        if wake is not None:
            _accept.unring(wake[0])
        self.wake()
        if self._to_disarm:
            self._disarm()

    def _disarm(self) -> None:
        self._to_disarm = self._looking is not None  # the thread must not be left with closed descriptors
        if not self._to_disarm:
            super()._disarm()


class AsyncConnections(AsyncIterator[Connection]):
    """The Connections of a Listener, until stop() or close()."""

    def __init__(self, listener: Listener, acceptor: AsyncAcceptor) -> None:
        self.ended = False
        self._listener = listener
        self._acceptor = acceptor
        self._pause = 0.0  # seconds; not 0 while accepting runs out of resources

    async def __anext__(self) -> Connection:
        while True:
            closed = self._listener.fileno() == -1
            stopping = not closed and self._acceptor.look_for_stop()
            if self.ended or closed:
                self.ended = True
                raise StopAsyncIteration
            try:
                connection = self._acceptor.take()
            except OSError as error:
                if not _accept.ran_out(error):
                    raise
                await self._rest(error)
                continue
            if connection is None:
                if not stopping:
                    await self._acceptor.wait()
                continue
            if self._pause:
                self._pause = 0.0
                _log.info("accepting again")
            return connection

    async def _rest(self, error: OSError) -> None:
        if not self._pause:
            _log.warning("accepting pauses: %s", error)
        self._pause = min(max(2 * self._pause, PAUSE_FIRST), PAUSE_LAST)
        await asyncio.sleep(self._pause)


def async_acceptor(listener: Listener, check: Callable[[Listener], None]) -> AsyncAcceptor:
    """The listener's AsyncAcceptor on the loop that runs.

    check: raises when somebody else accepts from the listener; called before each accept().
    """
    loop = asyncio.get_running_loop()
    found = listener._arrivals
    if found is None or found.loop is not loop:
        kind = ThreadedAsyncAcceptor if isinstance(loop, _Proactor) else AsyncAcceptor
        found = listener._arrivals = kind(listener, check)
    return found
