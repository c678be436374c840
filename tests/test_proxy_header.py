"""PROXY headers: what each of a table means, and the parser against a second reader of them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastlisten._core.proxy import parse
from fastlisten._core.proxy_header import ProxyHeader, ProxySSL
from helpers import needs
from helpers.fuzz_targets import try_examples
from helpers.proxy_headers import (
    ALPN,
    AUTHORITY,
    AWS,
    CRC32C,
    GCP,
    NETNS,
    NOOP,
    SIGNATURE,
    SSL,
    UNIQUE_ID,
    Invalid,
    More,
    inet,
    read,
    tlv,
    unix,
    v1,
    v2,
)

WORST = b"PROXY UNKNOWN " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2 + [b"65535"] * 2) + b"\r\n"
INET = (("192.0.2.1", 1000), ("192.0.2.2", 80))
INET6 = (("2001:db8::1", 1000, 0, 0), ("2001:db8::2", 80, 0, 0))
NONE = (None, None)

# What is valid: the header, and both addresses.
VALID: dict[str, tuple[bytes, Any]] = {
    "v1 TCP4": (v1(), INET),
    "v1 TCP6": (v1("2001:db8::1"), INET6),
    "v1 TCP6, capitals and zeros": (v1("2001:0DB8:0000:0000:0000:0000:0000:0001"), INET6),
    "v1 TCP6, a group for a gap": (v1("1:2:3:4::6:7:8"), (("1:2:3:4:0:6:7:8", 1000, 0, 0), INET6[1])),
    "v1 TCP6, mapped": (v1("::ffff:192.0.2.1"), (("::ffff:192.0.2.1", 1000, 0, 0), INET6[1])),
    "v1 TCP6, any": (v1("::"), (("::", 1000, 0, 0), INET6[1])),
    "v1 ports at their limits": (
        b"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n",
        (("0.0.0.0", 0), ("255.255.255.255", 65535)),
    ),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", NONE),
    "v1 UNKNOWN of 107 bytes": (WORST, NONE),
    "v1 UNKNOWN with anything": (b"PROXY UNKNOWN \n\r\xff \r\r\n", NONE),
    "v2 TCP4": (v2(inet()), INET),
    "v2 TCP6": (v2(inet("2001:db8::1"), 0x21), INET6),
    "v2 unix": (v2(unix(), 0x31), ("/client", "/server")),
    "v2 unix, abstract and unnamed": (v2(unix(b"\0name", b""), 0x31), (b"\0name", "")),
    "v2 unix, the longest": (v2(unix(b"/" * 108), 0x31), ("/" * 108, "/server")),
    "v2 LOCAL": (v2(b"", 0, 0x20), NONE),
    "v2 LOCAL with a family that there is not, and a block": (v2(b"\1\2\3", 0xFF, 0x20), NONE),
    "v2 UNSPEC": (v2(b"", 0), NONE),
    "v2 UNSPEC with addresses": (v2(inet(), 0), NONE),
    "v2 UNSPEC with a TLV": (v2(tlv(UNIQUE_ID, b"7"), 0), NONE),
    "v2 UDP4": (v2(inet(), 0x12), NONE),
    "v2 UDP6": (v2(inet("2001:db8::1"), 0x22), NONE),
    "v2 unix datagram": (v2(unix(), 0x32), NONE),
    "v2 TCP4 without a transport": (v2(inet(), 0x10), NONE),
    "v2 a stream of no family": (v2(b"", 0x01), NONE),
    "v2 with a checksum": (v2(inet(), checksum=True), INET),
    "v2 an unknown TLV": (v2(inet() + tlv(0x99, b"what")), INET),
    "v2 an empty TLV": (v2(inet() + tlv(NOOP)), INET),
    "v2 a unique id of 128 bytes": (v2(inet() + tlv(UNIQUE_ID, bytes(128))), INET),
    "v2 SSL without TLVs": (v2(inet() + tlv(SSL, bytes(5))), INET),
    "v2 of 4096 bytes": (v2(inet() + tlv(NOOP, bytes(4096 - 16 - 12 - 3))), INET),
}

# What is not, however much follows.
INVALID: dict[str, bytes] = {
    "another protocol": b"GET / HTTP/1.1\r\n",
    "TLS": b"\x16\x03\x01\x02\x00",
    "a signature that breaks off": SIGNATURE[:11] + b"\r",
    "v1 small letters": v1().lower(),
    "v1 no space": b"PROXYTCP4 192.0.2.1 192.0.2.2 1000 80\r\n",
    "v1 two spaces": v1().replace(b"TCP4 ", b"TCP4  "),
    "v1 a space at the end": v1().replace(b"\r\n", b" \r\n"),
    "v1 a tab": v1().replace(b" 80", b"\t80"),
    "v1 UDP4": v1().replace(b"TCP", b"UDP"),
    "v1 UNKNOWNS": b"PROXY UNKNOWNS\r\n",
    "v1 nothing": b"PROXY \r\n",
    "v1 no ports": b"PROXY TCP4 192.0.2.1 192.0.2.2\r\n",
    "v1 one port": b"PROXY TCP4 192.0.2.1 192.0.2.2 1000\r\n",
    "v1 a port too many": v1().replace(b" 80", b" 80 80"),
    "v1 a port over 65535": v1(port=65536),
    "v1 a port over all numbers": v1(port=10**40),
    "v1 a port below 0": v1(port=-1),
    "v1 a port with a sign": v1().replace(b" 80", b" +80"),
    "v1 a port with a zero before it": v1().replace(b" 80", b" 080"),
    "v1 a zero before a number": v1("192.0.02.1"),
    "v1 a number over 255": v1("192.0.2.256"),
    "v1 three numbers": v1("192.0.2"),
    "v1 five numbers": v1("192.0.2.1.1"),
    "v1 a hexadecimal number": v1("0xc0.0.2.1"),
    "v1 TCP4 with an IPv6 address": v1("2001:db8::1").replace(b"TCP6", b"TCP4"),
    "v1 TCP6 with an IPv4 address": v1().replace(b"TCP4", b"TCP6"),
    "v1 a mixed pair": b"PROXY TCP6 ::1 192.0.2.2 1 2\r\n",
    "v1 five digits": v1("2001:0db80::1"),
    "v1 seven groups": v1("1:2:3:4:5:6:7"),
    "v1 nine groups": v1("1:2:3:4:5:6:7:8:9"),
    "v1 two gaps": v1("1::2::3"),
    "v1 a gap of nothing": v1("1:2:3:4::5:6:7:8"),
    "v1 a gap of nothing at the end": v1("1:2:3:4:5:6:7:8::"),
    "v1 three colons": v1("1:::2"),
    "v1 a colon at the end": v1("1:2:3:4:5:6:7:"),
    "v1 a colon at the beginning": v1(":1:2:3:4:5:6:7"),
    "v1 a scope": v1("fe80::1%1"),
    "v1 an IPv4 address in the middle": v1("1:192.0.2.1::"),
    "v1 107 bytes without an end": WORST[:-2] + b"ff",
    "v1 of 108 bytes": WORST.replace(b"\r\n", b"f\r\n"),
    "v1 LF alone": v1().replace(b"\r\n", b"\n") + b"\r\n",
    "v1 CR alone": v1().replace(b"\r\n", b"\r") + b"\r\n",
    "v1 NUL": v1().replace(b" 80", b" 80\0"),
    "v2 version 1": v2(inet(), command=0x11),
    "v2 version 3": v2(inet(), command=0x31),
    "v2 an unknown command": v2(inet(), command=0x22),
    "v2 an unknown family": v2(inet(), 0x41),
    "v2 an unknown transport": v2(inet(), 0x13),
    "v2 TCP4 one byte short": v2(inet()[:-1]),
    "v2 TCP6 one byte short": v2(inet("2001:db8::1")[:-1], 0x21),
    "v2 unix one byte short": v2(unix()[:-1], 0x31),
    "v2 UDP4 one byte short": v2(inet()[:-1], 0x12),
    "v2 one byte long": v2(inet() + b"\0"),
    "v2 a TLV without its length": v2(inet() + b"\4\0"),
    "v2 a TLV one byte short": v2(inet() + tlv(NOOP, b"12")[:-1]),
    "v2 a wrong checksum": v2(inet(), checksum=True)[:-1] + b"\0",
    "v2 a checksum of 3 bytes": v2(inet() + tlv(CRC32C, bytes(3))),
    "v2 two checksums": v2(inet() + tlv(CRC32C, bytes(4)), checksum=True),
    "v2 a unique id of 129 bytes": v2(inet() + tlv(UNIQUE_ID, bytes(129))),
    "v2 SSL of 4 bytes": v2(inet() + tlv(SSL, bytes(4))),
    "v2 SSL with a TLV that does not fit": v2(inet() + tlv(SSL, bytes(5) + tlv(0x21, b"12")[:-1])),
    "v2 of 4097 bytes": v2(inet() + tlv(NOOP, bytes(4097 - 16 - 12 - 3))),
    "v2 of 65551 bytes": SIGNATURE + b"\x21\x11\xff\xff",
}


@pytest.mark.parametrize(("header", "addresses"), VALID.values(), ids=VALID.keys())
def test_what_is_valid(header: bytes, addresses: Any) -> None:
    for rest in (b"", b"\r\n", b"PROXY", bytes(5000)):
        found = parse(header + rest)
        assert found is not None
        assert (found.source, found.destination) == addresses
        assert found.length == len(header)
    assert [parse(header[:n]) for n in range(len(header))] == [None] * len(header)


@pytest.mark.parametrize("header", INVALID.values(), ids=INVALID.keys())
def test_what_is_invalid(header: bytes) -> None:
    for rest in (b"", b"\r\n", bytes(5000)):
        with pytest.raises(ValueError, match=r"\w"):
            parse(header + rest)


def test_what_the_tlvs_say() -> None:
    ssl = b"\x05" + bytes(4) + tlv(0x21, b"TLSv1.3") + tlv(0x22, b"caf\xc3\xa9") + tlv(0x23, b"AES")
    said = (
        tlv(ALPN, b"h2")
        + tlv(AUTHORITY, b"example.org")
        + tlv(NOOP, b"x")
        + tlv(UNIQUE_ID, b"\xff7")
        + tlv(SSL, ssl + tlv(0x24, b"SHA256") + tlv(0x25, b"RSA2048"))
        + tlv(NETNS, b"blue")
        + tlv(AWS, b"\x01vpce-08d2bf15fac5001c9")
        + tlv(GCP, (2**40).to_bytes(8, "big"))
        + tlv(0xFF, b"last")
    )
    found = parse(v2(inet() + said, checksum=True) + b"payload")
    assert isinstance(found, ProxyHeader)
    assert (found.version, found.local) == (2, False)
    assert (found.alpn, found.authority, found.unique_id) == (b"h2", "example.org", b"\xff7")
    assert (found.netns, found.tlv(0xFF), found.tlv(0x77)) == ("blue", b"last", None)
    assert (found.aws_vpc_endpoint, found.gcp_psc_connection) == ("vpce-08d2bf15fac5001c9", 2**40)
    assert isinstance(found.ssl, ProxySSL)
    assert found.ssl[:3] == (True, True, True)
    assert (found.ssl.version, found.ssl.common_name, found.ssl.cipher) == ("TLSv1.3", "café", "AES")
    assert (found.ssl.signature_algorithm, found.ssl.key_algorithm) == ("SHA256", "RSA2048")
    assert [number for number, _ in found.tlvs] == [1, 2, 4, 5, 0x20, 0x30, 0xEA, 0xE0, 0xFF, 3]


def test_what_no_tlv_says() -> None:
    found = parse(v2(inet()))
    assert found is not None
    for name in ("alpn", "authority", "unique_id", "ssl", "netns", "aws_vpc_endpoint", "gcp_psc_connection"):
        assert getattr(found, name) is None
    odd = parse(v2(inet() + tlv(AWS, b"\x02x") + tlv(GCP, b"1234") + tlv(AUTHORITY, b"\xff")))
    assert odd is not None
    assert (odd.aws_vpc_endpoint, odd.gcp_psc_connection) == (None, None)
    assert odd.authority == "\udcff"
    unverified = parse(v2(inet() + tlv(SSL, b"\x01\0\0\0\x01")))
    assert unverified is not None
    assert unverified.ssl is not None
    assert unverified.ssl[:3] == (True, False, False)


# --- against the second reader


def both(data: bytes) -> Any:
    """What both make of these bytes: the header's fields, None while it is not whole, "invalid"."""
    try:
        expected: Any = tuple(read(data))
    except Invalid:
        expected = "invalid"
    except More:
        expected = None
    try:
        header = parse(data)
        found: Any = header if header is None else tuple(header)
    except ValueError:
        found = "invalid"
    assert found == expected
    return found


