"""What an act gives, in a form in which two implementations can be compared."""

import socket
from collections.abc import Callable
from typing import Any


class Told(tuple[Any, ...]):
    """What an act gave: a value, or all that a caller can see of an exception."""

    __slots__ = ()


def told(act: Callable[..., Any], *arguments: Any) -> Told:
    """Run an act and describe its outcome so that two implementations can be compared.

    An exception is described by its class, errno, winerror, arguments, text and how it is
    chained; a value stands for itself. A socket that is returned is closed.
    """
    try:
        value = act(*arguments)
    except Exception as error:
        return Told(
            (
                type(error),
                getattr(error, "errno", "none"),
                getattr(error, "winerror", "none"),
                error.args,
                str(error),
                type(error.__cause__),
                error.__suppress_context__,
            )
        )
    if isinstance(value, socket.socket):
        value.close()
        return Told(("a socket",))
    return Told(("value", value))
