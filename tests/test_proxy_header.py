"""PROXY headers: what each of a table means, and the parser against a second reader of them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given

from fastlisten._core.proxy import parse
from fastlisten._core.proxy_header import ProxyHeader, ProxySSL
from helpers import needs
from helpers.fuzz_targets import try_examples
from helpers.header_table import INVALID, VALID
from helpers.proxy_headers import (
    ALPN,
    AUTHORITY,
    AWS,
    GCP,
    NETNS,
    NOOP,
    SSL,
    UNIQUE_ID,
    Invalid,
    More,
    inet,
    read,
    tlv,
    v2,
)
from helpers.random_headers import damaged, lines


@pytest.mark.parametrize(("header", "addresses"), VALID.values(), ids=VALID.keys())
def test_what_is_valid(header: bytes, addresses: Any) -> None:
    for rest in (b"", b"\r\n", b"PROXY", tlv(AUTHORITY, b"54321"), bytes(5000)):
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
    cut = parse(v2(inet() + tlv(AUTHORITY, b"public\0x")) + tlv(AUTHORITY, b"54321"))
    assert cut is not None
    assert (cut.authority, len(cut.tlvs)) == ("public\0x", 1)  # nothing ends at NUL, and the header does end
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