def in_all_ways(data: bytes) -> None:
    """One byte at a time and in one piece there is one answer, which stays, and both readers give it."""
    answer = None
    for end in range(len(data) + 1):
        before, answer = answer, both(data[:end])
        assert before in (None, answer)


blocks = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 4, 5, 0x20, 0x30, 0xE0, 0xEA, 0x99]), st.binary(max_size=12)),
    max_size=3,
).map(lambda found: b"".join(tlv(number, value) for number, value in found))
families = {
    0x11: inet(),
    0x21: inet("2001:db8::1"),
    0x31: unix(),
    0x12: inet(),
    0x00: b"",
    0x10: inet(),
    0x41: b"",
}
binary = st.builds(
    lambda family, block, command, checksum: v2(families[family] + block, family, command, checksum),
    st.sampled_from(sorted(families)),
    blocks,
    st.sampled_from([0x21, 0x21, 0x21, 0x20, 0x22]),
    st.booleans(),
)
hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.text("0123456789abcdefF:.", max_size=20),
    st.lists(st.sampled_from(["", "0", "1", "ffff", "00001", "1.2.3.4"]), max_size=9).map(":".join),
)
lines = st.builds(
    lambda kind, source, destination, ports: f"PROXY {kind} {source} {destination} {ports}\r\n".encode(),
    st.sampled_from(["TCP4", "TCP6", "UNKNOWN"]),
    hosts,
    hosts,
    st.sampled_from(["1 2", "0 65535", "65536 1", "01 1", "1", "1  1"]),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(
        draw(st.one_of(binary, lines, st.sampled_from([header for header, _ in VALID.values()])))
    )
    for _ in range(draw(st.integers(0, 2))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data) + draw(st.sampled_from([b"", b"\r\n", b"payload"]))


@given(damaged())
@example(b"")
def test_one_byte_at_a_time_and_in_one_piece_both_readers_agree(data: bytes) -> None:
    in_all_ways(data)


@given(lines)
def test_both_readers_take_the_same_addresses(line: bytes) -> None:
    both(line)


@pytest.mark.parametrize("header", [*(header for header, _ in VALID.values()), *INVALID.values()])
def test_both_readers_agree_on_the_table(header: bytes) -> None:
    in_all_ways(header[:400])
    both(header)


# --- under the sanitizers


@needs("a C compiler")
def test_nothing_is_read_past_the_end(tmp_path: Path) -> None:
    try_examples("proxy_fuzz", "proxy.h", 5000, tmp_path)
