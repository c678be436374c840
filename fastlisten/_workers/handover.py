"""From one parent to the next, which may be another version of the program: the listeners, and when it
serves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence

from fastlisten._listener import Listener
from fastlisten._options import Checked
from fastlisten._unix_path import OwnPath
from fastlisten._workers.sockets import Members

# Has the old parent's process ID, the descriptors of its listeners, and the pipe to it, as JSON.
VARIABLE = "FASTLISTEN_HANDOVER"


class Successor:
    """The next parent, which this one has started: by the same command, with the listeners.

    named: each endpoint as it was asked for, and its listeners.  It serves when it writes to `reader`; the
    end of that pipe is its own.  Raises OSError when it cannot be started.
    """

    def __init__(self, named: Sequence[tuple[str, Members]]) -> None:
        self.reader, writer = os.pipe()
        descriptors = [[listener.fileno() for listener in members.listeners] for _, members in named]
        what = {
            "parent": os.getpid(),
            "pipe": writer,
            "endpoints": [
                {"name": name, "shared": members.shared, "descriptors": numbers}
                for (name, members), numbers in zip(named, descriptors, strict=True)
            ],
        }
        kept = [writer, *(number for numbers in descriptors for number in numbers)]
        handled = [number for number in signal.valid_signals() if callable(signal.getsignal(number))]
        try:
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, *sys.orig_argv[1:]],
                {**os.environ, VARIABLE: json.dumps(what)},
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, fd) for fd in kept],  # inherited, by the same numbers
                setsigmask=(),
                setsigdef=handled,
            )
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


class Inheritance:
    """What this process has from the parent before it; from_environment() finds it.

    All of it is this process's to close: what take() has given out with the Members, the rest by close().
    """

    def __init__(self, pipe: int, endpoints: list[tuple[str, bool, list[int]]]) -> None:
        self._pipe = pipe
        self._endpoints = endpoints
        self._taken: list[Members] = []

    @classmethod
    def from_environment(cls) -> Inheritance | None:
        """Take it out of the environment; None when there is nothing for this process."""
        text = os.environ.pop(VARIABLE, None)
        what = json.loads(text) if text else {}
        if what.get("parent") != os.getppid():
            return None
        endpoints = [(one["name"], one["shared"], one["descriptors"]) for one in what["endpoints"]]
        for number in (what["pipe"], *(number for _, _, numbers in endpoints for number in numbers)):
            os.set_inheritable(number, False)
        return cls(what["pipe"], endpoints)

    def take(self, name: str, options: Checked) -> Members | None:
        """The listeners of an endpoint that was asked for so, if it was."""
        for entry in self._endpoints:
            if entry[0] == name:
                self._endpoints.remove(entry)
                listeners = [Listener(fileno=number) for number in entry[2]]
                self._taken.append(Members.adopted(listeners, options, entry[1]))
                return self._taken[-1]
        return None

    def serve(self) -> None:
        """All workers serve: what was inherited is ours alone now, and the parent before is told to go."""
        for members in self._taken:
            members.settled = True
            path = members.endpoint.host.removeprefix("unix:")
            if path.startswith("/"):
                members.listeners[0]._path = OwnPath(path)
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            os.write(self._pipe, b"r")
        self.close()

    def close(self) -> None:
        """Close what nobody has taken."""
        for _, _, numbers in self._endpoints:
            for number in numbers:
                os.close(number)
        self._endpoints = []
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
