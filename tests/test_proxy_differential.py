"""PROXY headers as Twisted and aiosmtpd read them: they agree with us, but for what is listed here.

Each difference names the section of HAProxy's doc/proxy-protocol.txt that says who is right.
"""

import functools
import ipaddress
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings

from fastlisten import ProxyHeader
from fastlisten._core.proxy import parse
from helpers.fuzzing import Fuzz
from helpers.header_table import INVALID, VALID
from helpers.proxy_headers import NOOP, inet, tlv, v1, v2
from helpers.random_headers import damaged

HEADERS = {**{name: header for name, (header, _) in VALID.items()}, **INVALID}
REFUSED = "refused"


class Meant(NamedTuple):
    """What a header means: both addresses, None for none, and what follows it."""

    source: Any
    destination: Any
    rest: bytes


Answer = Meant | str  # REFUSED, or why it is


def address(host: Any, port: int | None) -> Any:
    """Return an address in the form that all are compared in; a host that is none as it is."""
    if isinstance(host, str):
        try:
            host = ipaddress.ip_address(host)
        except ValueError:
            return host, port
    return host, port


def path(name: bytes) -> bytes:
    """Return what stands before the zeros; an abstract name begins with one."""
    return name.rstrip(b"\0") if name[:1] == b"\0" else name.partition(b"\0")[0]


# --- the readers


def ours(data: bytes) -> tuple[ProxyHeader | None, Answer]:
    """Return the header, and what it means; or None, and why it is none."""

    def plain(found: Any) -> Any:
        if isinstance(found, tuple):
            return address(*found[:2])
        return found if found is None else path(os.fsencode(found))

    try:
        header = parse(data)
    except ValueError as error:
        return None, str(error)
    assert header is not None, "the examples are whole"
    return header, Meant(plain(header.source), plain(header.destination), data[header.length :])


@functools.cache
def twisted_wrapper() -> Callable[[], tuple[Any, Any]]:
    """Return what makes a protocol behind Twisted's reader, and its transport."""
    pytest.importorskip("twisted.protocols.haproxy")
    from twisted.internet.protocol import Factory, Protocol
    from twisted.internet.testing import StringTransport
    from twisted.protocols.haproxy._wrapper import HAProxyWrappingFactory

    class Received(Protocol):  # type: ignore[misc, unused-ignore]
        def connectionMade(self) -> None:  # noqa: N802
            self.data = b""

        def dataReceived(self, data: bytes) -> None:  # noqa: N802
            self.data += data

    wrapping: Any = HAProxyWrappingFactory
    kind: Any = StringTransport
    factory = wrapping(Factory.forProtocol(Received))

    def make() -> tuple[Any, Any]:
        transport = kind()
        protocol = factory.buildProtocol(transport.getPeer())
        protocol.makeConnection(transport)
        return protocol, transport

    return make


def by_twisted(data: bytes) -> Answer:
    protocol, transport = twisted_wrapper()()

    def plain(found: Any, own: Any) -> Any:
        if found == own:
            return None
        return path(found.name) if hasattr(found, "name") else address(found.host, found.port)

    try:
        protocol.dataReceived(data)
    except Exception:  # the reactor ends a connection whose protocol raises
        return REFUSED
    if transport.disconnecting:
        return REFUSED
    source = plain(protocol.getPeer(), transport.getPeer())
    return Meant(source, plain(protocol.getHost(), transport.getHost()), protocol.wrappedProtocol.data)


