"""What tests look at that is not public: named here alone, so that a renaming changes one line."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastlisten import _awaiting, aio
from fastlisten._core.accept import Shortage
from fastlisten._endpoint import endpoint_of, resolve
from fastlisten.aio import _server
from fastlisten.aio._hub import Hub

if TYPE_CHECKING:
    import pytest

__all__ = ["endpoint_of", "resolve"]


def is_served(listener: Any) -> bool:
    """Tell whether a serve() has begun on the listener."""
    return listener._state.taker is not None


def acceptor_of(listener: Any) -> Any:
    """Return what those wait on who await the listener."""
    (found,) = listener._async_acceptors.values()
    return found


def listener_of(server: Any) -> Any:
    """Return the Listener that the loop serves for a server of fastlisten.socketserver, or None."""
    return server._listener


def pause_by(server: Any, exhausted: Callable[[OSError, int], float]) -> None:
    """Have a server of fastlisten.socketserver pause for as long as this says when descriptors run out."""
    server._shortage = Shortage(exhausted)


def clients_of(server: aio.Server) -> Any:
    """Return the transports of an asyncio server."""
    return server._connections.clients()


def failures_of(server: aio.Server) -> int:
    """Return how many accepts of an asyncio server have failed in a row for want of a resource."""
    return server._accepting.shortage.failures


def set_polling(monkeypatch: pytest.MonkeyPatch | None, polled: bool) -> None:
    """Have the hubs made from now on watch by a poller of their own, or by the loop; None: for good."""
    _replace(monkeypatch, _server, "Hub", functools.partial(Hub, polled=polled))


def pretend_a_proactor(monkeypatch: pytest.MonkeyPatch | None) -> None:
    """Have the selector event loop taken for one that cannot watch descriptors; None: for good."""
    _replace(monkeypatch, _awaiting, "_Proactor", asyncio.SelectorEventLoop)


def _replace(monkeypatch: pytest.MonkeyPatch | None, module: Any, name: str, value: Any) -> None:
    if monkeypatch is None:
        setattr(module, name, value)
    else:
        monkeypatch.setattr(module, name, value)
