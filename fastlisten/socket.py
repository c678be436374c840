"""Drop-in for `socket`: what is made to listen does so with fastlisten.

Every name of the original is here and is the original, but for those that make sockets: `socket`, and
`create_server`, `fromfd` and `fromshare`, which return it.  What accept() returns is exactly the standard
`socket.socket`, as are the ends of socketpair() and create_connection(): each of them is an instance of
the drop-in's class too.
"""

from __future__ import annotations

import socket as _original
from socket import __all__ as __all__
from typing import TYPE_CHECKING, Any

from fastlisten._bind import adopt as _adopt
from fastlisten._core.standard import StandardSocket as _StandardSocket
from fastlisten._core.standard import create_server as _create_server
from fastlisten._core.standard import green_library as _green_library
from fastlisten._listener import Listener as _Listener


def __getattr__(name: str) -> Any:
    """Every name that is not defined here is the original's, as it is now."""
    return getattr(_original, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_original)})


def _stands_for_all(cls: type) -> bool:
    """Whether this is the drop-in's class itself, also one from before this module was loaded again."""
    return "_stands_for_all" in vars(cls)


class _SocketClass(type):
    """Every standard socket is an instance of the drop-in's class: accept() returns standard ones.

    Where a library has made the standard sockets green, calling it makes one of those.
    """

    @property
    def __signature__(cls) -> Any:
        """The arguments, as inspect and help() show them; __call__() would hide them."""
        import inspect

        made_by = inspect.signature(cls.__init__)  # type: ignore[misc]
        return made_by.replace(parameters=list(made_by.parameters.values())[1:])

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if _stands_for_all(cls) and _green_library():
            return _original.socket(*args, **options)
        return super().__call__(*args, **options)

    def __instancecheck__(cls, instance: object) -> bool:
        if _stands_for_all(cls):
            return isinstance(instance, _StandardSocket)
        return super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        if _stands_for_all(cls):
            return issubclass(subclass, _StandardSocket)
        return super().__subclasscheck__(subclass)


class socket(_Listener, metaclass=_SocketClass):  # noqa: N801
    """A standard socket that, set to listen, has fastlisten's accept loop; see fastlisten.Listener."""

    __module__ = _original.__name__  # its repr() is the original's
    _stands_for_all = True

    @staticmethod
    def _rebuild(rebuild: Any, arguments: Any) -> Any:
        """By a function, for the class would be looked for by the original's name."""
        return super(socket, socket)._rebuild(rebuild, arguments)


def create_server(
    address: Any,
    *,
    family: int = _original.AF_INET,
    backlog: int | None = None,
    reuse_port: bool = False,
    dualstack_ipv6: bool = False,
) -> socket:
    """As socket.create_server(), with its arguments, checks and errors."""
    made = _create_server(
        address, family=family, backlog=backlog, reuse_port=reuse_port, dualstack_ipv6=dualstack_ipv6
    )
    return made if _green_library() else _adopt(made, socket)  # type: ignore[return-value]


def fromfd(fd: int, family: int, type: int, proto: int = 0) -> socket:  # noqa: A002
    """As socket.fromfd(): a socket on a duplicate of the descriptor."""
    return socket(family, type, proto, _original.dup(fd))


if hasattr(_original, "fromshare"):

    def fromshare(info: bytes) -> socket:
        """As socket.fromshare(): the socket that socket.share() of another process was for."""
        return socket(0, 0, 0, info)  # type: ignore[arg-type]


if TYPE_CHECKING:  # last: what is defined above is not the original's
    from socket import *  # type: ignore[assignment]  # noqa: F403
