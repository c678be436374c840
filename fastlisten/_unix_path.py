"""A unix socket's path: made with the permissions that were asked for, and unlinked by its maker only."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_umask = threading.Lock()

# How long another start in the same directory is waited for: its check, bind() and listen().
START = 1.0  # seconds


@contextmanager
def permissions(mode: int | None) -> Iterator[None]:
    """Have what is made inside carry `mode`.  The umask is the process's: keep the time short, and one at a
    time.  A later chmod() would leave the path open to others for a moment."""
    if mode is None:
        yield
        return
    with _umask:
        before = os.umask(0o777 & ~mode)
        try:
            yield
        finally:
            os.umask(before)


def _listens(path: Any, follow: bool) -> bool | None:
    """Whether somebody listens at a unix socket's path; None where that is none, or not ours to ask.

    follow: a link leads there, too.
    """
    try:
        if not stat.S_ISSOCK(os.stat(path, follow_symlinks=follow).st_mode):
            return None
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect(path)
    except BlockingIOError:  # its queue is full
        return True
    except ConnectionRefusedError:
        return False
    except (OSError, ValueError):
        return None
    return True


def is_stale(path: str) -> bool:
    """Whether a unix socket is there on which nobody listens any more.

    False for what cannot be looked at, a link, and a socket of another type; unix(7).
    """
    return _listens(path, follow=False) is False


@contextmanager
def replacing(path: str) -> Iterator[None]:
    """Unlink a socket that is stale; inside it is made and listens.

    Between bind() and listen() a socket looks stale, so starts in one directory are one at a time: flock(2)
    on the directory.  Who may not read that, or meets somebody who holds it for long, goes on without.
    Raises OSError as os.unlink().
    """
    directory = _locked(os.path.dirname(path) or ".")
    try:
        if is_stale(path):
            os.unlink(path)
        yield
    finally:
        if directory is not None:
            os.close(directory)


def _locked(directory: str) -> int | None:
    """The directory's descriptor, locked, the caller's to close; None where it cannot be opened."""
    import fcntl  # not on Windows, where Python has no unix sockets

    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    deadline = time.monotonic() + START
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.005)
                continue
        except OSError:  # a file system without locks
            pass
        return descriptor


def refuse_taken(path: Any) -> None:
    """OSError (EADDRINUSE) when somebody answers at this path; what is stale, or no socket, is passed over.

    path: text, bytes or PathLike; an abstract name is nobody's file.
    """
    if path[:1] not in ("\0", b"\0") and _listens(path, follow=True):
        raise OSError(errno.EADDRINUSE, f"Address {path!r} is already in use")


class OwnPath:
    """A unix socket's path, to be unlinked by the process that made it while it is what was made.

    path: it exists.  Raises OSError as os.stat().
    """

    def __init__(self, path: str | bytes) -> None:
        made = os.stat(path)
        self._path = path
        self._made = made.st_dev, made.st_ino
        self._process = os.getpid()

    def remove(self) -> None:
        """Unlink it; nothing happens in a forked child, nor when something else is there by now."""
        if os.getpid() != self._process:
            return  # the process that forked us still listens there
        try:
            now = os.stat(self._path)
            if (now.st_dev, now.st_ino) == self._made and stat.S_ISSOCK(now.st_mode):
                os.unlink(self._path)
        except FileNotFoundError:
            pass


def _after_fork_in_child() -> None:
    """The thread that held the lock is not there."""
    global _umask
    _umask = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
