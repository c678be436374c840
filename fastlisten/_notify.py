"""Notifier: what a service tells the manager that has started it; the protocol of sd_notify(3)."""

from __future__ import annotations

import array
import logging
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

from fastlisten._endpoint import check_descriptor_name

__all__ = ["Notifier"]

# What says where the manager is, and whom it watches.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

# How long a message may wait for a manager that does not read, in seconds: a service goes on without it.
PATIENCE = 5

# How many descriptors one message takes; unix(7), SCM_RIGHTS.
MOST_DESCRIPTORS = 253

_log = logging.getLogger("fastlisten")


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Notifier:
    """Tells the service manager what becomes of this service: it is ready, it reloads, it stops.

    environment: where NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID stand; None for this process's.  They are
    left there.  Without NOTIFY_SOCKET nobody is told: every method does nothing and returns False.

    A message is one datagram to a unix socket, by its path ("/...") or its abstract name ("@...").  The
    methods return True when it was sent, which says nothing of what the manager does with it; systemd listens
    to the processes that NotifyAccess= of the unit names.  They raise OSError as socket.sendmsg(), and
    BlockingIOError for a manager that has not read for 5 seconds: a service can go on without it.  Signal
    handlers may call them, and threads.  A forked child may use its copy, and tells in its own name.

    The constructor raises ValueError for another kind of address (vsock) and for a WATCHDOG_USEC or
    WATCHDOG_PID that is no number.  close() or a `with` closes the socket that it keeps: without a free
    descriptor a watchdog must be fed, too.

    >>> import fastlisten
    >>> with fastlisten.Notifier() as notifier:
    ...     notifier.ready(status="listening")  # not started by a manager
    False
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._socket: socket.socket | None = None
        self._failed = False  # to feed the watchdog, and the log has it
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._watchdog = _watchdog(environment)
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                # Not settimeout(): a datagram socket that is not connected is always ready, also for a peer
                # whose queue is full, and would be tried without a pause.
                timeval = struct.pack("@ll", PATIENCE, 0)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
                self._socket.settimeout(None)
            except BaseException:
                self._socket.close()
                raise

    def __bool__(self) -> bool:
        """Whether there is a manager to tell."""
        return self._socket is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Tell nothing more."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    # --- what there is to tell ----------------------------------------------------------------------------

    def ready(self, status: str | None = None, *, main_pid: int | None = None) -> bool:
        """The service is up, or has reloaded (READY=1).

        status: as status().  main_pid: as main_pid(), in the same message.
        """
        return self.send("READY=1", *_main_pid(main_pid), *_status(status))

    def reloading(self, status: str | None = None) -> bool:
        """The service begins to reload, and will be ready() again (RELOADING=1 with MONOTONIC_USEC, by which
        Type=notify-reload knows it from an earlier one)."""
        microseconds = time.monotonic_ns() // 1000
        return self.send("RELOADING=1", f"MONOTONIC_USEC={microseconds}", *_status(status))

    def stopping(self, status: str | None = None) -> bool:
        """The service begins to stop (STOPPING=1).  That is final."""
        return self.send("STOPPING=1", *_status(status))

    def status(self, text: str) -> bool:
        """One line for people, which `systemctl status` shows (STATUS).  Raises ValueError for more lines."""
        return self.send(*_status(text))

    def main_pid(self, pid: int) -> bool:
        """Another process is the service's main one from now on (MAINPID)."""
        return self.send(*_main_pid(pid))

    def store(self, *files: int | HasFileno, name: str | None = None, poll: bool = True) -> bool:
        """Have the manager keep duplicates of these for the next start of the service (FDSTORE=1).

        files: descriptors or what has a fileno(), at most 253; they stay the caller's.  name: that of each in
        LISTEN_FDNAMES; "stored" without one.  poll: whether the manager drops one that has hung up or failed,
        which a listening socket does not.  The next process finds them behind the sockets of its units:
        bind("systemd:NAME").  The unit needs FileDescriptorStoreMax=.

        Raises ValueError for no file or too many, and for a name that the manager would not take.
        """
        if not 0 < len(files) <= MOST_DESCRIPTORS:
            raise ValueError(f"store() takes 1 to {MOST_DESCRIPTORS} files, not {len(files)}")
        numbers = [file if isinstance(file, int) else file.fileno() for file in files]
        return self.send("FDSTORE=1", *_name(name), *([] if poll else ["FDPOLL=0"]), descriptors=numbers)

    def remove(self, name: str) -> bool:
        """Have the manager close what it stores under this name (FDSTOREREMOVE=1)."""
        return self.send("FDSTOREREMOVE=1", *_name(name))

    def send(self, *assignments: str, descriptors: Sequence[int] = ()) -> bool:
        """Send assignments such as "READY=1" as one message, and duplicates of the descriptors with it.

        Raises ValueError for an assignment of more than one line.
        """
        for assignment in assignments:
            if "\n" in assignment:
                raise ValueError(f"{assignment!r} is more than one line")
        return self._send("\n".join(assignments), descriptors)

    def _send(self, text: str, descriptors: Sequence[int] = (), flags: int = 0) -> bool:
        sock = self._socket
        if sock is None:
            return False
        with_it = []
        if descriptors:
            with_it = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        sock.sendmsg([text.encode("utf-8", "backslashreplace")], with_it, flags, self._address)
        return True

    # --- the watchdog -------------------------------------------------------------------------------------

    @property
    def interval(self) -> float | None:
        """How often feed() is to be called, in seconds; None if the manager does not watch this process.

        It is half of the time (WatchdogSec= of the unit) after which the manager ends a service that has not
        fed; sd_watchdog_enabled(3).
        """
        return None if self._watchdog is None or self._socket is None else self._watchdog / 2

    def feed(self) -> None:
        """Tell the manager that the service makes progress (WATCHDOG=1).

        serve(watchdog=) calls it whenever its loop comes round.  It never waits, and raises no OSError: what
        fails is in the log once, and the next time is soon.
        """
        try:
            self._send("WATCHDOG=1", flags=socket.MSG_DONTWAIT)
        except BlockingIOError:  # the manager has not read the last ones yet
            return
        except OSError as error:
            if not self._failed:
                self._failed = True
                text = "the service manager's watchdog is not fed, which may end the service: %s"
                _log.warning(text, error, extra={"event": "watchdog not fed", "reason": str(error)})
            return
        self._failed = False

    async def feeding(self) -> None:
        """Feed for as long as the event loop comes round; to be run as a task, and cancelled.

        Returns at once when the manager does not watch.
        """
        import asyncio  # much to import for who has no event loop

        while (interval := self.interval) is not None:
            self.feed()
            await asyncio.sleep(interval)


