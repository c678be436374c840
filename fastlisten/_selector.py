"""Watch a descriptor with an event loop whose selector may have kept it when it was told to let go."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any


def internal(loop: Any, name: str) -> Callable[..., Any]:
    """The loop's add_reader() and its like, which takes descriptors of the loop's transports, too."""
    found: Callable[..., Any] = getattr(loop, "_" + name, None) or getattr(loop, name)
    return found


def watch(add: Callable[..., Any], loop: Any, fd: int, callback: Callable[[], Any]) -> None:
    """Have `add`, the loop's add_reader or add_writer, watch a descriptor that the loop does not watch yet.

    The selectors module passes over an EPOLL_CTL_DEL that failed.  The kernel has the descriptor then and
    the selector does not, and each later EPOLL_CTL_ADD would fail with EEXIST, without end.  Raises OSError
    when the descriptor cannot be watched.
    """
    try:
        add(fd, callback)
    except FileExistsError:
        selector = getattr(loop, "_selector", None)
        if selector is None:  # not a loop of asyncio's own
            raise
        # by a copy, since what fromfd() makes closes what it was given
        with select.epoll.fromfd(os.dup(selector.fileno())) as poller:
            poller.unregister(fd)
        add(fd, callback)
