"""What a POST at the parent's status port does."""

from __future__ import annotations

from http import HTTPStatus

from fastlisten._status.control import RefusedError, not_draining, paused_in
from fastlisten._workers.parent import Parent


class ParentControl:
    """Does it, as a Control.  Called by the parent's own loop.

    ours: the workers are no programs of others, which nobody can have pause.
    """

    def __init__(self, parent: Parent, ours: bool) -> None:
        self._parent = parent
        self._ours = ours
        self._pool = parent.pool

    def pause(self) -> str:
        """Take no new clients after `lame_duck`, of which others are told now."""
        not_draining(self._draining)
        self._can_pause()
        seconds = self._pool.options.lame_duck or 0.0
        if not self._pool.pausing:
            self._parent.pause(seconds)
        return paused_in(seconds)

    def resume(self) -> str:
        """Take them again."""
        not_draining(self._draining)
        self._can_pause()
        self._parent.resume()
        return "serving"

    def drain(self) -> str:
        """End as at the first SIGTERM."""
        if not self._draining:
            self._parent.leave("SIGTERM")
        return "draining"

    def restart(self, worker: int | None) -> str:
        """Replace a worker, or all as SIGHUP does."""
        not_draining(self._draining)
        if worker is None:
            self._parent.replace()
            return f"replacing {len(self._pool.places)} workers"
        if worker >= len(self._pool.places):
            raise RefusedError(HTTPStatus.NOT_FOUND, f"there is no worker {worker}")
        place = self._pool.places[worker]
        if place.current is None or not place.current.ready:
            raise RefusedError(HTTPStatus.CONFLICT, f"worker {worker} does not serve")
        if self._parent.rolling.busy or place.next is not None:
            raise RefusedError(HTTPStatus.CONFLICT, "workers are being replaced")
        self._parent.rolling.begin([place], "POST /restart")
        return f"replacing worker {worker}"

    def told(self, path: str, text: str) -> None:
        """Tell what was done."""
        self._parent.controlled(path, text)

    def _can_pause(self) -> None:
        if not self._ours:
            raise RefusedError(HTTPStatus.CONFLICT, "programs cannot be paused")

    @property
    def _draining(self) -> bool:
        return self._pool.ending or self._pool.leaving
