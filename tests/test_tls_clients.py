"""What clients of TLS do wrong, to each kind of server: it is counted once, and nobody is told."""

import contextlib
import logging
import ssl
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from helpers import needs, read_all, reset, wait_until
from helpers.certificates import Pair, client_context, expired, server_context
from helpers.tls_client import TlsClient
from helpers.tls_servers import ON_ASYNCIO, WAYS, tls_server

pytestmark = needs("the openssl command")

all_ways = pytest.mark.parametrize("way", WAYS)

SHORT = 0.3  # seconds: a deadline that a test waits for


class Certificates(NamedTuple):
    """Files for the tests: of the server, the same one expired, and that of somebody unknown."""

    good: Pair
    expired: Pair


@pytest.fixture(scope="module")
def certificates(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(pair, expired(tmp_path_factory.mktemp("expired"), pair))


# --- clients: each returns when the server has ended the connection, or is to find its end


def says(data: bytes) -> Callable[[TlsClient], None]:
    def act(client: TlsClient) -> None:
        client.socket.sendall(data)
        with contextlib.suppress(ConnectionError):
            read_all(client.socket)

    return act


def leaves(client: TlsClient) -> None:
    client.socket.close()


def resets(client: TlsClient) -> None:
    reset(client.socket)


def resets_in_its_hello(client: TlsClient) -> None:
    with contextlib.suppress(ssl.SSLWantReadError):
        client.session.do_handshake()
    client.socket.sendall(client.outgoing.read()[:100])
    reset(client.socket)


def resets_after_the_server_s_hello(client: TlsClient) -> None:
    client.begin()
    client.feed()
    reset(client.socket)


def resets_after_its_finished(client: TlsClient) -> None:
    client.shake_hands()
    client.feed()  # the tickets, which the server sends when it has that: RFC 8446, 4.6.1
    reset(client.socket)


def resets_in_a_record(client: TlsClient) -> None:
    client.shake_hands().send(b"hello")
    assert client.read(5) == b"hello"
    client.session.write(bytes(1000))
    client.socket.sendall(client.outgoing.read()[:500])
    reset(client.socket)


def resets_what_is_sent_to_it(client: TlsClient) -> None:
    client.shake_hands().send(bytes(1 << 16))
    client.feed()
    reset(client.socket)


def resets_after_its_close_notify(client: TlsClient) -> None:
    client.shake_hands().send(b"hello")
    assert client.read(5) == b"hello"
    with contextlib.suppress(ssl.SSLWantReadError):
        client.session.unwrap()
    client.flush()
    reset(client.socket)


def leaves_without_a_word(client: TlsClient) -> None:
    client.shake_hands().send(b"hello")
    assert client.read(5) == b"hello"
    client.socket.close()


def says_later(data: bytes) -> Callable[[TlsClient], None]:
    def act(client: TlsClient) -> None:
        client.shake_hands()
        says(data)(client)

    return act


def shakes(client: TlsClient) -> None:
    """Go on until the server, or what OpenSSL says of it, ends it."""
    with contextlib.suppress(ssl.SSLError, EOFError, ConnectionError):
        client.shake_hands().read(1)
    client.flush()


Setting = Callable[[ssl.SSLContext, Certificates], object]


class Case(NamedTuple):
    """What a client does, and what of TLS_FAILURES is counted, "" where the handshake is through.

    server, client: what is set on the contexts before.  trusts: the client knows the certificates.
    """

    act: Callable[[TlsClient], None]
    counted: str = ""
    server: Setting | None = None
    client: Setting | None = None
    trusts: bool = True


def asks_for_certificates(context: ssl.SSLContext, certificates: Certificates) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificates.good.cert)
    context.load_verify_locations(certificates.expired.cert)


def group(name: str) -> Setting:
    return lambda context, certificates: context.set_ecdh_curve(name)


def versions(least: ssl.TLSVersion, most: ssl.TLSVersion) -> Setting:
    def set_versions(context: ssl.SSLContext, certificates: Certificates) -> None:
        context.minimum_version, context.maximum_version = least, most

    return set_versions


