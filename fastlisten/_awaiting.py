"""Listener.accept_async() and `async for`: who waits for a Listener's clients on an event loop."""

from __future__ import annotations

import asyncio
import math
import select
import socket
import weakref
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from fastlisten._core.accept import Shortage, accept_now
from fastlisten._core.connection import Connection
from fastlisten._core.state import State, Taker, queue
from fastlisten._selector import watch

_Proactor: Any = getattr(asyncio, "ProactorEventLoop", ())


class AsyncTaker(Taker):
    """An AsyncAcceptor, as its listener's state knows it."""

    activity = "somebody waits on an event loop for the clients of"

    def __init__(self, acceptor: AsyncAcceptor) -> None:
        # The event loop holds who waits, as it holds a task; with it, whoever waits is gone.
        self._acceptor = weakref.ref(acceptor)

    def leave(self, state: State) -> None:
        """The Listener is about to be closed or detached: everybody looks again, and finds that."""
        acceptor = self._acceptor()
        if acceptor is not None:
            acceptor.leave()

    def over(self) -> bool:
        """Whether nobody can be woken any more."""
        acceptor = self._acceptor()
        return acceptor is None or acceptor.loop.is_closed()


class AsyncAcceptor:
    """Who waits on one event loop for the clients of one Listener, which it takes while somebody does.

    A waiter is only told to look: it accepts in its own task, so that nobody accepted can be lost when the
    task is cancelled.  The descriptors are registered with the loop only while somebody waits.
    """

    def __init__(self, listener: socket.socket, state: State) -> None:
        self.loop = asyncio.get_running_loop()
        self._listener = listener
        self._state = state
        self._taker = AsyncTaker(self)
        self._waiters: list[asyncio.Future[None]] = []
        self._watched: list[int] = []
        self._iterators: weakref.WeakSet[AsyncConnections] = weakref.WeakSet()
        self._to_drain: float | None = None  # how many of the kernel's queue a stop still takes
        self._left = False  # the Listener is closed
        self._retry: asyncio.TimerHandle | None = None  # in a shortage: nobody is accepted until then

    async def accept(self) -> tuple[socket.socket, Any]:
        """What Listener.accept_async() does."""
        while (connection := self.take_now()) is None:
            await self.wait()
        address = connection.peer
        return connection.socket(), address

    def take_now(self) -> Connection | None:
        """The next client, if one is queued and the Listener is not paused; a drain takes it all the same."""
        self._state.check(self._taker, self._state.taken_by())
        if self._to_drain is None:
            return None if self._state.paused else accept_now(self._listener)
        connection = accept_now(self._listener)
        self._to_drain = 0 if connection is None else self._to_drain - 1
        return connection

    async def wait(self) -> None:
        """Wait until there may be something to do: a client, or pause, resume, stop or close."""
        waiter = self.loop.create_future()
        self._state.take(self._taker)
        self._waiters.append(waiter)
        try:
            if not self._watched:
                self._watch()
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            self._rest()

    async def wait_for_resources(self, seconds: float) -> None:
        """Wait so long, or until a connection of this Listener closes; nobody is accepted meanwhile."""
        if self._retry is None:
            self._state.wake_on_close(True)
            self._unwatch()
            self._retry = self.loop.call_later(seconds, self.wake)
        await self.wait()

    def _rest(self) -> None:
        """When nobody waits any more, watch nothing and let others take the clients."""
        if not self._waiters:
            self._unwatch()
            self._state.give_back(self._taker, not self._left)

    def _watch(self) -> None:
        waker = self._state.open_waker()
        watch(self.loop.add_reader, self.loop, waker, self._woken)
        self._watched.append(waker)
        if not self._state.paused and self._retry is None:
            watch(self.loop.add_reader, self.loop, self._listener.fileno(), self._wake_one)
            self._watched.append(self._listener.fileno())

    def _unwatch(self) -> None:
        while self._watched:
            self.loop.remove_reader(self._watched.pop())

    def _wake_one(self) -> None:
        # Readiness is told again on each turn of the loop, so that others come to theirs.
        while self._waiters and not _told(self._waiters.pop(0)):
            pass
        self._rest()

    def _woken(self) -> None:
        self._unwatch()  # the waker may have to be made anew
        self._state.drain_waker()
        self.wake()

    def wake(self) -> None:
        """Have all that wait look again, and no descriptor watched until they wait again."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
            self._state.wake_on_close(False)
        while self._waiters:
            _told(self._waiters.pop())
        self._rest()

    def leave(self) -> None:
        """The Listener is about to be closed or detached."""
        self._left = True
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self.loop:
            self.wake()
        elif self.loop.is_closed():
            self._state.give_back(self._taker)
        else:  # another thread's
            self.loop.call_soon_threadsafe(self.wake)

    def connections(self) -> AsyncConnections:
        """What `async for` goes through."""
        iterator = AsyncConnections(self._listener, self)
        self._iterators.add(iterator)
        return iterator

    def look_for_stop(self) -> bool:
        """Whether stop() was called: it ends all iterations that there are, with a drain as soon as they have
        taken what the kernel had queued.  Later ones may follow."""
        if not self._state.stopping:
            return False
        if self._state.draining and self._to_drain is None:
            depth, _ = queue(self._listener.fileno())
            self._to_drain = math.inf if depth is None else depth
        if not self._state.draining or not self._to_drain:
            self._to_drain = None
            self._state.answered()
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


# How often, in seconds, a thread that waits for a loop looks whether that was closed: nobody tells it so, and
# the interpreter does not end before it.
LOOK_AGAIN = 1.0


class ThreadedAsyncAcceptor(AsyncAcceptor):
    """AsyncAcceptor on a proactor, which watches nothing: a thread of the loop's executor waits instead.

    The proactor's own accept would lose a client that comes while its task is cancelled.
    """

    _looking: asyncio.Future[Any] | None = None

    def _watch(self) -> None:
        if self._looking is not None:
            return  # it is about to end, and then all that wait look again
        waker = self._state.open_waker()
        accepts = not self._state.paused and self._retry is None
        watched = [waker, self._listener.fileno()] if accepts else [waker]
        self._looking = self.loop.run_in_executor(None, self._wait, watched)
        self._looking.add_done_callback(self._looked)

    def _wait(self, watched: list[int]) -> None:
        """Wait until one of these descriptors can be read, or nobody waits for that any more."""
        while self._waiters and not self.loop.is_closed():
            if select.select(watched, [], [], LOOK_AGAIN)[0]:
                return

    def _unwatch(self) -> None:
        if self._looking is not None:
            self._state.wake()

    def _looked(self, looking: asyncio.Future[Any]) -> None:
        self._looking = None
        if not looking.cancelled():
            looking.exception()  # of a listener that was closed meanwhile: who waits is told by accept()
        if self._state.taker in (None, self._taker):  # else what wakes is another's by now
            self._state.drain_waker()
        self.wake()


class AsyncConnections(AsyncIterator[Connection]):
    """The Connections of a Listener, until stop() or close()."""

    def __init__(self, listener: socket.socket, acceptor: AsyncAcceptor) -> None:
        self.ended = False
        self._listener = listener
        self._acceptor = acceptor
        self._shortage = Shortage()

    async def __anext__(self) -> Connection:
        while True:
            closed = self._listener.fileno() == -1
            stopping = not closed and self._acceptor.look_for_stop()
            if self.ended or closed:
                self.ended = True
                raise StopAsyncIteration
            try:
                connection = self._acceptor.take_now()
            except OSError as error:
                seconds = self._shortage.pause_after(error)
                if seconds is None:
                    raise
                await self._acceptor.wait_for_resources(seconds)
                continue
            if connection is not None:
                self._shortage.over()
                return connection
            if not stopping:
                await self._acceptor.wait()


def async_acceptor(
    listener: socket.socket, state: State, known: MutableMapping[int, AsyncAcceptor]
) -> AsyncAcceptor:
    """A listener's AsyncAcceptor on the loop that runs; it is known while somebody waits or iterates."""
    loop = asyncio.get_running_loop()
    acceptor = known.get(id(loop))  # which it holds
    if acceptor is None:
        acceptor = (ThreadedAsyncAcceptor if isinstance(loop, _Proactor) else AsyncAcceptor)(listener, state)
        known[id(loop)] = acceptor
    return acceptor
