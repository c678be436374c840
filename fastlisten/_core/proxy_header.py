"""What a proxy has said of a client, by a PROXY header."""

from __future__ import annotations

from typing import Any, NamedTuple


class ProxySSL(NamedTuple):
    """What a proxy says of the client's TLS: the TLV PP2_TYPE_SSL, section 2.2.6.

    tls: the client came by TLS.  certificate: it has shown one, in this connection or in another of its
    session.  verified: that was verified.  tlvs: (type, value) of what else is said, in order; of it as text:
    version, cipher, common_name, signature_algorithm and key_algorithm, None where it is not said.

    >>> ssl = ProxySSL(True, False, False, ((0x21, b"TLSv1.3"),))
    >>> ssl.version, ssl.cipher
    ('TLSv1.3', None)
    """

    tls: bool
    certificate: bool
    verified: bool
    tlvs: tuple[tuple[int, bytes], ...]

    @property
    def version(self) -> str | None:
        """The version of TLS."""
        return _text(_first(self.tlvs, 0x21))

    @property
    def common_name(self) -> str | None:
        """The common name in the client's certificate."""
        return _text(_first(self.tlvs, 0x22))

    @property
    def cipher(self) -> str | None:
        """The name of the cipher."""
        return _text(_first(self.tlvs, 0x23))

    @property
    def signature_algorithm(self) -> str | None:
        """What the proxy's certificate is signed with."""
        return _text(_first(self.tlvs, 0x24))

    @property
    def key_algorithm(self) -> str | None:
        """What the proxy's key is made with."""
        return _text(_first(self.tlvs, 0x25))


class ProxyHeader(NamedTuple):
    """A PROXY header: HAProxy's doc/proxy-protocol.txt.

    version: 1 or 2.  local: the proxy speaks for itself, as with a health check.  source, destination: the
    client's address and the one that it asked for, as the standard library has addresses; None when the
    header tells none that count here: the connection's own do then.  tlvs: (type, value) of each TLV, in
    order, unknown ones too.  length: of the header, in bytes.

    What the text of a TLV says is the proxy's word, and a part of it the client's: the name that it asked
    for, the one in its certificate.  What is no UTF-8 there is escaped as by os.fsdecode().

    >>> header = ProxyHeader(2, False, ("192.0.2.1", 5000), ("192.0.2.2", 443), ((0x02, b"example.org"),), 42)
    >>> header.source, header.authority, header.unique_id
    (('192.0.2.1', 5000), 'example.org', None)
    """

    version: int
    local: bool
    source: Any
    destination: Any
    tlvs: tuple[tuple[int, bytes], ...]
    length: int

    def tlv(self, number: int) -> bytes | None:
        """The value of the first TLV of this type, an int; None when there is none."""
        return _first(self.tlvs, number)

    @property
    def alpn(self) -> bytes | None:
        """The protocol that the client and the proxy have agreed on (RFC 7301)."""
        return self.tlv(0x01)

    @property
    def authority(self) -> str | None:
        """The host that the client has asked for, with TLS its SNI."""
        return _text(self.tlv(0x02))

    @property
    def unique_id(self) -> bytes | None:
        """What the proxy calls this connection, at most 128 bytes."""
        return self.tlv(0x05)

    @property
    def ssl(self) -> ProxySSL | None:
        """What is said of the client's TLS."""
        value = self.tlv(0x20)
        if value is None:
            return None
        return ProxySSL(bool(value[0] & 1), bool(value[0] & 6), not any(value[1:5]), _tlvs(value[5:]))

    @property
    def netns(self) -> str | None:
        """The network namespace that the proxy has the client from."""
        return _text(self.tlv(0x30))

    @property
    def aws_vpc_endpoint(self) -> str | None:
        """The id of the VPC endpoint that the client came by: AWS's type 0xEA, subtype 1."""
        value = self.tlv(0xEA)
        return _text(value[1:]) if value and value[0] == 1 else None

    @property
    def gcp_psc_connection(self) -> int | None:
        """The id of the Private Service Connect that the client came by: Google's type 0xE0, 8 bytes."""
        value = self.tlv(0xE0)
        return int.from_bytes(value, "big") if value is not None and len(value) == 8 else None


def _first(tlvs: tuple[tuple[int, bytes], ...], number: int) -> bytes | None:
    return next((value for found, value in tlvs if found == number), None)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")


def _tlvs(data: bytes) -> tuple[tuple[int, bytes], ...]:
    """Those that these bytes are; proxy.h has seen that they fit."""
    found = []
    while data:
        end = 3 + int.from_bytes(data[1:3], "big")
        found.append((data[0], data[3:end]))
        data = data[end:]
    return tuple(found)
