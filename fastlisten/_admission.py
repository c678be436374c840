"""Admission: who may come in, by address, and how many of one source."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fastlisten._core.admission import WAYS, Table, bytes_for, now
from fastlisten._networks import Address, Network, Packed, network_of, networks_of
from fastlisten._shared_memory import shared_memory

# 256 MiB; more sources than this are a mistake.
MOST_SOURCES = 2**22

# Connections that can be counted, for each source that is remembered; 16 bytes each.
_LEASES = 4
_LEAST_LEASES = 2**16

# The limits' times, in seconds, as they fit into 64 bits of nanoseconds, with room for the clock.
_LONGEST = 1e9

_UNIX = int(getattr(socket, "AF_UNIX", -1))
_KINDS = {_UNIX: 1, int(socket.AF_INET): 4, int(socket.AF_INET6): 6}  # as admission.h has them
_WIDTH = 16  # bytes of a key after its kind


class AdmissionStats(NamedTuple):
    """What an Admission has counted, in all processes that share it.

    admitted: clients that came in.  refused: {reason: count} of those that did not, or with dry_run would not
    have: "denied", "not allowed", "penalised", "concurrent", "rate".  open: connections that count now, with
    `concurrent`.  sources: how many are remembered.  replaced: how often one was forgotten for another.

    >>> import fastlisten
    >>> fastlisten.Admission(deny=["192.0.2.0/24"]).stats().refused["denied"]
    Traceback (most recent call last):
    ...
    KeyError: 'denied'
    """

    admitted: int
    refused: Mapping[str, int]
    open: int
    sources: int
    replaced: int


class Admission:
    """Who may come in: asked without Python, before a client costs a handler, or any of Python's code.

    allow: networks whose clients may come in, and no others; none means everybody.  deny: networks whose
    clients may not.  exempt: networks that neither `allow` nor a limit holds for.  Each is an address or a
    network, as text ("10.0.0.0/8", "2001:db8::7") or an object of ipaddress; "unix:" is whoever comes by a
    unix socket, "unix:1000" the user with that ID.  What they have in common does not matter: deny is asked
    first, then exempt, then allow.  An IPv4 client of a listener for both families is one of IPv4.
    concurrent: connections that a source may have at a time; they count until they are closed, detached or
    taken over by socket().
    rate: connections that a source may begin in a second, on average, which may be a fraction.  burst: how
    many may come at once; without it as many as in a second.  (The generic cell rate algorithm: ITU-T I.371.)
    prefix4, prefix6: the addresses of a network of so many bits are one source; so is a unix user.
    sources: how many are remembered, 64 bytes each: of eight that share a place the one used last the longest
    time ago is forgotten for a new one, those with a penalty or open connections after the others.
    dry_run: let everybody in, and count as if not.

    One Admission may be served with by several listeners, threads and, made before they begin, worker
    processes, and is one for all of them.  Who is refused is told what `busy` says, without it nothing: he is
    closed; ListenerStats.refused_for counts by reason.  The logger `fastlisten` gets a line at the first
    refusal, then one a minute at most, and the rest when a server ends.  Behind a proxy (serve(proxy=...))
    the client whom the header names is asked about, and not the proxy.

    Raises TypeError and ValueError for what cannot be meant.

    >>> import fastlisten
    >>> admission = fastlisten.Admission(deny=["198.51.100.0/24"], concurrent=20, rate=10, burst=50)
    >>> admission.penalise("192.0.2.1", seconds=60)
    >>> admission.stats().admitted
    0
    """

    def __init__(
        self,
        allow: Iterable[str | Network | Address] = (),
        deny: Iterable[str | Network | Address] = (),
        concurrent: int | None = None,
        rate: float | None = None,
        burst: int | None = None,
        prefix4: int = 32,
        prefix6: int = 64,
        sources: int = 65536,
        exempt: Iterable[str | Network | Address] = (),
        dry_run: bool = False,
    ) -> None:
        interval, tolerance = _rate(rate, burst)
        self._lists = {
            "allow": networks_of("allow", allow),
            "deny": networks_of("deny", deny),
            "exempt": networks_of("exempt", exempt),
        }
        sources = _whole("sources", sources, 1, MOST_SOURCES)
        concurrent = 0 if concurrent is None else _whole("concurrent", concurrent, 1, 2**31 - 1)
        self._init(
            {
                "buckets": 1 << (-(-sources // WAYS) - 1).bit_length(),
                "leases": max(_LEASES * sources, _LEAST_LEASES) if concurrent else 0,
                **{name: _ranges(name, networks) for name, networks in self._lists.items()},
                "concurrent": concurrent,
                "interval": interval,
                "tolerance": tolerance,
                "prefix4": _whole("prefix4", prefix4, 0, 32),
                "prefix6": _whole("prefix6", prefix6, 0, 128),
                "dry_run": bool(dry_run),
            }
        )

    def _init(self, what: dict[str, Any], name: int | str | None = None) -> None:
        """name: of the memory in which another process has the table."""
        self._what = what
        self._name = name
        self._length = bytes_for(what["buckets"], what["leases"])
        memory, _ = shared_memory(self._length, name=name)
        self._table = Table(memory, secret=b"" if name is not None else os.urandom(16), **what)

    def __del__(self) -> None:
        if isinstance(self.__dict__.get("_name"), int):
            os.close(self._name)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        lists = [f"{name}={[*networks]!r}" for name, networks in self._lists.items() if networks]
        return f"<{' '.join(['Admission', *lists])} {self.stats()}>"

    def penalise(self, address: Any, seconds: float) -> None:
        """Refuse the source of this address for so many seconds from now; a longer penalty stays.

        address: text, an object of ipaddress, what `connection.peer` gives, or "unix:1000" for a user; what
        has no source, as the path of a unix peer, has no effect.  Connections that are open stay.  A handler,
        and any thread, may call it.  Raises ValueError for what is no address, and for less than 0 seconds.
        """
        if not isinstance(seconds, int | float):
            raise TypeError(f"seconds must be a number, not {type(seconds).__name__}")
        if not seconds >= 0:
            raise ValueError(f"seconds must not be negative, not {seconds!r}")
        key = _key(address)
        if key is not None:
            self._table.penalise(key, now(), now() + int(min(seconds, _LONGEST) * 1e9))

    def release(self, address: Any) -> None:
        """End the penalty of the source of this address, if it has one; as penalise()."""
        key = _key(address)
        if key is not None:
            self._table.release(key)

    def stats(self) -> AdmissionStats:
        """The counters as they are now."""
        counts = self._table.counts()
        return AdmissionStats(**{**counts, "refused": MappingProxyType(counts["refused"])})

    # --- for serve() and workers ----------------------------------------------------------------------

    @property
    def table(self) -> Table:
        """What the core asks."""
        return self._table

    def share(self) -> tuple[dict[str, Any], int | str]:
        """What another process makes it from, by Admission.shared().

        Where that has a descriptor, the process has to inherit it.  Raises RuntimeError when this process
        serves with it already.
        """
        if self._name is None:
            memory, name = shared_memory(self._length, named=True)
            try:
                self._table.move(memory)
            except BaseException:
                if isinstance(name, int):
                    os.close(name)
                raise
            self._name = name
        assert self._name is not None
        return {"lists": self._lists, **self._what}, self._name

    @classmethod
    def shared(cls, what: dict[str, Any], name: int | str | None) -> Admission:
        """The Admission of another process; name: None for one of its own that is like that."""
        self = cls.__new__(cls)
        what = dict(what)
        self._lists = what.pop("lists")
        self._init(what, name)
        return self


def _whole(name: str, value: object, least: int, most: int) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {value}")
    return int(value)


def _rate(rate: object, burst: object) -> tuple[int, int]:
    """The interval and the tolerance of GCRA, in ns."""
    if rate is None:
        if burst is not None:
            raise ValueError("burst is only meaningful with rate")
        return 0, 0
    if not isinstance(rate, int | float):
        raise TypeError(f"rate must be a number of connections a second, not {type(rate).__name__}")
    if not 1 / _LONGEST <= rate <= 1e9:
        raise ValueError(f"rate must be above 0 and at most 1e9 connections a second, not {rate!r}")
    most = _whole("burst", max(1, int(rate)) if burst is None else burst, 1, 2**31 - 1)
    interval = round(1e9 / rate)
    if interval * most > _LONGEST * 1e9:
        raise ValueError(f"burst={most} connections at rate={rate!r} a second are too many to count")
    return interval, interval * (most - 1)


# --- keys: a kind and an address, from the left


def _range(network: Packed) -> tuple[bytes, bytes]:
    """The first and the last key of a network."""
    family, address, bits = network
    kind = bytes([_KINDS[family]])
    first = int.from_bytes(address.ljust(_WIDTH, b"\0"), "big")
    last = first | ((1 << (8 * _WIDTH - bits)) - 1)
    return kind + first.to_bytes(_WIDTH, "big"), kind + last.to_bytes(_WIDTH, "big")


def _ranges(option: str, networks: Iterable[str]) -> bytes:
    """The ranges of these networks, in order; what they have in common is in one."""
    merged: list[tuple[bytes, bytes]] = []
    for first, last in sorted(_range(network_of(option, text, users=True)) for text in networks):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return b"".join(first + last for first, last in merged)


def _key(address: Any) -> bytes | None:
    """The key of an address; None for the peer of a unix socket, which has no address."""
    if isinstance(address, tuple) and address:
        address = address[0]
    if isinstance(address, bytes) or address is None or address == "":
        return None
    if isinstance(address, str):
        if address.startswith("/"):
            return None
        address = address.partition("%")[0]  # the scope of a link-local address
    elif not isinstance(address, Address):
        raise TypeError(f"address must be text or an address, not {type(address).__name__}")
    family, packed, bits = network_of("address", str(address), users=True)
    if bits < (8 * len(packed) or 1):
        raise ValueError(f"address: {address!r} is none of one client")
    return _range((family, packed, bits))[0]
