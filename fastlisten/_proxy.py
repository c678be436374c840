"""Proxy: from whom serve() takes PROXY headers."""

from __future__ import annotations

from collections.abc import Iterable

from fastlisten._networks import Address, Network, Packed, network_of, networks_of


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

    >>> proxy = Proxy(["10.0.0.0/8", "2001:db8::7"])
    >>> proxy
    Proxy(['10.0.0.0/8', '2001:db8::7'], required=True, timeout=5.0)
    """

    def __init__(
        self,
        trusted: Iterable[str | Network | Address],
        required: bool = True,
        timeout: float = 5.0,
    ) -> None:
        names = networks_of("trusted", trusted)
        if not isinstance(timeout, int | float):
            raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__}")
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0, not {timeout!r}")
        self._trusted = names
        if not self._trusted:
            raise ValueError("trusted names no proxy")
        self._networks = tuple(network_of("trusted", text) for text in names)
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
    def networks(self) -> tuple[Packed, ...]:
        """(family, address, bits) of each of them: the family of `socket`, 0 bits for unix sockets."""
        return self._networks

    def __repr__(self) -> str:
        return f"Proxy({[*self._trusted]!r}, required={self._required}, timeout={self._timeout})"
