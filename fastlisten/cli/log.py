"""How the command tells what happens: lines for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

FORMATS = ("text", "json")

_TEXT = "%(levelname)s %(name)s: %(message)s"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_as_json = False
_handler: logging.Handler | None = None  # the one that set_up() has made


def use(name: str) -> None:
    """Tell everything in this format from now on, one of FORMATS."""
    global _as_json
    _as_json = name == "json"


def set_up(handler: logging.Handler | None = None, **always: object) -> None:
    """Have the log be written to stderr, or by a handler, in the format in use.

    Without effect when the handler's module has set logging up for itself.  always: what each object says.
    A worker, which has its parent's, sets it up anew.
    """
    global _handler
    _handler = handler or _handler or logging.StreamHandler()
    _handler.setFormatter(JSONLines(always) if _as_json else logging.Formatter(_TEXT))
    logging.basicConfig(handlers=[_handler])
    if _as_json:  # whatever else the interpreter would write to stderr
        logging.captureWarnings(True)
        sys.excepthook = lambda kind, error, traceback: _log_uncaught(kind, error, traceback, None)
        threading.excepthook = lambda found: _log_uncaught(
            found.exc_type, found.exc_value, found.exc_traceback, found.thread
        )
        sys.unraisablehook = lambda found: _log_uncaught(
            found.exc_type, found.exc_value, found.exc_traceback, found.object
        )


def line_of(event: str, text: str, values: Mapping[str, object], level: str = "INFO") -> str:
    """An event of the command's own as JSON; in the format "json" with what each line of that has."""
    head = {"time": _time(time.time()), "level": level} if _as_json else {}
    words = {"message": text} if _as_json and text else {}
    return json.dumps({**head, "event": event, **words, **values}, default=str)


def complain(text: str, event: str = "failed", level: str = "ERROR") -> None:
    """Tell on stderr what the command itself has to say."""
    print(line_of(event, text, {}, level) if _as_json else f"fastlisten: {text}", file=sys.stderr)


class JSONLines(logging.Formatter):
    """A record as a JSON object: time, level, event, logger, message, then what else is known of it.

    That is the record's `extra`; of a connection its `peer`; of an exception `error` and `traceback`; and the
    worker process.
    """

    def __init__(self, always: Mapping[str, object]) -> None:
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        values: dict[str, object] = {
            "time": _time(record.created),
            "level": record.levelname,
            "event": extra.pop("event", "log"),
            "logger": record.name,
            "message": record.getMessage(),
            **self._always,
            **_worker(),
        }
        if (connection := extra.pop("connection", None)) is not None:
            values["peer"] = _address(_peer(connection))
        if "peer" in extra:
            extra["peer"] = _address(extra["peer"])
        if record.exc_info and record.exc_info[0] is not None:
            kind, error, _ = record.exc_info
            values["error"] = f"{kind.__name__}: {error}"
            values["traceback"] = self.formatException(record.exc_info)
        found = {name: value for name, value in extra.items() if value is not None}
        return json.dumps({**values, **found}, default=str)


def _time(seconds: float) -> str:
    """RFC 3339, in UTC and to a millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03d}Z"


def _worker() -> dict[str, object]:
    from fastlisten import worker  # not at the top: for who logs JSON

    found = worker()
    return {} if found is None else {"worker": found.number}


def _peer(connection: Any) -> Any:
    try:
        return connection.peer
    except OSError:  # of a family that has no text
        return None


def _address(peer: Any) -> object:
    if isinstance(peer, bytes):  # an abstract unix name
        return "@" + peer[1:].decode("utf-8", "backslashreplace")
    if isinstance(peer, tuple) and len(peer) >= 2:
        host, port = peer[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return peer


def _log_uncaught(kind: Any, error: Any, traceback: Any, where: object) -> None:
    if kind is not None and issubclass(kind, SystemExit | KeyboardInterrupt):
        return
    text = "nobody has caught an exception" if where is None else "nobody has caught an exception of %r"
    arguments = () if where is None else (where,)
    logging.getLogger("fastlisten").critical(
        text, *arguments, exc_info=(kind, error, traceback), extra={"event": "uncaught exception"}
    )
