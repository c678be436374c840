"""How a worker process begins: as a fork of its parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from fastlisten._notify import VARIABLES
from fastlisten._workers.child import Target, Worker
from fastlisten._workers.memory import Memory, Slot
from fastlisten._workers.pool import Channel, Close
from fastlisten._workers.process import Child
from fastlisten._workers.sockets import Members

_ALL = signal.valid_signals() if hasattr(signal, "valid_signals") else set()


def can_fork() -> bool:
    """Whether this process has no other thread, so that a fork of it is whole; fork(2)."""
    if not hasattr(os, "fork"):
        return False
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return threading.active_count() == 1


def fork(child: Callable[[], int]) -> int:
    """Fork; the child calls `child` and exits with what that returns.  Returns the child's process ID.

    No signal is handled in the child before `child` allows that: the handlers are the parent's.
    """
    sys.stdout.flush()  # or what is in the buffers would be written twice
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)
    try:
        pid = os.fork()
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    if pid == 0:
        status = 1
        try:
            status = child()
        finally:
            os._exit(status)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def spawn(command: list[str], environment: Mapping[str, str], descriptors: Sequence[int]) -> int:
    """Begin an interpreter that inherits these, under the same numbers; returns its process ID.

    No signal is blocked or handled there.  Raises OSError.
    """
    return os.posix_spawn(
        sys.executable,
        command,
        environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, number, number) for number in descriptors],
        setsigmask=(),
        setsigdef=[number for number in _ALL if callable(signal.getsignal(number))],
    )


def forget_signals() -> None:
    """In a child: have the signals' defaults in the place of the parent's handlers, and hear them."""
    signal.set_wakeup_fd(-1)
    for number in _ALL:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


class Forked:
    """Workers that are forks of the parent, and so have its modules and the target as they are."""

    counts = True
    spare = 0
    named = False

    def __init__(self, target: Target, drain: float) -> None:
        self._target = target
        self._drain = drain
        self._endpoints: Sequence[Members] = ()

    def serves(self, endpoints: Sequence[Members], memory: Memory) -> None:
        """What the workers get."""
        self._endpoints = endpoints

    def start(self, number: int, place: int, slot: Slot, channel: Channel, close: Close) -> Child:
        """Begin a worker process."""
        parent = os.getpid()

        def child() -> int:
            worker = Worker(number, slot, channel[1], parent, self._drain)
            close()
            forget_signals()
            for name in VARIABLES:  # the parent alone speaks for the service
                os.environ.pop(name, None)
            members = [members.listeners for members in self._endpoints]
            return worker.become(members, place, self._target)

        return Child(fork(child))

    def ended(self, slot: Slot) -> None:
        """The process with this slot has ended."""

    def close(self) -> None:
        """Nothing was made."""
