"""Drop-in for `http.server`: HTTPServer and ThreadingHTTPServer serve with fastlisten's loop.

Every other name is the original's, and so is the command line: `python -m fastlisten.http.server`.
"""

from __future__ import annotations

import http.server as _original
import runpy
import sys
from http.server import __all__ as __all__
from typing import TYPE_CHECKING, Any

from fastlisten import socketserver


def __getattr__(name: str) -> Any:
    """Every name that is not defined here is the original's, as it is now."""
    return getattr(_original, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_original)})


class HTTPServer(_original.HTTPServer, socketserver.TCPServer):
    """As the original; `socket` is a Listener."""

    __module__ = _original.__name__


class ThreadingHTTPServer(_original.ThreadingHTTPServer, HTTPServer):
    """As the original, with threads that are kept."""

    __module__ = _original.__name__


if sys.version_info >= (3, 14):

    class HTTPSServer(_original.HTTPSServer, HTTPServer):
        """As the original, with a deadline for handshakes: `handshake_timeout`, in seconds."""

        __module__ = _original.__name__

    class ThreadingHTTPSServer(_original.ThreadingHTTPSServer, HTTPSServer):
        """As the original, with threads that are kept, and the handshakes in them."""

        __module__ = _original.__name__


if TYPE_CHECKING:  # last: what is defined above is not the original's
    from http.server import *  # type: ignore[assignment]  # noqa: F403


if __name__ == "__main__":
    # The original's command line is what it does as __main__: have it do that, on our socketserver.
    sys.modules["socketserver"] = socketserver
    del sys.modules["http.server"]  # runpy would warn of two copies
    runpy.run_module("http.server", run_name="__main__", alter_sys=True)
