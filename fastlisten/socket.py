"""Drop-in for `socket`: what is made to listen does so with fastlisten.

Every name of the original is here and is the original, but for those that make sockets: `socket`, and
`create_server`, `fromfd` and `fromshare`, which return it.  What accept() returns is exactly the standard
`socket.socket`, as are the ends of socketpair() and create_connection(): each of them is an instance of
the drop-in's class too.
"""

from __future__ import annotations

import multiprocessing.reduction as _reduction
import socket as _original
from socket import __all__ as __all__
from typing import TYPE_CHECKING, Any

from fastlisten._bind import adopt as _adopt
from fastlisten._listener import Listener as _Listener


def __getattr__(name: str) -> Any:
    """Every name that is not defined here is the original's, as it is now."""
    return getattr(_original, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_original)})


class _SocketClass(type):
    """Every standard socket is an instance of the drop-in's class: accept() returns standard ones."""

    def __instancecheck__(cls, instance: object) -> bool:
        if cls is socket:
            return isinstance(instance, _original.socket)
        return super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        if cls is socket:
            return issubclass(subclass, _original.socket)
        return super().__subclasscheck__(subclass)


class socket(_Listener, metaclass=_SocketClass):  # noqa: N801
    """A standard socket that, set to listen, has fastlisten's accept loop; see fastlisten.Listener."""

    __module__ = _original.__name__  # its repr() is the original's


def create_server(
    address: Any,
    *,
    family: int = _original.AF_INET,
    backlog: int | None = None,
    reuse_port: bool = False,
    dualstack_ipv6: bool = False,
) -> socket:
    """As socket.create_server(), with its arguments, checks and errors."""
    made = _original.create_server(
        address, family=family, backlog=backlog, reuse_port=reuse_port, dualstack_ipv6=dualstack_ipv6
    )
    return _adopt(made, socket)


def fromfd(fd: int, family: int, type: int, proto: int = 0) -> socket:  # noqa: A002
    """As socket.fromfd(): a socket on a duplicate of the descriptor."""
    return socket(family, type, proto, _original.dup(fd))


if hasattr(_original, "fromshare"):

    def fromshare(info: bytes) -> socket:
        """As socket.fromshare(): the socket that socket.share() of another process was for."""
        return socket(0, 0, 0, info)  # type: ignore[arg-type]


# --- sending a socket to another process: multiprocessing -----------------------------------------


def _rebuild(dropin: bool, rebuild: Any, arguments: tuple[Any, ...]) -> _Listener:
    return _adopt(rebuild(*arguments), socket if dropin else _Listener)


def _reduce(sock: _Listener) -> tuple[Any, tuple[Any, ...]]:
    return _rebuild, (type(sock) is socket, *_reduction._reduce_socket(sock))  # type: ignore[attr-defined]


# multiprocessing finds its reducers by the exact class.
_reduction.register(_Listener, _reduce)
_reduction.register(socket, _reduce)


if TYPE_CHECKING:  # last: what is defined above is not the original's
    from socket import *  # type: ignore[assignment]  # noqa: F403
