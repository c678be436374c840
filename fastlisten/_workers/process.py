"""A worker process, and the place among the workers that it has."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from typing import Protocol

from fastlisten._workers.memory import Slot


class Handle(Protocol):
    """What stands for a process that we have begun."""

    @property
    def pid(self) -> int: ...
    def stop(self, now: bool) -> None: ...
    def look(self) -> None: ...
    def kill(self) -> None: ...
    def poll(self) -> int | None: ...
    def wait(self) -> object: ...


class Child:
    """A process of POSIX; until it was waited for its number is its own.

    group: it may have started others, and all of its group get what it gets.
    """

    def __init__(self, pid: int, group: bool = False) -> None:
        self.pid = pid
        self._group = group

    def stop(self, now: bool) -> None:
        """Ask it to end: SIGTERM with a drain; now: SIGQUIT, which programs do not know: SIGKILL."""
        if now:
            self._signal(signal.SIGKILL if self._group else signal.SIGQUIT)
        else:
            self._signal(signal.SIGTERM)

    def look(self) -> None:
        """Have it see what was written for it."""
        self._signal(signal.SIGURG)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """How it has ended, with the number of a signal below 0; None: it has not."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # somebody else has waited for it
            return 0
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self) -> None:
        """Wait until it has ended."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if self._group else os.kill)(self.pid, number)


class Process:
    """One worker process, until it was waited for.

    member: which listeners are its own.  known: it has those of so many places.  counts: it writes its
    counters, and helps.  handle: for the system's process.  status: our end of the channel to it, which
    close() closes.
    """

    def __init__(
        self,
        place: Place,
        member: int,
        slot: Slot,
        known: int,
        counts: bool,
        handle: Handle,
        status: socket.socket,
    ) -> None:
        self.counts = counts
        self.place = place
        self.member = member
        self.slot = slot
        self.known = known
        self.handle = handle
        self.pidfd: int | None = None
        self.status: socket.socket | None = status
        self.began = time.monotonic()
        self.ready = False
        self.asked = False  # to go
        self.emptied = False  # its queues, after that
        self.kill_at: float | None = None

    def __str__(self) -> str:
        return f"worker {self.place.number} (process {self.pid})"

    @property
    def pid(self) -> int:
        """Its number, which is its own until it was waited for."""
        return self.handle.pid

    def close(self) -> None:
        """Close what stands for it here."""
        if self.status is not None:
            self.status.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
        self.status = self.pidfd = None


class Place:
    """One of the workers, whichever process it is just now."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.member = number  # which listeners are its own; a program that replaces another gets others
        self.current: Process | None = None  # serves, or is to
        self.next: Process | None = None  # is to take its place, and is not ready yet
        self.starts = 0  # of processes, so far
        self.failures = 0  # in a row
        self.start_at: float | None = 0.0
