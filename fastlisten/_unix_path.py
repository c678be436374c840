"""A unix socket's path: made with the permissions that were asked for, and unlinked by its maker only."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_umask = threading.Lock()


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
