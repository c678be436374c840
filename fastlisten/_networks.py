"""Networks, as options name them: text, or objects of ipaddress."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

Packed = tuple[int, bytes, int]
"""Family of `socket`, address, and how many bits of it count."""

_MAPPED = 96  # bits before an IPv4 address in an IPv6 one: RFC 4291, 2.5.5.2


def networks_of(option: str, networks: Iterable[str | Network | Address]) -> tuple[str, ...]:
    """The networks as text.  Raises TypeError for what is not several."""
    if isinstance(networks, str | bytes) or not isinstance(networks, Iterable):
        raise TypeError(f"{option} must be several networks, not {type(networks).__name__}")
    return tuple(map(str, networks))


def network_of(option: str, text: str, users: bool = False) -> Packed:
    """A network; an IPv4 one that is written as one of IPv6 is one of IPv4.

    "unix:" is whoever comes by a unix socket, with 0 bits; users: "unix:1000" is the user with that ID.
    Raises ValueError, which names the option.
    """
    if text.startswith("unix:"):
        return _users(option, text, users)
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    address, bits = network.network_address, network.prefixlen
    if isinstance(address, ipaddress.IPv4Address):
        return int(socket.AF_INET), address.packed, bits
    if address.scope_id is not None:
        raise ValueError(f"{option}: {text!r} has a scope, which is not compared")
    if address.ipv4_mapped is not None and bits >= _MAPPED:
        return int(socket.AF_INET), address.ipv4_mapped.packed, bits - _MAPPED
    return int(socket.AF_INET6), address.packed, bits


def _users(option: str, text: str, users: bool) -> Packed:
    family = getattr(socket, "AF_UNIX", None)
    if family is None:
        raise ValueError(f"{option}: {text} not supported on this platform")
    user = text.removeprefix("unix:")
    if not user:
        return int(family), b"", 0
    if not users or not (user.isascii() and user.isdigit()) or int(user) >= 2**32 - 1:
        raise ValueError(f"{option}: {text!r} is no {'user' if users else 'network'}")
    return int(family), int(user).to_bytes(4, "big"), 32