class Reader:
    """As much of asyncio.StreamReader as aiosmtpd asks for; all has come."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def read(self, number: int) -> bytes:
        found, self.data = self.data[:number], self.data[number:]
        return found

    async def readexactly(self, number: int) -> bytes:
        if number > len(self.data):
            raise EOFError
        return await self.read(number)

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        return await self.readexactly(self.data.index(separator) + len(separator))


def by_aiosmtpd(data: bytes) -> Answer:
    module = pytest.importorskip("aiosmtpd.proxy_protocol")
    reader = Reader(data)
    try:
        module.get_proxy(reader).send(None)
    except StopIteration as done:
        found = done.value
    if not found.valid:
        return REFUSED
    if isinstance(found.src_addr, bytes):
        return Meant(path(found.src_addr), path(found.dst_addr), reader.data)
    if found.src_addr is None:
        return Meant(None, None, reader.data)
    source, destination = (found.src_addr, found.src_port), (found.dst_addr, found.dst_port)
    return Meant(address(*source), address(*destination), reader.data)


# --- where they differ


class Case(NamedTuple):
    """A header that is read differently: the bytes, our header or None, and both answers."""

    data: bytes
    header: ProxyHeader | None
    we: Answer
    they: Answer

    def we_refuse(self, *reasons: str) -> bool:
        return isinstance(self.we, str) and any(reason in self.we for reason in reasons)

    def ports(self) -> list[bytes]:
        """Return what stands where version 1 has them."""
        return self.data.partition(b"\r\n")[0].split(b" ")[4:]


class Difference(NamedTuple):
    """Why something is read differently, an example, and whether a case is one of these."""

    why: str
    example: bytes
    applies: Callable[[Case], bool]


EVERYBODY = [
    Difference(
        "2.2: TLVs have to fit and a checksum to be right, or the connection ends; they look at neither",
        INVALID["v2 a wrong checksum"],
        lambda case: case.we_refuse("TLVs", "checksum", "unique id"),
    ),
    Difference(
        "more than 4096 bytes: a limit of ours; section 2 wants a header in one segment",
        v2(inet() + tlv(NOOP, bytes(4097 - 16 - 12 - 3))),
        lambda case: case.we_refuse("4096"),
    ),
    Difference(
        "2.2: the addresses of a datagram are none of a stream; they take them",
        v2(inet(), 0x12),
        lambda case: bool(case.header and not case.header.local and case.data[13] & 15 == 2),
    ),
    Difference(
        "2.2: an unspecified transport 'the receiver is free to accept', and need not if it is short",
        v2(inet()[:-1], 0x10),
        lambda case: case.we_refuse("hold the addresses") and case.data[13] & 15 == 0,
    ),
]
TWISTED = [
    *EVERYBODY,
    Difference(
        "2.1: 'PROXY UNKNOWN' with CRLF is the whole line; it wants a space after it",
        b"PROXY UNKNOWN\r\n",
        lambda case: case.data.startswith(b"PROXY UNKNOWN\r\n"),
    ),
    Difference(
        "2.1: what is no address or port, and a line of over 107 bytes, is invalid; it does not look",
        v1("192.0.2.256"),
        lambda case: case.we_refuse("addresses or ports", "no CRLF in the first 107 bytes"),
    ),
]
AIOSMTPD = [
    *EVERYBODY,
    Difference(
        "2.2: with LOCAL the family and the block are to be ignored; it reads them",
        v2(inet(), command=0x20),
        lambda case: bool(case.header and case.header.local),
    ),
    Difference(
        "2.1: what follows UNKNOWN is to be ignored up to CRLF; a lone LF ends the line there",
        b"PROXY UNKNOWN a\nb\r\n",
        lambda case: case.data.startswith(b"PROXY UNKNOWN ") and case.they == REFUSED,
    ),
    Difference(
        "2.1: TCP4 and TCP6 are all families; it takes what begins with TCP and ends with 4 or 6",
        v1().replace(b"TCP4", b"TCP44"),
        lambda case: case.we_refuse("neither TCP4") and case.data[6:9] == b"TCP",
    ),
    Difference(
        "2.1: a port is digits; it takes what int() does",
        v1().replace(b"1000", b"1_0"),
        lambda case: case.we_refuse("addresses or ports") and not all(map(bytes.isdigit, case.ports())),
    ),
]

READERS = {"twisted": (by_twisted, TWISTED), "aiosmtpd": (by_aiosmtpd, AIOSMTPD)}
readers = pytest.mark.parametrize(("read", "differences"), READERS.values(), ids=READERS.keys())


def compare(data: bytes, read: Callable[[bytes], Answer], differences: list[Difference]) -> list[str]:
    """Return why both answers differ; nothing when they agree.  A difference that is not listed fails."""
    data += bytes(1 << 16)  # so that it is whole, whatever length it says
    header, we = ours(data)
    case = Case(data, header, we, read(data))
    if we == case.they or (isinstance(we, str) and case.they == REFUSED):
        return []
    found = [difference.why for difference in differences if difference.applies(case)]
    assert found, case
    return found


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("mail.debug").setLevel(logging.CRITICAL)  # aiosmtpd's, which warns of each


@readers
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_headers_of_the_table(header: bytes, read: Any, differences: list[Difference]) -> None:
    compare(header, read, differences)


@readers
def test_each_difference_is_one(read: Any, differences: list[Difference]) -> None:
    for difference in differences:
        assert difference.why in compare(difference.example, read, differences)


@readers
def test_random_headers(read: Any, differences: list[Difference], fuzz: Fuzz) -> None:
    def test(how: settings) -> None:
        @how
        @given(damaged())
        def one(data: bytes) -> None:
            fuzz.count += 1
            compare(data, read, differences)

        one()

    fuzz.run(test, examples=200)
