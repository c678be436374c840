"""A worker process, and the place among the workers that it has."""

from __future__ import annotations

import contextlib
import os
import time

from fastlisten._workers.memory import Slot


class Process:
    """One worker process, until it was waited for.

    member: which listeners are its own.  known: it has those of so many places.  counts: it writes its
    counters, and helps.  status: our end of its pipe, which close() closes.
    """

    def __init__(self, place: Place, member: int, slot: Slot, known: int, counts: bool, status: int) -> None:
        self.counts = counts
        self.place = place
        self.member = member
        self.slot = slot
        self.known = known
        self.pid = 0
        self.pidfd: int | None = None
        self.status: int | None = status
        self.began = time.monotonic()
        self.ready = False
        self.asked = False  # to go
        self.kill_at: float | None = None

    def __str__(self) -> str:
        return f"worker {self.place.number} (process {self.pid})"

    def signal(self, number: int) -> None:
        """Send it a signal; it was not waited for, so that the number is still its own.

        A program may have started others: all of its group get it.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.counts:
                os.kill(self.pid, number)
            else:
                os.killpg(self.pid, number)

    def close(self) -> None:
        """Close what stands for it here."""
        for descriptor in (self.status, self.pidfd):
            if descriptor is not None:
                os.close(descriptor)
        self.status = self.pidfd = None


class Place:
    """One of the workers, whichever process it is just now."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.member = number  # which listeners are its own; a program that replaces another gets others
        self.current: Process | None = None  # serves, or is to
        self.next: Process | None = None  # is to take its place, and is not ready yet
        self.failures = 0  # in a row
        self.start_at: float | None = 0.0
