"""The worker processes of a parent: begun, heard, asked to go, and waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from fastlisten._core.admission import process_ended
from fastlisten._events import Events
from fastlisten._listener import ServeResult
from fastlisten._options import Checked
from fastlisten._workers.child import EMPTIED
from fastlisten._workers.memory import CUT, FINISHED, PAUSED, Memory, Slot
from fastlisten._workers.process import Handle, Place, Process
from fastlisten._workers.sockets import Members

# What a worker gets beyond its drain, to end in, before it is killed.
GRACE = 1.0  # seconds


Channel = tuple[socket.socket, socket.socket]
"""The parent's end of a worker's status, and the worker's."""

Close = Callable[[], None]
"""Closes in a fork what is the parent's alone."""

# Where the system does not tell of an end, a process whose channel has ended is looked at until it has, too.
TELLS_OF_ENDS = hasattr(signal, "SIGCHLD")
LOOK_FOR_END = 0.01  # seconds


class Starter(Protocol):
    """How worker processes begin."""

    counts: bool  # they write their counters, say when they are ready, and help
    spare: int  # how many listeners there are beside one a worker
    named: bool  # the memory needs something that stands for it

    def serves(self, endpoints: Sequence[Members], memory: Memory) -> None: ...

    def start(self, number: int, place: int, slot: Slot, channel: Channel, close: Close) -> Handle: ...
    def ended(self, slot: Slot) -> None: ...
    def close(self) -> None: ...


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
        self.leaving = False  # it will end soon, and nobody is to be sent here any more
        self.ending = False  # nobody begins any more
        self.pausing = False  # others are told so, and it will pause soon, or has
        self.paused = False
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

    def pause(self, paused: bool) -> None:
        """Have all take no new clients, those that are to begin, too; or have them go on."""
        self.paused = paused
        for process in self.processes.values():
            process.slot.numbers[PAUSED] = paused
            process.handle.look()

    def begin(self, place: Place, member: int, known: int, supervisor: Supervisor) -> Process:
        """Begin a process at a place: it becomes `current`, or `next` where one serves.  Raises OSError.

        member: which listeners are its own.  known: it has those of so many places.
        """
        try:
            slot = self._memory.take()
        except IndexError:
            raise OSError("too many of them have not ended yet") from None
        slot.numbers[PAUSED] = self.paused
        try:
            ours, theirs = socket.socketpair()
        except BaseException:
            self._memory.give_back(slot)
            raise

        def close() -> None:
            self._events.close()
            ours.close()
            for process in self.processes.values():
                process.close()

        try:
            handle = self._starter.start(place.number, member, slot, (ours, theirs), close)
        except BaseException:
            ours.close()
            self._memory.give_back(slot)
            raise
        finally:
            theirs.close()
        process = Process(place, member, slot, known, self._starter.counts, handle, ours)
        if place.current is None:
            place.current = process
        else:
            place.next = process
        place.starts += 1
        self.processes[process.pid] = process
        self._events.hear(ours, lambda: self._told(process, supervisor))
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # then SIGCHLD tells
                process.pidfd = os.pidfd_open(process.pid)
                self._events.hear(process.pidfd, lambda: self.reap(supervisor))
        return process

    def _told(self, process: Process, supervisor: Supervisor) -> None:
        """A worker says that it is ready, or takes nobody more; or the channel has ended, with it."""
        status = process.status
        if status is None:
            return  # it was waited for just now
        try:
            told = status.recv(1)
        except ConnectionError:
            told = b""
        if not told:
            self._events.forget(status)
            status.close()
            process.status = None
        elif told == EMPTIED:
            process.emptied = True
        elif not process.asked:
            supervisor.ready(process)

    def due(self) -> Iterator[float]:
        """When somebody is to be looked at."""
        for place in self.places:
            if place.start_at is not None and not self.ending:
                yield place.start_at
        for process in self.processes.values():
            if process.status is None and not TELLS_OF_ENDS:
                yield time.monotonic() + LOOK_FOR_END
            if process.kill_at is not None:
                yield process.kill_at
            elif not process.ready and not process.asked:
                yield process.began + self.options.ready_timeout

    def look(self, now: float, supervisor: Supervisor) -> None:
        """Kill those that have not ended, or are not ready, in their time."""
        if not TELLS_OF_ENDS:
            self.reap(supervisor)
        for process in list(self.processes.values()):
            if process.kill_at is not None and process.kill_at <= now:
                process.kill_at = None
                supervisor.killed(process)
                process.handle.kill()
            elif (
                not process.ready and not process.asked and now >= process.began + self.options.ready_timeout
            ):
                process.asked, process.kill_at = True, None
                process.handle.kill()
                supervisor.late(process)

    def ask(self, process: Process, drain: float | None = None) -> None:
        """Ask a worker to go; after its drain it is killed."""
        drain = float(self.options.drain if drain is None else drain)
        process.asked = True
        process.kill_at = time.monotonic() + drain + GRACE
        # one that has just begun may have no handlers for "now" yet
        process.handle.stop(now=drain == 0 and process.ready)

    def reap(self, supervisor: Supervisor) -> None:
        """Wait for those that have ended; as PID 1 for whoever else has, too."""
        for process in list(self.processes.values()):
            code = process.handle.poll()
            if code is not None:
                del self.processes[process.pid]
                self._ended(process)
                supervisor.ended(process, code)
        if os.getpid() == 1:
            self._reap_orphans()

    def _reap_orphans(self) -> None:
        """Wait for those that are not ours, up to one of ours that has just ended: we are to hear of it."""
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in self.processes:
                    return
                os.waitpid(ended.si_pid, 0)

    def _ended(self, process: Process) -> None:
        for one in (process.status, process.pidfd):
            if one is not None:
                self._events.forget(one)
        process.close()
        finished, cut = process.slot.numbers[FINISHED], process.slot.numbers[CUT]
        self.result = ServeResult(self.result.finished + finished, self.result.cut + cut)
        self._gone(process)
        process_ended(process.pid)
        self._starter.ended(process.slot)
        if not process.counts:
            process.handle.kill()  # what it has started would hold the listeners
        self._memory.give_back(process.slot)

    def end_all(self) -> None:
        """Leave no process."""
        for process in self.processes.values():
            process.handle.kill()
        for process in self.processes.values():
            process.handle.wait()
            process.close()
        self.processes.clear()
