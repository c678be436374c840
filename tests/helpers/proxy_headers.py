"""PROXY headers, and a second reader of them: HAProxy's doc/proxy-protocol.txt in plain Python."""

import ipaddress
import os
import re
import socket
import struct
from typing import Any

from fastlisten import ProxyHeader

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
MOST = 4096

ALPN, AUTHORITY, CRC32C, NOOP, UNIQUE_ID, SSL, NETNS, GCP, AWS = 1, 2, 3, 4, 5, 0x20, 0x30, 0xE0, 0xEA


# --- headers -----------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """The checksum by its definition, RFC 9260, appendix A: a polynomial division, bits reflected."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tlv(number: int, value: bytes = b"") -> bytes:
    """One type, length and value."""
    return struct.pack("!BH", number, len(value)) + value


def inet(source: str = "192.0.2.1", port: int = 1000) -> bytes:
    """The address block of a TCP connection to 192.0.2.2, port 80, or of its like by IPv6."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    destination = "2001:db8::2" if ":" in source else "192.0.2.2"
    pack = socket.inet_pton
    return pack(family, source) + pack(family, destination) + struct.pack("!HH", port, 80)


def unix(source: bytes = b"/client", destination: bytes = b"/server") -> bytes:
    """The address block of a unix socket's connection."""
    return source.ljust(108, b"\0") + destination.ljust(108, b"\0")


def v2(block: bytes = b"", family: int = 0x11, command: int = 0x21, checksum: bool = False) -> bytes:
    """A header of version 2; block: addresses and TLVs.  With a checksum, one more TLV has it."""
    if checksum:
        block += tlv(CRC32C, bytes(4))
    header = SIGNATURE + struct.pack("!BBH", command, family, len(block)) + block
    return header[:-4] + struct.pack("!I", crc32c(header)) if checksum else header


def v1(source: str = "192.0.2.1", port: int = 1000) -> bytes:
    """A header of version 1."""
    family, destination = ("TCP6", "2001:db8::2") if ":" in source else ("TCP4", "192.0.2.2")
    return f"PROXY {family} {source} {destination} {port} 80\r\n".encode()


# --- the second reader -------------------------------------------------------------------------------------


class Invalid(Exception):  # noqa: N818
    """It is none."""


class More(Exception):  # noqa: N818
    """It is not whole."""


def read(data: bytes) -> ProxyHeader:
    """Read the header that `data` begins with; raises Invalid or More."""
    for signature, reader in ((b"PROXY ", _read_v1), (SIGNATURE, _read_v2)):
        if data[: len(signature)] == signature:
            return reader(data)
        if signature.startswith(data):
            raise More
    raise Invalid


NUMBER = r"(0|[1-9][0-9]*)"
ADDRESSES = re.compile(rf"PROXY TCP([46]) ([0-9a-fA-F:.]+) ([0-9a-fA-F:.]+) {NUMBER} {NUMBER}")


def _read_v1(data: bytes) -> ProxyHeader:
    line, end, _ = data[:107].partition(b"\r\n")
    if not end:
        if len(data) < 107:
            raise More
        raise Invalid
    length = len(line) + 2
    if line == b"PROXY UNKNOWN" or line.startswith(b"PROXY UNKNOWN "):
        return ProxyHeader(1, False, None, None, (), length)
    found = ADDRESSES.fullmatch(line.decode("latin-1"))
    if found is None:
        raise Invalid
    kind = ipaddress.IPv4Address if found[1] == "4" else ipaddress.IPv6Address
    try:
        hosts = [kind(found[2]).packed, kind(found[3]).packed]
    except ValueError:
        raise Invalid from None
    ports = [int(found[4]), int(found[5])]
    if max(ports) > 65535:
        raise Invalid
    source, destination = (_address(host, port) for host, port in zip(hosts, ports, strict=True))
    return ProxyHeader(1, False, source, destination, (), length)


def _address(host: bytes, port: int) -> Any:
    if len(host) == 4:
        return socket.inet_ntop(socket.AF_INET, host), port
    return socket.inet_ntop(socket.AF_INET6, host), port, 0, 0


def _path(name: bytes) -> Any:
    if name[:1] == b"\0" and name.strip(b"\0"):
        return name.rstrip(b"\0")
    return os.fsdecode(name.partition(b"\0")[0])


SIZES = {0: 0, 1: 4, 2: 16, 3: 108}


def _read_v2(data: bytes) -> ProxyHeader:
    fixed = data[12:16]
    if fixed and fixed[0] not in (0x20, 0x21):
        raise Invalid
    proxied = fixed[:1] == b"\x21"
    if proxied and len(fixed) > 1 and (fixed[1] >> 4 > 3 or fixed[1] & 15 > 2):
        raise Invalid
    if len(fixed) < 4:
        raise More
    family, stream = (fixed[1] >> 4, fixed[1] & 15 == 1) if proxied else (0, False)
    size = SIZES[family]
    addresses = 2 * size + (4 if family in (1, 2) else 0)
    length = 16 + int.from_bytes(fixed[2:], "big")
    if length > MOST or length < 16 + addresses:
        raise Invalid
    if len(data) < length:
        raise More
    if not proxied:
        return ProxyHeader(2, True, None, None, (), length)
    tlvs = _tlvs(data[16 + addresses : length])
    if tlvs is None:
        if family:
            raise Invalid
        tlvs = ()
    _check(tlvs, data[:length], 16 + addresses)
    source = destination = None
    if stream and family:
        hosts = data[16 : 16 + size], data[16 + size : 16 + 2 * size]
        if family == 3:
            source, destination = map(_path, hosts)
        else:
            ports = struct.unpack("!HH", data[16 + 2 * size : 16 + addresses])
            source, destination = map(_address, hosts, ports)
    return ProxyHeader(2, False, source, destination, tlvs, length)


def _tlvs(block: bytes) -> tuple[tuple[int, bytes], ...] | None:
    found = []
    while block:
        if len(block) < 3:
            return None
        number, size = struct.unpack("!BH", block[:3])
        if len(block) < 3 + size:
            return None
        found.append((number, block[3 : 3 + size]))
        block = block[3 + size :]
    return tuple(found)


def _check(tlvs: tuple[tuple[int, bytes], ...], header: bytes, at: int) -> None:
    sums = 0
    for number, value in tlvs:
        if number == CRC32C:
            sums += 1
            if len(value) != 4 or sums > 1:
                raise Invalid
            without = header[: at + 3] + bytes(4) + header[at + 7 :]
            if crc32c(without) != int.from_bytes(value, "big"):
                raise Invalid
        elif (number == UNIQUE_ID and len(value) > 128) or (
            number == SSL and (len(value) < 5 or _tlvs(value[5:]) is None)
        ):
            raise Invalid
        at += 3 + len(value)
