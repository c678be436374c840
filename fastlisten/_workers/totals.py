"""The counters of the whole: of the workers that there are, and of those that have ended."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fastlisten._core.state import queue
from fastlisten._listener import ListenerStats, PendingTimes, all_times
from fastlisten._workers.pool import Pool
from fastlisten._workers.process import Process
from fastlisten._workers.sockets import Members


class WorkersStats(NamedTuple):
    """The counters of all workers, and of each.

    total: their sum.  workers: one entry a worker, in the order of their numbers; what the processes
    counted that were replaced is in them.

    >>> total, workers = WorkersStats(total=None, workers=())
    """

    total: ListenerStats
    workers: tuple[ListenerStats, ...]


class WorkerProcess(NamedTuple):
    """A worker, by its number: whether it serves, and how many processes were started for it so far."""

    number: int
    ready: bool
    starts: int


class Totals:
    """Adds up what the workers write."""

    def __init__(self) -> None:
        self._since = time.time()
        self._past: dict[int, list[dict[str, Any]]] = {}  # by the number of the worker

    def gone(self, process: Process) -> None:
        """A process has ended: what it counted stays.  Who was with it then is not active any more."""
        for counters in process.slot.counters:
            counts = _counted(counters, takes=False)
            counts["handled"] += counts.pop("active")
            counts["waiting"] = counts["pending_connections"] = counts["capacity"] = 0
            kept = self._past.setdefault(process.place.number, [])
            kept[:] = [_sum([*kept, counts])]

    def stats(self, pool: Pool | None, endpoints: Sequence[Members]) -> WorkersStats:
        """The counters now; pool: None before the workers begin, and when they have ended."""
        if pool is None:
            past = [counts for kept in self._past.values() for counts in kept]
            return WorkersStats(_together(_sum(past), self._since), ())
        rows, merged = [], []
        of_places: dict[int, list[dict[str, Any]]] = {}
        for process in list(pool.processes.values()):  # one that is replaced counts until it has ended
            found = [_counted(counters, takes=not process.asked) for counters in process.slot.counters]
            of_places.setdefault(process.place.number, []).extend(found)
        for place in pool.places:
            counts = [*of_places.pop(place.number, ()), *self._past.get(place.number, ())]
            merged.append(counts[0] if len(counts) == 1 and "active" in counts[0] else _sum(counts))
            queues = [queue(members.of(place.number).fileno()) for members in endpoints if not members.shared]
            rows.append(_together(merged[-1], self._since, queues))
        gone = [
            counts for number, kept in self._past.items() if number >= len(pool.places) for counts in kept
        ]
        leaving = [counts for kept in of_places.values() for counts in kept]
        shared = [queue(members.of(0).fileno()) for members in endpoints if members.shared]
        total = _together(_sum([*merged, *gone, *leaving]), self._since, shared, rows)
        return WorkersStats(total, tuple(rows))


_SUMS = (
    "accepted",
    "handled",
    "active",
    "handler_errors",
    "refused",
    "dropped",
    "waiting",
    "pending_connections",
    "capacity",
    "tls_handshakes",
)


_BY_REASON = ("accept_errors", "tls_failures", "refused_for")


def _counted(counters: Any, takes: bool) -> dict[str, Any]:
    """A process's counters; takes: whether it is one that takes clients, unless it is paused."""
    return {
        **counters.counts(),
        "tls_failures": counters.tls_failures(),
        "refused_for": counters.refused_for(),
        "pending_times": PendingTimes(*counters.pending_times()),
        "paused": counters.paused if takes else None,
    }


def _sum(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Several processes' counters in one."""
    total: dict[str, Any] = dict.fromkeys(_SUMS, 0)
    reasons: dict[str, dict[str, int]] = {name: {} for name in _BY_REASON}
    paused, times = [], []
    for one in counts:
        for name in _SUMS:
            total[name] += one.get(name, 0)
        for name, found in reasons.items():
            for reason, number in one[name].items():
                found[reason] = found.get(reason, 0) + number
        if one["paused"] is not None:
            paused.append(one["paused"])
        times.append(one["pending_times"])
    return {
        **total,
        **reasons,
        "pending_times": all_times(times),
        "paused": all(paused) if paused else None,
    }


def _together(
    counts: dict[str, Any],
    since: float,
    queues: Iterable[tuple[int | None, int | None]] = (),
    rows: Iterable[ListenerStats] = (),
) -> ListenerStats:
    queues = [*queues, *((row.queue_depth, row.queue_limit) for row in rows)]
    depths = [depth for depth, _ in queues if depth is not None]
    limits = [limit for _, limit in queues if limit is not None]
    return ListenerStats(
        **(counts | {"paused": bool(counts["paused"])}),
        threads=0,
        idle_threads=0,
        queue_depth=sum(depths) if depths else None,
        queue_limit=sum(limits) if limits else None,
        since=since,
    )
