"""Which workers get new clients: those that serve and are not stuck."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastlisten._events import Events
from fastlisten._workers.pool import Pool
from fastlisten._workers.process import Process
from fastlisten._workers.relief import Relief
from fastlisten._workers.sockets import Members


class Steering:
    """Sends new clients to the workers, and looks whether they come out of the queues.

    endpoints: the listeners of each; the caller closes them.
    """

    def __init__(self, endpoints: Sequence[Members], pool: Pool, events: Events) -> None:
        self.endpoints = endpoints
        self._pool = pool
        self._events = events
        self._relief = Relief(endpoints, pool.serving, self.steer)
        self._watching = False  # the listeners, for a client to come

    def steer(self) -> None:
        """Have new clients go to those workers that serve, and are not stuck."""
        for number, members in enumerate(self.endpoints):
            serving = [process.member for process in self._pool.serving()]
            good = [place for place in serving if not self._relief.stuck(number, place)]
            members.steer(sorted(good or serving))

    def known(self) -> int:
        """Of how many places a process that begins now has the listeners."""
        return min((len(members.listeners) for members in self.endpoints if not members.shared), default=0)

    def replaced(self, process: Process) -> None:
        """A process serves its listeners from now on."""
        self._relief.replaced(process.member)
        self.steer()

    def changed(self) -> None:
        """Others serve than before, or fewer."""
        self._relief.arrange()
        self.steer()

    def grow(self, count: int) -> None:
        """Have listeners for so many workers.  Raises OSError."""
        watched = self._watching
        self._watch(False)
        try:
            for members in self.endpoints:
                members.grow(count)
        finally:
            self._watch(watched)
        self._relief.arrange()

    # --- the queues -----------------------------------------------------------------------------------

    def wait(self, seconds: float | None) -> bool:
        """Look at the queues until something has come, for so many seconds at most; returns whether there
        are any to be looked at now."""
        if self._relief.asleep:
            return False
        self._relief.wait(self._events.fileno(), math.inf if seconds is None else seconds)
        return True

    def look(self, now: float) -> None:
        """See who is stuck."""
        self._relief.look(now)
        self._watch(self._relief.asleep)

    def comes_on(self) -> bool:
        """Whether clients were accepted since this was last asked, or none waits for all workers in vain."""
        return self._relief.comes_on()

    def close(self) -> None:
        """Look no more."""
        self._watch(False)

    def _watch(self, watch: bool) -> None:
        """Hear of the next client, or no longer: while they come, each would wake the parent, too."""
        if watch == self._watching:
            return
        self._watching = watch
        for members in self.endpoints:
            for listener in () if members.shared else members.listeners:
                if watch:
                    self._events.hear(listener, self._client_came)
                else:
                    self._events.forget(listener)

    def _client_came(self) -> None:
        self._watch(False)
        self._relief.wake()
