"""The status port of a parent, which answers for its workers: by its own loop, as it may have no thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastlisten._events import Events
from fastlisten._status.control import Control
from fastlisten._status.server import StatusServer
from fastlisten._status.service import DRAINING, PAUSED, SERVING, STARTING, counts, load, share
from fastlisten._workers.pool import Pool
from fastlisten._workers.sockets import Members
from fastlisten._workers.totals import WorkersStats


class StatusPort:
    """Where the parent answers, and what.

    members: with its one listener, which may have been another parent's.  workers: what metrics are of.
    stats: gives their counters.
    """

    def __init__(self, members: Members, workers: Any, stats: Callable[[], WorkersStats]) -> None:
        self.members = members
        self._workers = workers
        self._stats = stats
        self._pool: Pool | None = None
        self._handed_over = False
        self._server = StatusServer(members.listeners[0], self)

    def open(self, events: Events, pool: Pool) -> None:
        """Answer from now on."""
        self._pool = pool
        self._server.open(events)

    def obey(self, control: Control) -> None:
        """Have it do what is asked by POST."""
        self._server.control = control

    def hand_over(self) -> None:
        """Another parent answers from now on, and serves."""
        self._handed_over = True
        self._server.stop()

    def due(self) -> float:
        """When look() is to be called."""
        return self._server.due()

    def look(self, now: float) -> None:
        """Do what is due."""
        self._server.look(now)

    # --- as a Service ---------------------------------------------------------------------------------

    def state(self) -> str:
        """One worker that serves is enough."""
        pool = self._pool
        if self._handed_over:
            return SERVING
        if pool is None or pool.ending or pool.leaving:
            return DRAINING
        if pool.pausing:
            return PAUSED
        return SERVING if any(pool.serving()) else STARTING

    def counts(self) -> tuple[int, int, int]:
        return counts(self._stats().total)

    def present(self) -> float:
        pool = self._pool
        return 1.0 if pool is None else share(sum(1 for _ in pool.serving()), len(pool.places))

    def free(self) -> float:
        """Of what all workers have together when none is missing."""
        total, rows = self._stats()
        whole = max((row.capacity for row in rows), default=0) * len(rows)
        if whole:
            return share(total.capacity - load(total), whole)
        return share((total.queue_limit or 0) - (total.queue_depth or 0), total.queue_limit or 0)

    def sources(self) -> Sequence[Any]:
        return (self._workers,)
