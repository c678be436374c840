"""The standard library's own socket class and create_server(), whatever stands in their place by now.

gevent, eventlet and PySocks put classes of their own at socket.socket, and a program may put ours there.
"""

from __future__ import annotations

import _socket
import socket
import sys
from typing import TYPE_CHECKING, Any


def _standard_class() -> Any:
    """The class that socket.py defines: it stays a subclass of _socket.socket wherever its name leads."""
    for found in _socket.socket.__subclasses__():
        if (found.__module__, found.__qualname__) == ("socket", "socket"):
            return found
    raise ImportError("socket.py's own class is not there")


if TYPE_CHECKING:
    StandardSocket = socket.socket
else:
    StandardSocket = _standard_class()

# From before anybody puts ours in its place; this module is imported once, and first.
create_server = socket.create_server


def green_library() -> str | None:
    """The name of the library that has made the standard sockets green; None where they block a thread."""
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("socket"):
        return "gevent"
    patcher: Any = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("socket"):
        return "eventlet"
    return None


def refuse_green(what: str) -> None:
    """RuntimeError when the standard sockets are green: `what` would stop every greenlet but its own."""
    library = green_library()
    if library is not None:
        raise RuntimeError(
            f"{what} would block every greenlet, since {library} has patched the socket module: use "
            f"fastlisten.socketserver or fastlisten.socket, which stay {library}'s then, or do not patch"
        )
