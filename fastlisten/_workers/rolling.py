"""The workers replaced one by one, each when the new one is ready."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from fastlisten._workers.newcomers import Newcomers
from fastlisten._workers.pool import Pool
from fastlisten._workers.process import Place, Process
from fastlisten._workers.supervision import Supervision, Tell


class Rolling:
    """Replaces workers; ends when all are replaced, or when one that is new does not get ready."""

    def __init__(self, pool: Pool, supervision: Supervision, newcomers: Newcomers, tell: Tell) -> None:
        self._pool = pool
        self._supervision = supervision
        self._newcomers = newcomers
        self._tell = tell
        self._why = ""
        self._count = 0  # how many are to be replaced; 0: nobody is
        self._done = 0
        self._left: deque[Place] = deque()
        self._new: Process | None = None  # the one that is to be ready next

    @property
    def busy(self) -> bool:
        """Whether some are being replaced."""
        return self._count > 0

    def begin(self, places: Iterable[Place], why: str) -> None:
        """Replace those at these places, from the first on, and nobody else; why: for what is told."""
        self._left, self._why = deque(places), why
        self._count, self._done = len(self._left), 0

    def stop(self) -> None:
        """Replace nobody more."""
        self._left.clear()
        self._count = 0

    def look(self) -> None:
        """Begin the next replacement, if there is nothing to wait for."""
        if self._new is not None:
            if self._new.place.next is self._new:
                return
            if self._new.ready:
                self._done += 1
            else:
                self._left.clear()
            self._new = None
        while self._left and not any(place.next for place in self._pool.places):
            if not self._newcomers.has_room(self._left[0]):
                return  # an end makes room
            place = self._left.popleft()
            if place in self._pool.places and place.current is not None and place.current.ready:
                self._new = self._supervision.start(place)
                if self._new is None:
                    self._left.clear()
        if self._count and not self._left and self._new is None:
            text = f"{self._why}: {self._done} of {self._count} workers are replaced"
            self._tell("replaced", text, replaced=self._done, workers=self._count)
            self._count = 0