def has_an_expired_one(context: ssl.SSLContext, certificates: Certificates) -> None:
    context.load_cert_chain(*certificates.expired)


V2, V3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3

# A hello of SSLv2, with one cipher and a challenge of 16 bytes: RFC 6101, appendix E.1.
SSL2_HELLO = b"\x80\x1c\x01\x00\x02\x00\x03\x00\x00\x00\x10\x01\x00\x80" + bytes(16)

CASES = {
    "plain HTTP": Case(says(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), "not TLS"),
    "SSH": Case(says(b"SSH-2.0-OpenSSH_9.2\r\n"), "not TLS"),
    "garbage": Case(says(bytes(range(256)) * 8), "not TLS"),
    "a record of garbage": Case(says(b"\x16\x03\x01\x00\x05hello"), "not TLS"),
    "a record without end": Case(says(b"\x16\x03\x01\xff\xff" + bytes(1 << 16)), "not TLS"),
    "leaves": Case(leaves, "closed"),
    "resets": Case(resets, "closed"),
    "resets in its hello": Case(resets_in_its_hello, "closed"),
    "resets after the server's hello": Case(resets_after_the_server_s_hello, "closed"),
    "resets after its Finished": Case(resets_after_its_finished),
    "resets in a record": Case(resets_in_a_record),
    "resets what is sent to it": Case(resets_what_is_sent_to_it),
    "resets after its close_notify": Case(resets_after_its_close_notify),
    "leaves without a word": Case(leaves_without_a_word),
    "garbage in place of a record": Case(says_later(b"no record of TLS at all")),
    "a record that is no one's": Case(says_later(b"\x17\x03\x03\x00\x20" + bytes(32))),
    "SSLv2": Case(says(SSL2_HELLO), "version"),
    "an old version": Case(shakes, "version", versions(V3, V3), versions(V2, V2)),
    "no group in common": Case(shakes, "cipher", group("secp384r1"), group("prime256v1")),
    "does not trust the server": Case(shakes, "alert", trusts=False),
    "the server's certificate has expired": Case(shakes, "alert", has_an_expired_one),
    "no certificate": Case(shakes, "client certificate", asks_for_certificates),
    "an expired certificate": Case(shakes, "client certificate", asks_for_certificates, has_an_expired_one),
}


def is_served(address: Any, certificates: Certificates) -> None:
    """Assert that a client without fault is."""
    context = client_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(*certificates.good)
    with TlsClient(address, context) as client:
        client.shake_hands().send(b"hello")
        assert client.read(5) == b"hello"


@all_ways
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_is_counted_once_and_nobody_is_told(
    way: str, case: Case, certificates: Certificates, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    server, client = server_context(certificates.good), client_context(*certificates if case.trusts else ())
    for context, setting in ((server, case.server), (client, case.client)):
        if setting:
            setting(context, certificates)
    caplog.set_level(logging.DEBUG, "fastlisten")
    with tls_server(way, server) as serving:
        with TlsClient(serving.address, client) as bad:
            case.act(bad)
            wait_until(lambda: serving.over() == 1)
        is_served(serving.address, certificates)
    assert serving.failures() == ({case.counted: 1} if case.counted else {})
    assert serving.begun == serving.talked == (1 if case.counted else 2)
    assert serving.reports == []
    told = [record for record in caplog.records if not record.getMessage().startswith("Executing")]
    assert all(record.levelno == logging.DEBUG and "handshake" in record.getMessage() for record in told)
    assert len(told) == bool(case.counted and way not in ON_ASYNCIO)  # which tells in its debug mode
    assert capfd.readouterr() == ("", "")


@all_ways
def test_who_says_nothing_is_cut_at_the_deadline(way: str, certificates: Certificates) -> None:
    with tls_server(way, server_context(certificates.good), handshake_timeout=SHORT) as serving:
        with TlsClient(serving.address, client_context()) as silent:
            begun = time.monotonic()
            assert read_all(silent.socket) == b""
            assert SHORT - 0.05 < time.monotonic() - begun < SHORT + 1
        is_served(serving.address, certificates)
    assert serving.failures() == {"timeout": 1}
