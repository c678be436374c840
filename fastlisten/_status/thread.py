"""The status port of a process without workers: a thread of its own."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence

from fastlisten._endpoint import Endpoint
from fastlisten._events import Events
from fastlisten._listener import Listener
from fastlisten._status.control import Control
from fastlisten._status.server import StatusServer
from fastlisten._status.service import DRAINING, PAUSED, SERVING, STARTING, counts, load, share


class Served:
    """The listeners of one serve() as a Service.

    leaving: it is about to drain, and nobody is to be sent here any more.  pausing: about to pause.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self.leaving = self.pausing = False

    def state(self) -> str:
        states = [listener._state for listener in self._listeners]
        if self.leaving or any(state.stopping for state in states):
            return DRAINING
        if any(state.taker is None for state in states):
            return STARTING
        return PAUSED if self.pausing or all(state.paused for state in states) else SERVING

    def counts(self) -> tuple[int, int, int]:
        active, handled, refused = zip(*(counts(one.stats()) for one in self._listeners), strict=True)
        return sum(active), sum(handled), sum(refused)

    def present(self) -> float:
        return 1.0

    def free(self) -> float:
        stats = [listener.stats() for listener in self._listeners]
        whole = sum(one.capacity for one in stats)
        if whole:
            return share(whole - sum(map(load, stats)), whole)
        limits = [one.queue_limit or 0 for one in stats]
        return share(sum(limits) - sum(one.queue_depth or 0 for one in stats), sum(limits))

    def sources(self) -> Sequence[Listener]:
        return self._listeners


class StatusThread:
    """Answers at a listener about others, in a thread, while the block runs; the listener is closed then.

    listeners: of one serve(), which is to come.
    """

    def __init__(self, listener: Listener, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self._service = Served(listeners)
        self._listener = listener
        self._server = StatusServer(listener, self._service)
        self._over = False
        self._then: Callable[[], object] | None = None
        self._at = self._pause_at = math.inf  # when that is to be called, and the listeners paused

    def __enter__(self) -> StatusThread:
        with contextlib.ExitStack() as undo:
            undo.callback(self._listener.close)
            self._events = Events()
            undo.callback(self._events.close)
            self._server.open(self._events)
            # A daemon, because Ctrl-C can come between its start and the block that would end it.
            self._thread = threading.Thread(target=self._run, name="status", daemon=True)
            self._thread.start()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._events.wake()
        self._thread.join()
        self._events.close()

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers."""
        return self._listener.endpoint

    def leave(self, seconds: float = 0.0, then: Callable[[], object] | None = None) -> None:
        """Tell whoever asks from now on that the service is draining, and call `then` after so many seconds.

        For signal handlers, too: it takes no lock.
        """
        self._service.leaving = True
        if then is not None:
            self._at, self._then = time.monotonic() + seconds, then
            self._events.wake()

    def obey(self, control: Control) -> None:
        """Have it do what is asked by POST from now on."""
        self._server.control = control

    def state(self) -> str:
        """As the service has it."""
        return self._service.state()

    def pause(self, seconds: float) -> None:
        """Tell whoever asks from now on that the service is paused, and pause it after so many seconds.

        For the control of this thread's own port, as is resume().
        """
        self._service.pausing = True
        self._pause_at = time.monotonic() + seconds

    def resume(self) -> None:
        """End a pause, or one that is to come."""
        self._service.pausing, self._pause_at = False, math.inf
        for listener in self._listeners:
            listener.resume()

    def stay(self) -> None:
        """Do not call what leave() was given any more; for signal handlers, too."""
        self._then = None

    def _run(self) -> None:
        while not self._over:
            due = min(self._server.due(), self._at, self._pause_at)
            self._events.wait(None if due == math.inf else max(due - time.monotonic(), 0.0))
            now = time.monotonic()
            self._server.look(now)
            if now >= self._pause_at:
                self._pause_at = math.inf
                for listener in self._listeners:
                    listener.pause()
            if now >= self._at:
                self._at, then = math.inf, self._then
                if then is not None:
                    then()
