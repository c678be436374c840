"""The parent of worker processes: its loop, and what its signals mean.  It serves no client itself."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastlisten._events import Act, Events, Tick
from fastlisten._listener import ServeResult
from fastlisten._options import Checked
from fastlisten._workers.handover import Handover, Inheritance
from fastlisten._workers.manager import Manager
from fastlisten._workers.memory import Memory
from fastlisten._workers.newcomers import LOOK_AT_PROGRAMS, Newcomers, ProgramNewcomers
from fastlisten._workers.pool import Pool, Starter
from fastlisten._workers.process import Place, Process
from fastlisten._workers.programs import Programs
from fastlisten._workers.rolling import Rolling
from fastlisten._workers.sockets import Members
from fastlisten._workers.steering import Steering
from fastlisten._workers.supervision import Supervision, Tell

if TYPE_CHECKING:
    from fastlisten._workers.status import StatusPort


class Parent:
    """Runs worker processes on these listeners until it is told to stop.

    endpoints: the listeners of each; the caller closes them.  starter: how a worker begins.  memory: what
    they write.  options: WorkerOptions, checked.  tell: gets what happens.  gone: gets a process that has
    ended.  manager: is told, too.  ticks: what else is to be done.  inheritance: of a parent that is to go
    when all workers serve.  status: answers who asks about them.
    """

    def __init__(
        self,
        endpoints: Sequence[Members],
        starter: Starter,
        memory: Memory,
        options: Checked,
        tell: Tell,
        gone: Callable[[Process], None],
        manager: Manager,
        ticks: Sequence[Tick] = (),
        inheritance: Inheritance | None = None,
        status: StatusPort | None = None,
    ) -> None:
        def told(event: str, text: str, warning: bool = False, **values: Any) -> None:
            tell(event, text, warning=warning, **values)
            manager.tell(event, text, **values)

        self._tell: Tell = told
        self._events = Events()
        self.pool = Pool(starter, memory, options, self._events, gone)
        self._steering = Steering(endpoints, self.pool, self._events)
        self._newcomers = Newcomers()
        if isinstance(starter, Programs):
            self._newcomers = ProgramNewcomers(self.pool, self._steering, starter.notifications)
        self._supervision = Supervision(self.pool, self._steering, self._newcomers, told)
        self.rolling = Rolling(self.pool, self._supervision, self._newcomers, told)
        passed = [*endpoints, *([status.members] if status else ())]
        self._handover = Handover(passed, options.ready_timeout, self._events, told, self._taken_over)
        self._spare = starter.spare
        self._ticks = [*ticks, *manager.ticks(self._comes_on)]
        self._inheritance = inheritance
        self._status = status
        self._leaves_at = self._pauses_at = math.inf  # when it begins to, of which others have been told
        self._served = False
        self._emptied = False  # all workers' queues, when they end

    def run(self) -> ServeResult:
        """Serve until a signal ends it and all workers have ended; returns what the drain did.

        For the main thread.  Whatever comes out, no worker is left.
        """
        try:
            with self._events.signals(self._actions()):
                try:
                    if self._status is not None and self._inheritance is None:
                        self._status.open(self._events, self.pool)
                    self._look_after()
                    while self.pool.processes or not self.pool.ending:
                        self._wait()
                        self._look_after()
                finally:
                    self.pool.end_all()
        finally:
            self._handover.close()
            self._events.close()
        return self.pool.result

    def _wait(self) -> None:
        """Look at the queues until something else is to be done, or wait for that."""
        seconds = self._patience()
        if not (self.pool.ending or self.pool.paused) and self._steering.wait(seconds):
            seconds = 0.0
        self._events.wait(seconds)

    def _patience(self) -> float | None:
        """How long nothing is to be done, in seconds."""
        now = time.monotonic()
        times = [self._handover.until, self._leaves_at, self._pauses_at, *self.pool.due()]
        times += [tick.due for tick in self._ticks]
        if self._status is not None:
            times.append(self._status.due())
        if self._newcomers.busy:
            times.append(now + LOOK_AT_PROGRAMS)
        first = min(times)
        return None if first == math.inf else max(first - now, 0.0)

    def _look_after(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        self._supervision.look(now)
        self.rolling.look()
        for tick in self._ticks:
            tick.run(now)
        self._handover.look(now)
        if self._status is not None:
            self._status.look(now)
        if now >= self._leaves_at:
            self._stop("SIGTERM")
        if self.pool.ending:
            self._close_emptied()
            return
        if now >= self._pauses_at:
            self._pauses_at = math.inf
            self.pool.pause(True)
        if not self.pool.paused:  # else all queues stand still, and nobody can help
            self._steering.look(now)
        if not self._served and all(place.current and place.current.ready for place in self.pool.places):
            self._served = True
            self._all_serve()

    def _comes_on(self) -> bool:
        """For the service manager's watchdog: whether clients are taken, as far as they are to be."""
        return self.pool.paused or self._emptied or self._steering.comes_on()

    def _close_emptied(self) -> None:
        """Close the listeners once no worker takes anybody more: who comes later is refused at once."""
        if not self._emptied and all(process.emptied for process in self.pool.processes.values()):
            self._emptied = True
            for members in self._steering.endpoints:
                members.close_early()

    def _all_serve(self) -> None:
        """All workers serve for the first time."""
        if self._inheritance is not None:
            self._inheritance.serve()
            self._steering.steer()
            if self._status is not None:  # until now the parent before has answered
                self._status.open(self._events, self.pool)
        self._tell("serving", "all workers serve", workers=len(self.pool.places))

    # --- signals --------------------------------------------------------------------------------------

    def _actions(self) -> dict[int, Act]:
        actions: dict[str, Act] = {
            "SIGTERM": lambda: self.leave("SIGTERM"),
            "SIGINT": lambda: self._stop("SIGINT"),
            "SIGBREAK": lambda: self.leave("SIGBREAK"),
            "SIGQUIT": lambda: self._stop("SIGQUIT", 0.0),
            "SIGHUP": self.replace,
            "SIGTTIN": self._add,
            "SIGTTOU": self._take_away,
            "SIGUSR2": self._hand_over,
            "SIGCHLD": self._reap,
        }
        return {getattr(signal, name): act for name, act in actions.items() if hasattr(signal, name)}

    def leave(self, why: str) -> None:
        """End with a drain, after a time in which others are told and clients are still served; the second
        time with a drain, and then now."""
        seconds = self.pool.options.lame_duck
        if not seconds or self.pool.leaving or self.pool.ending:
            self._stop(why)
            return
        self.pool.leaving = True
        self._leaves_at = time.monotonic() + seconds
        self._tell(
            "leaving", f"{why}: not ready any more, draining in {seconds:g} s", signal=why, seconds=seconds
        )

    def _stop(self, why: str, drain: float | None = None) -> None:
        """End with a drain; the second time, or with `drain` 0, now."""
        self._leaves_at = math.inf
        if self.pool.ending:
            drain = 0.0
        seconds = self.pool.options.drain if drain is None else drain
        self.pool.ending = True
        self._handover.stop()
        self.rolling.stop()
        self._steering.close()
        self._tell("draining", f"{why}: draining for at most {seconds:g} s", signal=why, seconds=seconds)
        for process in self.pool.processes.values():
            self.pool.ask(process, seconds)

    def replace(self) -> None:
        """SIGHUP: replace the workers one by one, each when the new one is ready."""
        if not self.pool.ending:
            self.rolling.begin(self.pool.places, "SIGHUP")
            text = f"SIGHUP: replacing {len(self.pool.places)} workers"
            self._tell("replacing", text, signal="SIGHUP")

    def controlled(self, path: str, text: str) -> None:
        """Somebody had this done at the status port."""
        self._tell("control", f"POST {path}: {text}", path=path)

    def pause(self, seconds: float) -> None:
        """Tell who asks that it is paused, and have the workers take no new clients after so long."""
        self.pool.pausing = True
        self._pauses_at = time.monotonic() + seconds

    def resume(self) -> None:
        """End that."""
        self.pool.pausing, self._pauses_at = False, math.inf
        self.pool.pause(False)

    def _hand_over(self) -> None:
        """SIGUSR2: start the next parent, and serve on until its workers serve."""
        if not (self.pool.ending or self.pool.leaving):
            self._handover.begin()

    def _taken_over(self, pid: int) -> None:
        """The next parent's workers serve."""
        if self._status is not None:
            self._status.hand_over()
        self._tell("handed over", f"process {pid} has taken over", pid=pid)
        self._stop("SIGUSR2")

    def _add(self) -> None:
        """SIGTTIN: one worker more."""
        if self.pool.ending:
            return
        number = len(self.pool.places)
        try:
            self._steering.grow(number + 1 + self._spare)
        except OSError as error:
            self._tell("failed", f"SIGTTIN: no worker more: {error}", warning=True)
            return
        self.pool.places.append(Place(number))
        self._tell("adding", f"SIGTTIN: {number + 1} workers", signal="SIGTTIN", workers=number + 1)

    def _take_away(self) -> None:
        """SIGTTOU: one worker less."""
        if self.pool.ending:
            return
        if len(self.pool.places) == 1:
            self._tell("failed", "SIGTTOU: the last worker stays", warning=True)
            return
        place = self.pool.places.pop()
        self._steering.changed()
        if place.next is not None:
            self.pool.ask(place.next)
        if place.current is not None:
            self._supervision.let_go(place.current)
        count = len(self.pool.places)
        self._tell("removing", f"SIGTTOU: {count} workers", signal="SIGTTOU", workers=count)

    def _reap(self) -> None:
        """SIGCHLD: wait for those that have ended."""
        self._supervision.reap()
        self._handover.reap()
