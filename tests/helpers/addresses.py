"""Addresses: any free port, of nobody, of this process, and of a server as its clients reach it."""

import os
import sys
from typing import Any

LOOPBACK = ("127.0.0.1", 0)
# A name that no resolver knows and none is asked for: "!" is in no host name, and libc sees that itself.
NOWHERE = "no!such!host.invalid"
# An address of no machine, RFC 5737.
NOBODYS = "192.0.2.1"


def reachable(address: Any) -> Any:
    """Return the address a client connects to: the loopback one where a server has them all."""
    if isinstance(address, tuple) and address[0] in ("0.0.0.0", "::"):
        return ("::1" if ":" in address[0] else "127.0.0.1", *address[1:])
    return address


def own_loopback() -> str:
    """Return a loopback address that no other process's test binds a port of, where there is more than one.

    A port that was given back there can be bound again: nobody was given it in between.
    """
    if sys.platform not in ("linux", "win32"):
        return "127.0.0.1"
    # Wine counts its processes from the beginning, but binds its host's addresses.
    first, number = (64 if os.name == "posix" else 128), os.getpid()
    return f"127.{first + (number >> 16) % 64}.{number >> 8 & 255}.{number & 255}"
