"""From one parent to the next, which may be another version of the program: the listeners, and when it
serves."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastlisten._events import Events
from fastlisten._listener import Listener
from fastlisten._options import Checked
from fastlisten._unix_path import OwnPath
from fastlisten._workers.sockets import Members
from fastlisten._workers.start import spawn

# Has the old parent's process ID, the descriptors of its listeners, and the pipe to it, as JSON.
VARIABLE = "FASTLISTEN_HANDOVER"


class Successor:
    """The next parent, which this one has started: by the same command, with the listeners.

    It serves when it writes to `reader`; the end of that pipe is its own.  Raises OSError when it cannot be
    started.
    """

    def __init__(self, endpoints: Sequence[Members]) -> None:
        self.reader, writer = os.pipe()
        descriptors = [[listener.fileno() for listener in members.listeners] for members in endpoints]
        what = {
            "parent": os.getpid(),
            "pipe": writer,
            "endpoints": [
                {"name": members.name, "shared": members.shared, "path": members.path, "descriptors": numbers}
                for members, numbers in zip(endpoints, descriptors, strict=True)
            ],
        }
        kept = [writer, *(number for numbers in descriptors for number in numbers)]
        command = [sys.executable, *sys.orig_argv[1:]]
        try:
            self.pid = spawn(command, {**_environment(), VARIABLE: json.dumps(what)}, kept)
        except BaseException:
            os.close(self.reader)
            raise
        finally:
            os.close(writer)

    def serves(self) -> bool:
        """Read the pipe, which is readable: whether it serves; else it has ended."""
        return os.read(self.reader, 1) != b""

    def close(self) -> None:
        os.close(self.reader)


def _environment() -> dict[str, str]:
    """Ours; the service manager that watches this process is to watch the next one."""
    mine = os.environ.get("WATCHDOG_PID") == str(os.getpid())
    return {name: value for name, value in os.environ.items() if not (mine and name == "WATCHDOG_PID")}


class Handover:
    """From SIGUSR2 on: the next parent, until it serves, or has not in its time.

    taken_over(pid): called when it serves; the listeners are its own then, too.
    """

    def __init__(
        self,
        endpoints: Sequence[Members],
        seconds: float,
        events: Events,
        tell: Callable[..., None],
        taken_over: Callable[[int], None],
    ) -> None:
        self._endpoints = endpoints
        self._seconds = seconds
        self._events = events
        self._tell = tell
        self._taken_over = taken_over
        self._successor: Successor | None = None
        self.until = math.inf  # when it is to serve
        self._begun: list[int] = []  # that may have to be waited for

    def begin(self) -> None:
        """Start the next parent, if that has not begun."""
        if self._successor is not None:
            return
        if os.getpid() == 1:
            self._failed("SIGUSR2: the first process cannot hand over, all others would end with it")
            return
        try:
            successor = self._successor = Successor(self._endpoints)
        except OSError as error:
            self._failed(f"SIGUSR2: no other parent can be started: {error}")
            return
        self._begun.append(successor.pid)
        self.until = time.monotonic() + self._seconds
        self._events.hear(successor.reader, self._told)
        text = f"SIGUSR2: process {successor.pid} takes over when its workers serve"
        self._tell("handing over", text, signal="SIGUSR2", pid=successor.pid)

    def stop(self) -> None:
        """It is to take over no more, if it does not serve yet."""
        self._signal(signal.SIGTERM)

    def look(self, now: float) -> None:
        """One that takes too long is ended; its workers end with it."""
        if now >= self.until:
            self._signal(signal.SIGKILL)
            pid = self._forget()
            text = f"SIGUSR2: the workers of process {pid} did not serve in {self._seconds:g} s"
            self._failed(f"{text}: it is ended, and this one goes on", pid=pid)

    def reap(self) -> None:
        """Wait for those that have ended."""
        for pid in list(self._begun):
            try:
                ended = os.waitpid(pid, os.WNOHANG)[0] != 0
            except ChildProcessError:
                ended = True
            if ended:
                self._begun.remove(pid)

    def close(self) -> None:
        """Wait for nobody more."""
        if self._successor is not None:
            self._forget()

    def _told(self) -> None:
        """The next parent serves, or has ended."""
        if self._successor is None:
            return
        serves = self._successor.serves()
        pid = self._forget()
        if serves:
            for members in self._endpoints:
                members.disown()
            self._taken_over(pid)
        else:
            text = f"SIGUSR2: process {pid} has ended before its workers served: this one goes on"
            self._failed(text, pid=pid)

    def _signal(self, number: int) -> None:
        if self._successor is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._successor.pid, number)

    def _forget(self) -> int:
        successor, self._successor, self.until = self._successor, None, math.inf
        assert successor is not None
        self._events.forget(successor.reader)
        successor.close()
        return successor.pid

    def _failed(self, text: str, **values: object) -> None:
        self._tell("failed", text, warning=True, **values)


class Inheritance:
    """What this process has from the parent before it; from_environment() finds it.

    All of it is this process's to close: what take() has given out with the Members, the rest by close().
    """

    def __init__(self, pipe: int, endpoints: list[dict[str, Any]]) -> None:
        self._pipe = pipe
        self._endpoints = endpoints
        self._taken: list[tuple[Members, str | None]] = []  # and the path that is to be unlinked

    @classmethod
    def from_environment(cls) -> Inheritance | None:
        """Take it out of the environment; None when there is nothing for this process."""
        text = os.environ.pop(VARIABLE, None)
        if text is None:
            return None
        what = json.loads(text)
        if what["parent"] != os.getppid():
            return None
        for number in (what["pipe"], *(fd for one in what["endpoints"] for fd in one["descriptors"])):
            os.set_inheritable(number, False)
        return cls(what["pipe"], what["endpoints"])

    def take(self, name: str, options: Checked) -> Members | None:
        """The listeners of an endpoint that was asked for so, if it was."""
        for one in self._endpoints:
            if one["name"] == name:
                self._endpoints.remove(one)
                listeners = [Listener(fileno=number) for number in one["descriptors"]]
                members = Members.adopted(name, listeners, options, one["shared"])
                self._taken.append((members, one["path"]))
                return members
        return None

    def serve(self) -> None:
        """All workers serve: what was inherited is ours alone now, and the parent before is told to go."""
        for members, path in self._taken:
            members.settled = True
            if path is not None:
                members.listeners[0]._path = OwnPath(path)
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            os.write(self._pipe, b"r")
        self.close()

    def close(self) -> None:
        """Close what nobody has taken."""
        for one in self._endpoints:
            for number in one["descriptors"]:
                os.close(number)
        self._endpoints = []
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
