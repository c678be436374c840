"""What the parent of workers and a status port wait for: descriptors, signals, and times."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Act = Callable[[], object]


class Events:
    """Calls what belongs to a descriptor when it can be read, and to a signal when it has come."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wakeups = socket.socketpair()
        for end in self._wakeups:
            end.setblocking(False)
        self._actions: Mapping[int, Act] = {}
        self._owned: list[Act] = []
        self.hear(self._wakeups[0], self._signals_came)

    def hear(self, file: Any, act: Act) -> None:
        """Call `act` from now on when this can be read: a descriptor, or what has one."""
        self._selector.register(file, selectors.EVENT_READ, act)

    def hear_again(self, file: Any, act: Act, writable: bool = False) -> None:
        """Call this one from now on instead; writable: when it can be written to, and not when it can be
        read."""
        self._selector.modify(file, selectors.EVENT_WRITE if writable else selectors.EVENT_READ, act)

    def owns(self, close: Act) -> None:
        """Have this called by close()."""
        self._owned.append(close)

    def wake(self) -> None:
        """Have wait() return; any thread and any signal handler may call it."""
        with contextlib.suppress(BlockingIOError):  # it is about to
            self._wakeups[1].send(b"\0")

    def forget(self, file: Any) -> None:
        """Do so no longer."""
        self._selector.unregister(file)

    def fileno(self) -> int:
        """A descriptor that can be read when something has come; of the systems that have epoll or kqueue."""
        selector: Any = self._selector
        number: int = selector.fileno()
        return number

    def wait(self, seconds: float | None) -> None:
        """Wait until something has come, and call what belongs to it; None: without end."""
        for key, _ in self._selector.select(seconds):
            key.data()

    @contextlib.contextmanager
    def signals(self, actions: Mapping[int, Act]) -> Iterator[None]:
        """Hear these signals while the block runs.  For the main thread."""
        self._actions = actions
        writer = self._wakeups[1].fileno()
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # first: none is missed
        before = {number: signal.signal(number, _heard) for number in actions}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)

    def _signals_came(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._wakeups[0].recv(4096):
                if number in self._actions:
                    self._actions[number]()

    def close(self) -> None:
        """Wait for nothing more; in a fork, too, where the parent's goes on."""
        self._selector.close()
        for close in self._owned:
            close()
        for end in self._wakeups:
            end.close()


def _heard(*_: object) -> None:
    """The number comes through the wake-up descriptor."""


class Tick:
    """Something to be done every so many seconds."""

    def __init__(self, every: float, act: Act) -> None:
        self.every = every
        self.act = act
        self.due = time.monotonic() + every

    def run(self, now: float) -> None:
        """Do it if it is due."""
        if now >= self.due:
            self.due = now + self.every
            self.act()
