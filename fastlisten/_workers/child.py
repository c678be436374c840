"""The worker's side: what it is told, and what it tells its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from types import CoroutineType
from typing import Any

from fastlisten._core.processes import end_with_parent
from fastlisten._core.state import State
from fastlisten._listener import Listener, ServeResult
from fastlisten._workers.memory import CUT, FINISHED, HELP, PAUSED, Slot

Target = Callable[..., object]

# What the parent says by the channel, where it cannot send signals: end with the drain, end now, and see what
# was written for this worker.
DRAIN, NOW, LOOK = b"d", b"n", b"l"

# What a worker says by it: it serves, and a stop has emptied all its queues.
READY, EMPTIED = b"r", b"e"

# This process as a worker; set once, in a process that has just begun.
_this: list[Worker] = []


def worker() -> Worker | None:
    """This process as one of fastlisten's workers; None when it is none.

    >>> import fastlisten
    >>> print(fastlisten.worker())
    None
    """
    return _this[0] if _this else None


class Worker:
    """A worker process, as it sees itself; worker() gives it.

    number: which of the workers this is, from 0 on; the one that replaces it has the same.
    stopping: whether the parent has asked it to end.

    >>> import fastlisten
    >>> worker = fastlisten.worker()
    >>> if worker is not None and not worker.stopping:
    ...     worker.ready()
    """

    def __init__(self, number: int, slot: Slot, status: socket.socket, parent: int, drain: float) -> None:
        self.number = number
        self.stopping = False
        self._slot = slot
        self._status = status  # the channel to the parent
        self._parent = parent
        self._drain = drain
        self._ready = self._paused = False
        self._listeners: list[Listener] = []
        self._members: list[list[Listener]] = []
        self._waiting = 0
        self._queued: set[Listener] = set()  # from which clients are taken yet
        self._when_stopping: Callable[[float], object] | None = None

    def __repr__(self) -> str:
        return f"<Worker {self.number}>"

    def ready(self) -> None:
        """Tell the parent that this worker serves: the one that it replaces is asked to go now.

        It is told by itself when all the worker's listeners are served.
        """
        if not self._ready:
            self._ready = True
            with contextlib.suppress(OSError):  # there is no parent any more, and we are about to end
                self._status.send(READY)

    # --- what the parent does with it -----------------------------------------------------------------

    def become(self, members: list[list[Listener]], place: int, target: Target) -> int:
        """Be this worker until the target ends; returns the exit status.

        members: for each endpoint all its listeners.  place: which of them is this worker's.
        """
        _this.append(self)
        self._members = members
        for endpoint, listeners in enumerate(members):
            listener = listeners[place if place < len(listeners) else 0]
            listener._state = State(listener, self._slot.map, self._slot.offsets[endpoint])
            listener._state.when_taken = self._served
            listener._state.when_emptied = partial(self._emptied, listener)
            self._listeners.append(listener)
        self._waiting = len(members)
        self._queued.update(self._listeners)
        self._hear_signals()
        self._pause()  # it was asked before this process was there
        self._live_with_parent()
        try:
            result = target(*self._listeners)
            if isinstance(result, CoroutineType):
                result = self._run_async(result)
            if isinstance(result, ServeResult):
                self._slot.numbers[FINISHED], self._slot.numbers[CUT] = result
            return 0
        except SystemExit as end:
            if isinstance(end.code, int) or end.code is None:
                return end.code or 0
            print(end.code, file=sys.stderr)
            return 1
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            with contextlib.suppress(Exception):  # threads that are no daemons end first, as everywhere
                threading._shutdown()  # type: ignore[attr-defined]
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()

    def _live_with_parent(self) -> None:
        """End when the parent does, however that ends."""
        try:
            if end_with_parent(self._parent):
                return
        except ProcessLookupError:
            os._exit(1)
        threading.Thread(target=self._hear_parent, daemon=True).start()

    def _hear_parent(self) -> None:
        """Where the system does not end us, the end of the channel tells; where it has no signals, the parent
        asks us by it to end, too."""
        with contextlib.suppress(OSError):
            while asked := self._status.recv(1):
                if asked == LOOK:
                    self._pause()
                else:
                    self._stop(0.0 if asked == NOW else self._drain)
        os._exit(1)

    def _served(self) -> None:
        """One more of the listeners is served."""
        self._waiting -= 1
        if self._waiting == 0:
            self.ready()

    def _emptied(self, listener: Listener) -> None:
        """A stop has emptied one of the queues.  If it is the parent's, nobody is to wait behind the last of
        them: with our copies closed it is the parent's to end that, when this worker has no successor."""
        if self.stopping:
            self._queued.discard(listener)
        if not self._queued:
            for listeners in self._members:
                for listener in listeners:
                    listener._close_early()
            with contextlib.suppress(OSError):
                self._status.send(EMPTIED)

    def _hear_signals(self) -> None:
        heard: dict[str, Any] = {
            "SIGTERM": lambda *_: self._stop(self._drain),
            "SIGQUIT": lambda *_: self._stop(0.0),
            "SIGURG": self._asked,
        }
        # Those of the terminal's keys go to all its processes, and are the parent's.
        ignored = ("SIGINT", "SIGBREAK", "SIGHUP", "SIGUSR2", "SIGTTIN", "SIGTTOU")
        for name, handler in (*heard.items(), *((name, signal.SIG_IGN) for name in ignored)):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), handler)

    def _stop(self, drain: float) -> None:
        """End with this drain."""
        self.stopping = True
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.stop(drain)
        if self._when_stopping is not None:
            self._when_stopping(drain)

    def _asked(self, *_: object) -> None:
        """SIGURG: the parent has written what this worker is to do."""
        self._pause()
        self._help()

    def _pause(self) -> None:
        """Pause, or go on, if the parent has changed that; what the target does is its own."""
        paused = bool(self._slot.numbers[PAUSED])
        if paused != self._paused:
            self._paused = paused
            for listener in self._listeners:
                listener._state.paused = paused

    def _help(self) -> None:
        """A worker does not take the clients that are queued for it, and we have nothing to do."""
        for endpoint, listener in enumerate(self._listeners):
            place, self._slot.numbers[HELP + endpoint] = self._slot.numbers[HELP + endpoint] - 1, 0
            taker = listener._state.taker
            if place >= 0 and taker is not None and place < len(self._members[endpoint]):
                taker.help(listener._state, self._members[endpoint][place])

    # --- coroutines -----------------------------------------------------------------------------------

    def _run_async(self, coroutine: CoroutineType[Any, Any, object]) -> object:
        """Run the coroutine that the target is on an EventLoop; a stop closes its servers with the drain."""
        import asyncio  # it is much to import, and only for who has one

        from fastlisten import aio

        with asyncio.Runner(loop_factory=aio.new_event_loop) as runner:
            return runner.run(self._main(coroutine))

    async def _main(self, coroutine: CoroutineType[Any, Any, object]) -> object:
        import asyncio

        loop = asyncio.get_running_loop()
        task = loop.create_task(coroutine)

        def stop(drain: float) -> None:
            # the servers end in this time, and whatever waits for something else is cancelled after it
            loop.call_soon_threadsafe(lambda: loop.call_later(drain, task.cancel))

        self._when_stopping = stop
        if self.stopping:
            stop(self._drain)
        try:
            return await task
        except asyncio.CancelledError:
            if not self.stopping:
                raise
            return None
