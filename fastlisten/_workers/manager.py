"""What the service manager that has started the parent is told of its workers; sd_notify(3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from fastlisten._events import Tick
from fastlisten._listener import ListenerStats
from fastlisten._notify import Notifier

_log = logging.getLogger("fastlisten")

# How often the counters are told, if they have changed.
STATUS_INTERVAL = 10.0  # seconds

# The watchdog is fed if all is well at a look; so many looks there are for each time that it has to be fed.
LOOKS = 4


class Manager:
    """Tells the manager what becomes of the service, of which the parent is the main process.

    notifier: to it; the caller closes it.  where: what is served, in words.  stats: gives the counters; None
    where nobody counts.
    """

    def __init__(self, notifier: Notifier, where: str, stats: Callable[[], ListenerStats] | None) -> None:
        self._notifier = notifier
        self._where = where
        self._stats = stats
        self._status = ""
        self._serves = False
        self._failed = False

    def tell(self, event: str, text: str, **values: Any) -> None:
        """Something has happened; the events are the parent's."""
        notifier = self._notifier
        if event == "serving":
            self._serves = True
            self._send(notifier.ready, f"{values['workers']} workers, {self._where}")
        elif event == "draining":
            self._send(notifier.stopping, text)
        elif event == "handed over":  # the other one speaks for the service from now on
            self._send(notifier.main_pid, values["pid"])
            notifier.close()
        elif self._serves and event == "replacing":
            self._send(notifier.reloading, text)
        elif self._serves and event == "replaced":
            self._send(notifier.ready, text)

    def ticks(self, well: Callable[[], bool]) -> Iterator[Tick]:
        """What is told again and again: the counters, and that all is well, if it is."""
        if self._notifier and self._stats is not None:
            yield Tick(STATUS_INTERVAL, self._counters)
        if self._notifier.interval is not None:
            yield Tick(self._notifier.interval / LOOKS, lambda: self._feed(well()))

    def _feed(self, well: bool) -> None:
        if well:
            self._notifier.feed()

    def _counters(self) -> None:
        assert self._stats is not None
        total = self._stats()
        status = f"{self._where}: {total.accepted} accepted, {total.active} active"
        if self._serves and status != self._status:
            self._status = status
            self._send(self._notifier.status, status)

    def _send(self, method: Callable[[Any], object], argument: Any) -> None:
        """Tell it; a service does not end because nobody listens.  The first failure is in the log."""
        try:
            method(argument)
        except OSError as error:
            if not self._failed:
                self._failed = True
                _not_told(error)


def notifier() -> Notifier:
    """What tells the manager, the caller's to close.  If it cannot, that is in the log: it is not for the
    manager to end a service."""
    try:
        return Notifier()
    except (OSError, ValueError) as error:
        _not_told(error)
        return Notifier({})


def _not_told(error: Exception) -> None:
    text = getattr(error, "strerror", None) or error
    extra = {"event": "manager not told", "reason": str(text)}
    _log.warning("the service manager is not told: %s", text, extra=extra)
