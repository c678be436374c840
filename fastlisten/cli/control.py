"""What a POST at the status port does, where there are no workers."""

from __future__ import annotations

import signal
from http import HTTPStatus

from fastlisten._status.control import RefusedError, not_draining, paused_in
from fastlisten._status.service import DRAINING
from fastlisten._status.thread import StatusThread
from fastlisten.cli.report import Report


class ProcessControl:
    """Does it, as a Control.  Called by the thread of the status port.

    lame_duck: for how many seconds clients are taken after others were told of a pause; None: 0.
    """

    def __init__(self, status: StatusThread, lame_duck: float | None, report: Report) -> None:
        self._status = status
        self._lame_duck = lame_duck or 0.0
        self._report = report

    def pause(self) -> str:
        """Take no new clients after `lame_duck`, of which others are told now."""
        not_draining(self._draining)
        self._status.pause(self._lame_duck)
        return paused_in(self._lame_duck)

    def resume(self) -> str:
        """Take them again."""
        not_draining(self._draining)
        self._status.resume()
        return "serving"

    def drain(self) -> str:
        """End as at the first SIGTERM."""
        if not self._draining:  # and it is from now on; the signal comes when this is told
            self._status.leave(then=lambda: signal.raise_signal(signal.SIGTERM))
        return "draining"

    def restart(self, worker: int | None) -> str:
        """There is nobody to replace."""
        raise RefusedError(HTTPStatus.CONFLICT, "there are no workers")

    def told(self, path: str, text: str) -> None:
        """Tell what was done."""
        self._report.control(path, text)

    @property
    def _draining(self) -> bool:
        return self._status.state() == DRAINING
