"""The parent: it starts the workers, replaces those that end, and serves no client itself."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from fastlisten._listener import ServeResult
from fastlisten._workers.handover import Inheritance, Successor
from fastlisten._workers.memory import CUT, FINISHED, Memory, Slot
from fastlisten._workers.newcomers import LOOK_AT_PROGRAMS, Newcomers
from fastlisten._workers.process import Place, Process
from fastlisten._workers.relief import Relief
from fastlisten._workers.sockets import Members

_log = logging.getLogger("fastlisten")

# A worker that has served for less than this has died at once, and is started again after FIRST_DELAY
# seconds, then after twice as long each time, up to LAST_DELAY.
LIVED = 1.0  # seconds
FIRST_AGAIN = 0.1
LAST_AGAIN = 10.0

# What a worker gets beyond its drain, to end in, before it is killed.
GRACE = 1.0  # seconds


class Starter(Protocol):
    """How worker processes begin."""

    counts: bool  # they write their counters, say when they are ready, and help

    def ended(self, slot: Slot) -> None: ...

    def start(self, number: int, place: int, slot: Slot, status: int, close: Callable[[], None]) -> int: ...


class Parent:
    """Runs worker processes on these listeners until it is told to stop.

    endpoints: the listeners of each; the caller closes them.  starter: how a worker begins.  memory: what
    they write.  count: how many workers.  drain, ready_timeout: seconds.  tell(event, text, **values): gets
    what happens.
    """

    def __init__(
        self,
        endpoints: Sequence[Members],
        starter: Starter,
        memory: Memory,
        count: int,
        drain: float,
        ready_timeout: float,
        tell: Callable[..., None],
    ) -> None:
        self.endpoints = endpoints
        self.places = [Place(number) for number in range(count)]
        self.processes: dict[int, Process] = {}
        self.tell = tell
        self.drain = drain
        self.spare = 0  # listeners that no worker has
        self.names: Sequence[str] = ()  # of the endpoints, for who takes them over
        self.inheritance: Inheritance | None = None  # of a parent that is to go when all workers serve
        self.defers = False  # clients are queued when they have said something
        self.ending = False
        self.finished = self.cut = 0
        self.ticks: list[Tick] = []
        self._starter = starter
        self._memory = memory
        self._ready_timeout = ready_timeout
        self._rolling: deque[Place] = deque()
        self._served = False
        self._relief = Relief(endpoints, self.serving, self.steer)
        self._newcomers = None if starter.counts else Newcomers(self, starter)
        self._selector = selectors.DefaultSelector()
        self._wakeups = socket.socketpair()
        self._successor: Successor | None = None
        self._hand_over_until = 0.0
        self._begun: list[int] = []  # successors that may have to be waited for
        self._watching = False  # the listeners, for a client to come

    # --- the loop -------------------------------------------------------------------------------------

    def run(self) -> ServeResult:
        """Serve until a signal ends it and all workers have ended; returns what the drain did.

        For the main thread.  Whatever comes out, no worker is left.
        """
        with self._signals():
            try:
                self._look_after()
                while self.processes or not self.ending:
                    for key, _ in self._selector.select(self._wait()):
                        key.data()
                    self._look_after()
            finally:
                self._end_all()
        return ServeResult(self.finished, self.cut)

    def _wait(self) -> float | None:
        """Look at the queues until something else is to be done; returns how long to wait for that."""
        seconds = self._patience()
        if self.ending or self._relief.asleep:
            return seconds
        # What the selector waits with is a descriptor itself, where there are queues to look at.
        wakeup: Any = self._selector
        self._relief.wait(wakeup.fileno(), math.inf if seconds is None else seconds)
        return 0.0

    def _patience(self) -> float | None:
        """How long nothing is to be done, in seconds."""
        times = [tick.due for tick in self.ticks]
        if self._successor is not None:
            times.append(self._hand_over_until)
        if self._newcomers is not None and self._newcomers.busy:
            times.append(time.monotonic() + LOOK_AT_PROGRAMS)
        for place in self.places:
            if place.start_at is not None and not self.ending:
                times.append(place.start_at)
        for process in self.processes.values():
            if process.kill_at is not None:
                times.append(process.kill_at)
            elif not process.ready and not process.asked:
                times.append(process.began + self._ready_timeout)
        return max(min(times) - time.monotonic(), 0.0) if times else None

    def _look_after(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        for place in self.places:
            if place.start_at is not None and place.start_at <= now and not self.ending:
                place.start_at = None
                self._start(place)
        for process in list(self.processes.values()):
            if process.kill_at is not None and process.kill_at <= now:
                process.kill_at = None
                self._log_killed(process)
                process.signal(signal.SIGKILL)
            elif not process.ready and not process.asked and process.began + self._ready_timeout <= now:
                process.asked, process.kill_at = True, None
                process.signal(signal.SIGKILL)
                self._not_ready(process)
        for tick in self.ticks:
            tick.run(now)
        self._look_for_successor(now)
        if self._newcomers is not None:
            self._newcomers.look(now)
        if not self.ending:
            self._relief.look(now)
            self._watch_listeners(self._relief.asleep)

    def _watch_listeners(self, watch: bool) -> None:
        """Hear of the next client, or no longer: while they come, each would wake the parent, too."""
        if watch == self._watching:
            return
        self._watching = watch
        for members in self.endpoints:
            for listener in () if members.shared else members.listeners:
                if watch:
                    self._selector.register(listener, selectors.EVENT_READ, self._client_came)
                else:
                    self._selector.unregister(listener)

    def _client_came(self) -> None:
        self._watch_listeners(False)
        self._relief.wake()

    # --- workers --------------------------------------------------------------------------------------

    def serving(self) -> Iterator[Process]:
        """The processes that take new clients."""
        for place in self.places:
            if place.current is not None and place.current.ready and not place.current.asked:
                yield place.current

    def _start(self, place: Place) -> None:
        """Begin a process at a place: it becomes `current`, or `next` where one serves."""
        try:
            slot = self._memory.take()
            reader, writer = os.pipe()
        except (OSError, IndexError) as error:
            self._failed(place, f"worker {place.number} cannot be started: {error}", 1.0)
            return
        known = min((len(members.listeners) for members in self.endpoints if not members.shared), default=0)
        member = place.member if self._newcomers is None else self._newcomers.member(place)
        process = Process(place, member, slot, known, self._starter.counts)
        process.status = reader

        def close() -> None:
            os.close(reader)
            self._close_in_child()

        try:
            process.pid = self._starter.start(place.number, process.member, slot, writer, close)
        except OSError as error:
            os.close(reader)
            self._memory.give_back(slot)
            self._failed(place, f"worker {place.number} cannot be started: {error}", 1.0)
            return
        finally:
            os.close(writer)
        if place.current is None:
            place.current = process
        else:
            place.next = process
        self.processes[process.pid] = process
        if self._newcomers is not None:
            self._newcomers.began(process)
        self._selector.register(reader, selectors.EVENT_READ, lambda: self._told(process))
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # then SIGCHLD tells
                process.pidfd = os.pidfd_open(process.pid)
                self._selector.register(process.pidfd, selectors.EVENT_READ, self._reap)
        self.tell(
            "starting",
            f"worker {place.number} is process {process.pid}",
            worker=place.number,
            pid=process.pid,
        )

    def _close_in_child(self) -> None:
        """Close what is the parent's alone."""
        self._selector.close()
        for end in self._wakeups:
            end.close()
        for process in self.processes.values():
            for descriptor in (process.status, process.pidfd):
                if descriptor is not None:
                    os.close(descriptor)

    def _told(self, process: Process) -> None:
        """A worker says that it is ready; or its pipe has ended, with it."""
        if process.status is None:
            return  # it was waited for just now
        text = os.read(process.status, 1)
        if not text:
            self._selector.unregister(process.status)
            os.close(process.status)
            process.status = None
        elif not process.asked:
            self.is_ready(process)

    def is_ready(self, process: Process) -> None:
        """A worker serves: the one before it is asked to go."""
        place = process.place
        if process.ready:
            return
        process.ready = True
        seconds = time.monotonic() - process.began
        self.tell(
            "ready",
            f"worker {place.number} (process {process.pid}) serves after {seconds:.2f} s",
            worker=place.number,
            pid=process.pid,
        )
        if place.next is process:
            before, place.current, place.next = place.current, process, None
            place.member = process.member
            self.steer()
            if before is not None:
                self._let_go(before)
        self._relief.replaced(process.member)
        self.steer()
        self._replace_next()
        if not self._served and all(place.current and place.current.ready for place in self.places):
            self._served = True
            self.all_ready()

    def all_ready(self) -> None:
        """All workers serve for the first time.  This is where a service manager is told."""
        self.tell("serving", "all workers serve", workers=len(self.places))
        if self.inheritance is not None:
            self.inheritance.serve()
            self.steer()

    def steer(self) -> None:
        """Have new clients go to those workers that serve, and are not stuck."""
        for number, members in enumerate(self.endpoints):
            serving = [process.member for process in self.serving()]
            good = [place for place in serving if not self._relief.stuck(number, place)]
            members.steer(sorted(good or serving))

    def _let_go(self, process: Process) -> None:
        """No new clients come to a worker any more: ask it to go, when it has taken those that have come."""
        if self._newcomers is None or not self._newcomers.leaves(process):
            self.ask(process)

    def ask(self, process: Process, drain: float | None = None) -> None:
        """Ask a worker to go; after its drain it is killed."""
        drain = self.drain if drain is None else drain
        process.asked = True
        process.kill_at = time.monotonic() + drain + GRACE
        if drain or not process.ready:  # one that has just begun may have no handlers yet
            process.signal(signal.SIGTERM)
        else:
            process.signal(signal.SIGQUIT if process.counts else signal.SIGKILL)

    def _reap(self) -> None:
        """Wait for those that have ended; as PID 1 for whoever else has, too."""
        everybody = os.getpid() == 1
        for pid in [-1] if everybody else [*self.processes, *self._begun]:
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    process = self.processes.pop(ended[0], None)
                    if process is None:
                        self._begun = [pid for pid in self._begun if pid != ended[0]]
                    else:
                        self._ended(process, os.waitstatus_to_exitcode(ended[1]))

    def _ended(self, process: Process, code: int) -> None:
        """A worker process has ended."""
        place = process.place
        for descriptor in (process.status, process.pidfd):
            if descriptor is not None:
                self._selector.unregister(descriptor)
                os.close(descriptor)
        process.status = process.pidfd = None
        self.finished += process.slot.numbers[FINISHED]
        self.cut += process.slot.numbers[CUT]
        self.gone(process)
        self._starter.ended(process.slot)
        if self._newcomers is not None:
            process.signal(signal.SIGKILL)  # what it has started would hold the listeners
            self._newcomers.ended(process)
        self._memory.give_back(process.slot)
        how = f"by signal {signal.strsignal(-code) or -code}" if code < 0 else f"with status {code}"
        name = f"worker {place.number} (process {process.pid})"
        values = {"worker": place.number, "pid": process.pid, "status": code}
        if place.next is process:
            place.next = None
        elif place.current is process:
            place.current = None
            self._relief.arrange()
            self.steer()
        expected = self.ending or process.asked or place not in self.places
        if expected:
            self.tell("ended", f"{name} ended {how}", **values)
        elif place.current is None and place.next is None:
            self._again(process, f"{name} ended {how}", values)
        elif place.current is not None:
            self._rolling.clear()
            self._warn("failed", f"{name} ended {how} before it was ready: the old one stays", **values)
        else:
            self._warn("ended", f"{name} ended {how}: the one that was to replace it goes on", **values)
        self._replace_next()

    def gone(self, process: Process) -> None:
        """A process has ended, and its slot will be another's: for who adds the counters up."""

    def _again(self, process: Process, text: str, values: dict[str, Any]) -> None:
        """Start a worker that has died again: at once, or later each time if it dies at once."""
        place, now = process.place, time.monotonic()
        if process.ready and now - process.began >= LIVED:
            place.failures, place.start_at = 0, now
            self._warn("restarted", f"{text}; started again", seconds=0.0, **values)
            return
        delay = min(FIRST_AGAIN * 2**place.failures, LAST_AGAIN)
        self._failed(place, text, delay, **values)

    def _failed(self, place: Place, text: str, delay: float, **values: Any) -> None:
        if place.current is not None:  # it was to replace this one
            self._rolling.clear()
            self._warn("failed", f"{text}: the old one stays", **values)
            return
        place.failures = min(place.failures + 1, 20)
        place.start_at = time.monotonic() + delay
        self._warn("restarted", f"{text}; started again in {delay:.1f} s", seconds=delay, **values)

    def _not_ready(self, process: Process) -> None:
        place = process.place
        text = (
            f"worker {place.number} (process {process.pid}) was not ready in {self._ready_timeout:g} s: "
            "it has neither served its listeners nor called worker().ready()"
        )
        if place.next is process:
            place.next = None
        else:
            place.current = None
        self._failed(place, text, min(FIRST_AGAIN * 2**place.failures, LAST_AGAIN), worker=place.number)

    def _log_killed(self, process: Process) -> None:
        text = f"worker {process.place.number} (process {process.pid}) has not ended in its time: killed"
        self._warn("killed", text, worker=process.place.number, pid=process.pid)

    def _warn(self, event: str, text: str, **values: Any) -> None:
        self.tell(event, text, warning=True, **values)

    # --- signals --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Hear the signals while the block runs."""
        reader, writer = self._wakeups
        reader.setblocking(False)
        writer.setblocking(False)
        self._selector.register(reader, selectors.EVENT_READ, self._hear)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)  # first: none is missed
        before = {number: signal.signal(number, _heard) for number in self._actions()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            self._selector.close()
            reader.close()
            writer.close()

    def _actions(self) -> dict[int, Callable[[], None]]:
        return {
            signal.SIGTERM: lambda: self.stop("SIGTERM"),
            signal.SIGINT: lambda: self.stop("SIGINT"),
            signal.SIGQUIT: lambda: self.stop("SIGQUIT", 0.0),
            signal.SIGHUP: self.replace,
            signal.SIGTTIN: self.add,
            signal.SIGTTOU: self.take_away,
            signal.SIGUSR2: self.hand_over,
            signal.SIGCHLD: self._reap,
        }

    def _hear(self) -> None:
        actions = self._actions()
        with contextlib.suppress(BlockingIOError):
            for number in self._wakeups[0].recv(4096):
                if number in actions:
                    actions[number]()

    def stop(self, why: str, drain: float | None = None) -> None:
        """End with a drain; the second time, or with `drain` 0, now."""
        if self.ending:
            drain = 0.0
        seconds = self.drain if drain is None else drain
        self.ending = True
        if self._successor is not None:  # it was to take over, and does not serve yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._successor.pid, signal.SIGTERM)
        self._rolling.clear()
        self._watch_listeners(False)
        self.tell("draining", f"{why}: draining for at most {seconds:g} s", signal=why, seconds=seconds)
        for process in self.processes.values():
            self.ask(process, seconds)

    def replace(self) -> None:
        """SIGHUP: replace the workers one by one, each when the new one is ready."""
        if not self.ending:
            self._rolling = deque(self.places)
            self.tell("replacing", f"SIGHUP: replacing {len(self.places)} workers", signal="SIGHUP")
            self._replace_next()

    def _replace_next(self) -> None:
        while self._rolling and not any(place.next for place in self.places):
            if self._newcomers is not None and not self._newcomers.has_room(self._rolling[0]):
                return  # an end makes room
            place = self._rolling.popleft()
            if place in self.places and place.current is not None and place.current.ready:
                self._start(place)

    def hand_over(self) -> None:
        """SIGUSR2: start the next parent, and serve on until its workers serve."""
        if self.ending or self._successor is not None:
            return
        if os.getpid() == 1:
            self._warn("failed", "SIGUSR2: the first process cannot hand over, all others would end with it")
            return
        try:
            named = zip(self.names, self.endpoints, strict=True)
            successor = self._successor = Successor(list(named))
        except OSError as error:
            self._warn("failed", f"SIGUSR2: no other parent can be started: {error}")
            return
        self._begun.append(successor.pid)
        self._hand_over_until = time.monotonic() + self._ready_timeout
        self._selector.register(successor.reader, selectors.EVENT_READ, self._successor_told)
        text = f"SIGUSR2: process {successor.pid} takes over when its workers serve"
        self.tell("handing over", text, signal="SIGUSR2", pid=successor.pid)

    def _successor_told(self) -> None:
        """The next parent serves, or has ended."""
        successor = self._successor
        if successor is None:
            return
        serves = successor.serves()
        self._forget_successor()
        if serves:
            for members in self.endpoints:
                members.disown()
            self.stop("SIGUSR2")
        else:
            text = f"SIGUSR2: process {successor.pid} has ended before its workers served: this one goes on"
            self._warn("failed", text, pid=successor.pid)

    def _forget_successor(self) -> None:
        assert self._successor is not None
        self._selector.unregister(self._successor.reader)
        self._successor.close()
        self._successor = None

    def _look_for_successor(self, now: float) -> None:
        """One that takes too long is ended; its workers end with it."""
        if self._successor is not None and now >= self._hand_over_until:
            pid = self._successor.pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._forget_successor()
            text = f"SIGUSR2: the workers of process {pid} did not serve in {self._ready_timeout:g} s"
            self._warn("failed", f"{text}: it is ended, and this one goes on", pid=pid)

    def add(self) -> None:
        """SIGTTIN: one worker more."""
        if self.ending:
            return
        number = len(self.places)
        try:
            watched = self._watching
            self._watch_listeners(False)
            for members in self.endpoints:
                members.grow(number + 1 + self.spare)
            self._watch_listeners(watched)
            self._relief.arrange()
        except OSError as error:
            self._warn("failed", f"SIGTTIN: no worker more: {error}")
            return
        self.places.append(Place(number))
        self.tell("adding", f"SIGTTIN: {number + 1} workers", signal="SIGTTIN", workers=number + 1)

    def take_away(self) -> None:
        """SIGTTOU: one worker less."""
        if self.ending or len(self.places) == 1:
            return
        place = self.places.pop()
        self._relief.arrange()
        self.steer()
        if place.next is not None:
            self.ask(place.next)
        if place.current is not None:
            self._let_go(place.current)
        self.tell(
            "removing", f"SIGTTOU: {len(self.places)} workers", signal="SIGTTOU", workers=len(self.places)
        )

    def _end_all(self) -> None:
        """Leave no worker, whatever has ended the loop."""
        for process in self.processes.values():
            process.signal(signal.SIGKILL)
        for process in self.processes.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, 0)
            for descriptor in (process.status, process.pidfd):
                if descriptor is not None:
                    os.close(descriptor)
        self.processes.clear()


class Tick:
    """Something to be done every so many seconds."""

    def __init__(self, every: float, act: Callable[[], None]) -> None:
        self.every = every
        self.act = act
        self.due = time.monotonic() + every

    def run(self, now: float) -> None:
        """Do it if it is due."""
        if now >= self.due:
            self.due = now + self.every
            self.act()


def _heard(*_: object) -> None:
    """The number comes through the wake-up descriptor."""
