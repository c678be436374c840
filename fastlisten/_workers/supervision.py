"""A worker at each place: started, replaced, and started again when it has died."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

from fastlisten._workers.newcomers import Newcomers
from fastlisten._workers.pool import Pool
from fastlisten._workers.process import Place, Process
from fastlisten._workers.steering import Steering

# A worker that has served for less than this has died at once, and is started again after FIRST_AGAIN
# seconds, then after twice as long each time, up to LAST_AGAIN.
LIVED = 1.0  # seconds
FIRST_AGAIN = 0.1
LAST_AGAIN = 10.0

Tell = Callable[..., None]
"""tell(event, text, warning=False, **values): what happens."""


class Supervision:
    """Decides what follows when a process is ready, or not in its time, or has ended."""

    def __init__(self, pool: Pool, steering: Steering, newcomers: Newcomers, tell: Tell) -> None:
        self._pool = pool
        self._steering = steering
        self._newcomers = newcomers
        self._tell = tell

    def look(self, now: float) -> None:
        """Start whoever is to be started now, and end whoever is to have ended."""
        for place in self._pool.places:
            if place.start_at is not None and place.start_at <= now and not self._pool.ending:
                place.start_at = None
                self.start(place)
        self._pool.look(now, self)
        self._newcomers.look(now, self.ready)

    def start(self, place: Place) -> Process | None:
        """Begin a process at a place; None if that fails, and is tried again if nobody serves there."""
        try:
            member = self._newcomers.member(place)
            process = self._pool.begin(place, member, self._steering.known(), self)
        except OSError as error:
            self._failed(place, f"worker {place.number} cannot be started: {error}", 1.0)
            return None
        self._newcomers.began(process)
        text = f"worker {place.number} is process {process.pid}"
        self._tell("starting", text, worker=place.number, pid=process.pid)
        return process

    def let_go(self, process: Process) -> None:
        """No new clients come to a worker any more: ask it to go, when it has taken those that have come."""
        if not self._newcomers.leaves(process):
            self._pool.ask(process)

    def reap(self) -> None:
        """Some have ended."""
        self._pool.reap(self)

    # --- what becomes of a process --------------------------------------------------------------------

    def ready(self, process: Process) -> None:
        """A worker serves: the one before it is asked to go."""
        place = process.place
        if process.ready:
            return
        process.ready = True
        seconds = time.monotonic() - process.began
        text = f"{process} serves after {seconds:.2f} s"
        self._tell("ready", text, worker=place.number, pid=process.pid)
        if place.next is process:
            before, place.current, place.next = place.current, process, None
            place.member = process.member
            self._steering.steer()
            if before is not None:
                self.let_go(before)
        self._steering.replaced(process)

    def late(self, process: Process) -> None:
        """A worker was not ready in its time, and is killed."""
        place = process.place
        if place.next is process:
            place.next = None
        else:
            place.current = None
        text = (
            f"{process} was not ready in {self._pool.options.ready_timeout:g} s: "
            "it has neither served its listeners nor called worker().ready()"
        )
        self._failed(place, text, _delay(place), worker=place.number)

    def killed(self, process: Process) -> None:
        """A worker has not ended in its time, and is killed."""
        text = f"{process} has not ended in its time: killed"
        self._warn("killed", text, worker=process.place.number, pid=process.pid)

    def ended(self, process: Process, code: int) -> None:
        """A worker process has ended."""
        place = process.place
        left = self._newcomers.ended(process)
        how = f"by signal {signal.strsignal(-code) or -code}" if code < 0 else f"with status {code}"
        text = f"{process} ended {how}"
        values = {"worker": place.number, "pid": process.pid, "status": code}
        if place.next is process:
            place.next = None
        elif place.current is process:
            place.current = None
            self._steering.changed()
        expected = self._pool.ending or process.asked or place not in self._pool.places
        if expected:
            self._tell("ended", text, **values)
            if left and not self._pool.ending and place.current is not None and place.next is None:
                self.start(place)  # one that has those listeners, and replaces this one
        elif place.current is not None:
            self._warn("failed", f"{text} before it was ready: the old one stays", **values)
        elif place.next is not None:
            self._warn("ended", f"{text}: the one that was to replace it goes on", **values)
        elif process.ready and time.monotonic() - process.began >= LIVED:
            place.failures, place.start_at = 0, time.monotonic()
            self._warn("restarted", f"{text}; started again", seconds=0.0, **values)
        else:  # it has died at once
            self._failed(place, text, _delay(place), **values)

    def _failed(self, place: Place, text: str, delay: float, **values: Any) -> None:
        if place.current is not None:  # it was to replace this one
            self._warn("failed", f"{text}: the old one stays", **values)
            return
        place.failures = min(place.failures + 1, 20)
        place.start_at = time.monotonic() + delay
        self._warn("restarted", f"{text}; started again in {delay:.1f} s", seconds=delay, **values)

    def _warn(self, event: str, text: str, **values: Any) -> None:
        self._tell(event, text, warning=True, **values)


def _delay(place: Place) -> float:
    """After how many seconds what has failed there is tried again."""
    return min(FIRST_AGAIN * 2.0**place.failures, LAST_AGAIN)
