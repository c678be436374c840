"""Proxy: from whom serve() takes PROXY headers."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Proxy:
    """Which peers are proxies that say, by a PROXY header, whose connection it is.

    trusted: their addresses and networks, as text ("10.0.0.0/8", "2001:db8::7") or objects of ipaddress;
    "unix:" is whoever comes by a unix socket.  An IPv4 peer of a listener for both families is one of IPv4.
    Each of them has to send a header, of version 1 or 2, before anything else.
    required: whether others are closed; if not, they are clients like any other, without a header.
    timeout: in so many seconds a header has to be there, all of it; at least 3 cover a lost packet.

    A header is refused that the specification (HAProxy's doc/proxy-protocol.txt) calls invalid, or that has
    more than 4,096 bytes; ListenerStats.refused_for counts.  LOCAL and UNKNOWN connections are served under
    the proxy's own address.

    Raises ValueError for what is no network, TypeError for another type.

    >>> proxy = Proxy(["10.0.0.0/8", "unix:"])
    >>> proxy
    Proxy(['10.0.0.0/8', 'unix:'], required=True, timeout=5.0)
    """

    def __init__(
        self,
        trusted: Iterable[str | Network | ipaddress.IPv4Address | ipaddress.IPv6Address],
        required: bool = True,
        timeout: float = 5.0,
    ) -> None:
        if isinstance(trusted, str | bytes):
            raise TypeError(f"trusted must be several networks, not {type(trusted).__name__}")
        if not isinstance(timeout, int | float):
            raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__}")
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0, not {timeout!r}")
        self._trusted = tuple(map(str, trusted))
        if not self._trusted:
            raise ValueError("trusted names no proxy")
        self._networks = tuple(map(_network, self._trusted))
        self._required = bool(required)
        self._timeout = min(float(timeout), 1e6)

    @property
    def trusted(self) -> tuple[str, ...]:
        """The addresses and networks, as text."""
        return self._trusted

    @property
    def required(self) -> bool:
        """Whether others are closed."""
        return self._required

    @property
    def timeout(self) -> float:
        """The time of a header, in seconds."""
        return self._timeout

    @property
    def networks(self) -> tuple[tuple[int, bytes, int], ...]:
        """(family, address, bits) of each of them: the family of `socket`, 0 bits for unix sockets."""
        return self._networks

    def __repr__(self) -> str:
        return f"Proxy({[*self._trusted]!r}, required={self._required}, timeout={self._timeout})"


def _network(text: str) -> tuple[int, bytes, int]:
    if text == "unix:":
        family = getattr(socket, "AF_UNIX", None)
        if family is None:
            raise ValueError("unix: not supported on this platform")
        return int(family), b"", 0
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"trusted: {error}") from None
    address, bits = network.network_address, network.prefixlen
    if isinstance(address, ipaddress.IPv4Address):
        return int(socket.AF_INET), address.packed, bits
    if address.scope_id is not None:
        raise ValueError(f"trusted: {text!r} has a scope, which is not compared")
    if address.ipv4_mapped is not None and bits >= 96:
        return int(socket.AF_INET), address.ipv4_mapped.packed, bits - 96
    return int(socket.AF_INET6), address.packed, bits
