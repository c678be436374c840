"""What a POST at the status port does, where that was asked for: pause, resume, drain, restart a worker."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Protocol

# Without this field nothing is done.  A page of another site can have a browser send a POST here, but not
# with a field of its own unless we allow that: Fetch Standard, "CORS-safelisted request-header".
FIELD = "x-fastlisten-control"


class Control(Protocol):
    """What can be done with a service; each returns what was done, in words, or raises RefusedError."""

    def pause(self) -> str:
        """Take no new clients until resume()."""

    def resume(self) -> str:
        """Take them again."""

    def drain(self) -> str:
        """End as at a first SIGTERM."""

    def restart(self, worker: int | None) -> str:
        """Replace a worker, or all, as at SIGHUP."""

    def told(self, path: str, text: str) -> object:
        """Tell, for the log, what somebody had done."""


class RefusedError(Exception):
    """What is asked is not done; status: of the answer."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


def not_draining(draining: bool) -> None:
    """Refuse what is of no use any more, if the service drains."""
    if draining:
        raise RefusedError(HTTPStatus.CONFLICT, "it is draining")


def paused_in(seconds: float) -> str:
    """What was done where a pause begins in so long, and others are told of it now."""
    return f"not ready any more, paused in {seconds:g} s" if seconds else "paused"


PATHS = {  # and the status of the answer: whether it is done, or begins
    "/pause": HTTPStatus.OK,
    "/resume": HTTPStatus.OK,
    "/drain": HTTPStatus.ACCEPTED,
    "/restart": HTTPStatus.ACCEPTED,
}


def obey(path: str, query: str, lines: Sequence[str], control: Control) -> tuple[HTTPStatus, str]:
    """Do what a POST of one of PATHS asks; returns the answer's status and text.  lines: its fields."""
    try:
        _allowed(lines)
        worker = _worker(path, query)
        if path == "/restart":
            text = control.restart(worker)
        else:
            text = {"/pause": control.pause, "/resume": control.resume, "/drain": control.drain}[path]()
    except RefusedError as error:
        return error.status, f"{error}\n"
    control.told(path, text)
    return PATHS[path], f"{text}\n"


def _allowed(lines: Sequence[str]) -> None:
    """Refuse what a page in a browser may have sent: one of another site cannot send the field, and browsers
    say in any POST whose page it is, if its name stands for this address, too (RFC 6454)."""
    names = {line.partition(":")[0].strip().lower() for line in lines}
    if FIELD not in names:
        raise RefusedError(HTTPStatus.FORBIDDEN, "it needs the field X-Fastlisten-Control: 1")
    if "origin" in names:
        raise RefusedError(HTTPStatus.FORBIDDEN, "it is not for pages in a browser, which send Origin")


def _worker(path: str, query: str) -> int | None:
    """The number of the worker that is asked for; None: none is."""
    if not query:
        return None
    name, _, value = query.partition("=")
    if path != "/restart" or name != "worker" or not (value.isascii() and value.isdigit()):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "only /restart takes something: ?worker=NUMBER")
    return int(value[:9])