def _address(text: str) -> str:
    """The address as socket.sendmsg() takes it; "" for none."""
    if text[:1] not in ("", "/", "@") or text == "@":
        raise ValueError(f"NOTIFY_SOCKET must be a path or an abstract name (@...), not {text!r}")
    return f"\0{text[1:]}" if text.startswith("@") else text


def _watchdog(environment: Mapping[str, str]) -> float | None:
    """After how many seconds without food the manager ends this process; None: it does not."""
    if "WATCHDOG_USEC" not in environment:
        return None
    microseconds = _number(environment, "WATCHDOG_USEC")
    if "WATCHDOG_PID" in environment and _number(environment, "WATCHDOG_PID") != os.getpid():
        return None  # it watches the process that has started this one
    if not microseconds:
        raise ValueError("WATCHDOG_USEC must be at least 1, not 0")
    return microseconds / 1e6


def _number(environment: Mapping[str, str], variable: str) -> int:
    text = environment[variable]
    if not (text.isascii() and text.isdigit()) or len(text) > 20:
        raise ValueError(f"{variable} must be a number, not {text!r}")
    return int(text)


def _status(text: str | None) -> list[str]:
    return [] if text is None else [f"STATUS={text}"]


def _main_pid(pid: int | None) -> list[str]:
    return [] if pid is None else [f"MAINPID={pid:d}"]


def _name(name: str | None) -> list[str]:
    if name is None:
        return []
    if not name:
        raise ValueError("the name is empty")
    check_descriptor_name(name)
    return [f"FDNAME={name}"]
