"""The worker processes of a parent: begun, heard, asked to go, and waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from fastlisten._listener import ServeResult
from fastlisten._options import Checked
from fastlisten._workers.events import Events
from fastlisten._workers.memory import CUT, FINISHED, Memory, Slot
from fastlisten._workers.process import Place, Process

# What a worker gets beyond its drain, to end in, before it is killed.
GRACE = 1.0  # seconds


class Starter(Protocol):
    """How worker processes begin."""

    counts: bool  # they write their counters, say when they are ready, and help
    spare: int  # how many listeners there are beside one a worker

    def start(self, number: int, place: int, slot: Slot, status: int, close: Callable[[], None]) -> int: ...
    def ended(self, slot: Slot) -> None: ...


class Supervisor(Protocol):
    """Decides what follows."""

    def ready(self, process: Process) -> None: ...
    def late(self, process: Process) -> None: ...
    def ended(self, process: Process, code: int) -> None: ...
    def killed(self, process: Process) -> None: ...


class Pool:
    """The processes that there are, and the place of each.

    options: WorkerOptions, checked.  gone: called with a process that has ended, before its slot is another
    process's.
    """

    def __init__(
        self,
        starter: Starter,
        memory: Memory,
        options: Checked,
        events: Events,
        gone: Callable[[Process], None],
    ) -> None:
        self.places = [Place(number) for number in range(options.workers)]
        self.processes: dict[int, Process] = {}
        self.options = options
        self.ending = False  # nobody begins any more
        self.result = ServeResult(0, 0)  # of all that have ended
        self._starter = starter
        self._memory = memory
        self._events = events
        self._gone = gone

    def serving(self) -> Iterator[Process]:
        """The processes that take new clients."""
        for place in self.places:
            if place.current is not None and place.current.ready and not place.current.asked:
                yield place.current

    def begin(self, place: Place, member: int, known: int, supervisor: Supervisor) -> Process:
        """Begin a process at a place: it becomes `current`, or `next` where one serves.  Raises OSError.

        member: which listeners are its own.  known: it has those of so many places.
        """
        try:
            slot = self._memory.take()
        except IndexError:
            raise OSError("too many of them have not ended yet") from None
        try:
            reader, writer = os.pipe()
        except BaseException:
            self._memory.give_back(slot)
            raise
        process = Process(place, member, slot, known, self._starter.counts, reader)

        def close() -> None:
            self._events.close()
            for one in (process, *self.processes.values()):
                one.close()

        try:
            process.pid = self._starter.start(place.number, member, slot, writer, close)
        except BaseException:
            process.close()
            self._memory.give_back(slot)
            raise
        finally:
            os.close(writer)
        if place.current is None:
            place.current = process
        else:
            place.next = process
        self.processes[process.pid] = process
        self._events.hear(reader, lambda: self._told(process, supervisor))
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # then SIGCHLD tells
                process.pidfd = os.pidfd_open(process.pid)
                self._events.hear(process.pidfd, lambda: self.reap(supervisor))
        return process

    def _told(self, process: Process, supervisor: Supervisor) -> None:
        """A worker says that it is ready; or its pipe has ended, with it."""
        if process.status is None:
            return  # it was waited for just now
        if not os.read(process.status, 1):
            self._events.forget(process.status)
            os.close(process.status)
            process.status = None
        elif not process.asked:
            supervisor.ready(process)

    def due(self) -> Iterator[float]:
        """When somebody is to be looked at."""
        for place in self.places:
            if place.start_at is not None and not self.ending:
                yield place.start_at
        for process in self.processes.values():
            if process.kill_at is not None:
                yield process.kill_at
            elif not process.ready and not process.asked:
                yield process.began + self.options.ready_timeout

    def look(self, now: float, supervisor: Supervisor) -> None:
        """Kill those that have not ended, or are not ready, in their time."""
        for process in list(self.processes.values()):
            if process.kill_at is not None and process.kill_at <= now:
                process.kill_at = None
                supervisor.killed(process)
                process.signal(signal.SIGKILL)
            elif (
                not process.ready and not process.asked and now >= process.began + self.options.ready_timeout
            ):
                process.asked, process.kill_at = True, None
                process.signal(signal.SIGKILL)
                supervisor.late(process)

    def ask(self, process: Process, drain: float | None = None) -> None:
        """Ask a worker to go; after its drain it is killed."""
        drain = float(self.options.drain if drain is None else drain)
        process.asked = True
        process.kill_at = time.monotonic() + drain + GRACE
        if drain or not process.ready:  # one that has just begun may have no handlers yet
            process.signal(signal.SIGTERM)
        else:
            process.signal(signal.SIGQUIT if process.counts else signal.SIGKILL)

    def reap(self, supervisor: Supervisor) -> None:
        """Wait for those that have ended; as PID 1 for whoever else has, too."""
        for pid in [-1] if os.getpid() == 1 else list(self.processes):
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    process = self.processes.pop(ended[0], None)
                    if process is not None:
                        self._ended(process)
                        supervisor.ended(process, os.waitstatus_to_exitcode(ended[1]))

    def _ended(self, process: Process) -> None:
        for descriptor in (process.status, process.pidfd):
            if descriptor is not None:
                self._events.forget(descriptor)
        process.close()
        finished, cut = process.slot.numbers[FINISHED], process.slot.numbers[CUT]
        self.result = ServeResult(self.result.finished + finished, self.result.cut + cut)
        self._gone(process)
        self._starter.ended(process.slot)
        if not process.counts:
            process.signal(signal.SIGKILL)  # what it has started would hold the listeners
        self._memory.give_back(process.slot)

    def end_all(self) -> None:
        """Leave no process."""
        for process in self.processes.values():
            process.signal(signal.SIGKILL)
        for process in self.processes.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, 0)
            process.close()
        self.processes.clear()
