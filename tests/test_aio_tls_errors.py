"""TLS of asyncio servers: clients that do wrong, and protocols that do."""

import asyncio
import contextlib
import ssl
from typing import Any

import pytest

from fastlisten import aio
from helpers import needs, read_all
from helpers.aio import LOOPS, Echo, Notes, Run, asyncios, in_thread, server
from helpers.tls_client import TlsClient, ended, opened

pytestmark = needs("the openssl command")


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    """Run on each loop; how descriptors are watched, TLS does not know."""
    return Run(request.param)


both = pytest.mark.parametrize("create", [asyncios, aio.create_server], ids=["the loop's", "ours"])


# --- clients


def test_garbage_on_an_open_connection_ends_it(run: Run, tls: Any) -> None:
    async def main() -> None:
        async with server(Echo, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            client.session.write(b"before")
            client.socket.sendall(client.outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
            with pytest.raises(ssl.SSLError, match="BAD_RECORD_MAC"):  # the alert
                await in_thread(client.read, 6)
            protocol = await serving.first()
            assert isinstance(await protocol.lost, ssl.SSLError)
            assert protocol.events == ["made", "data", "lost"]

    run(main())
    assert run.reports == []


def test_the_client_is_told_by_an_alert_why_its_handshake_failed(run: Run, tls: Any) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    new = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    new.minimum_version = ssl.TLSVersion.TLSv1_3

    async def main() -> None:
        async with server(Notes, ssl=new) as serving:
            with TlsClient(serving.address, old) as client, pytest.raises(ssl.SSLError, match="ALERT"):
                await in_thread(client.shake_hands)
            stats = serving.server.stats()
            assert (stats.tls_handshakes, stats.tls_failures) == (0, {"version": 1})

    run(main())
    assert run.reports == []


@both
@pytest.mark.parametrize("hello", [False, True])
def test_a_handshake_has_a_deadline(run: Run, tls: Any, create: Any, hello: bool) -> None:
    async def main() -> None:
        async with server(Notes, create, ssl=tls[0], ssl_handshake_timeout=0.1) as serving:
            with TlsClient(serving.address, tls[1]) as client:
                if hello:
                    client.begin()
                with contextlib.suppress(ConnectionError):
                    await in_thread(read_all, client.socket)
            assert serving.made[0].events == []
            if create is not asyncios:
                assert serving.server.stats().tls_failures == {"timeout": 1}

    run(main())
    if create is not asyncios:  # asyncio reports it in debug mode
        assert run.reports == []


# --- protocols


@pytest.mark.parametrize("name", ["connection_made", "data_received", "eof_received", "connection_lost"])
@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_what_a_protocol_raises_ends_it(run: Run, tls: Any, name: str, kind: Any) -> None:
    error = kind("mine")

    class Raises(Notes):
        def __getattribute__(self, asked: str) -> Any:
            if asked != name:
                return super().__getattribute__(asked)

            def call(*arguments: Any) -> None:
                getattr(super(Raises, self), name)(*arguments)
                raise error

            return call

    async def main() -> None:
        async with server(Raises, ssl=tls[0]) as serving:
            with TlsClient(serving.address, tls[1]) as client, contextlib.suppress(EOFError, ConnectionError):
                await in_thread(client.shake_hands)
                client.send(b"hello")
                if name in ("eof_received", "connection_lost"):
                    await in_thread(client.unwrap)
                await in_thread(read_all, client.socket)
            lost = await serving.made[0].lost
            assert lost is (None if name == "connection_lost" else error)
            reported = 1 if kind is ValueError else 0
            if name == "connection_lost":
                reported = 1  # nobody else would be told
            assert [report["exception"] for report in run.reports] == [error] * reported
            await ended(serving)
            assert serving.server.stats().handler_errors == reported

    run(main())


def test_the_loop_may_be_left_from_a_callback(run: Run, tls: Any) -> None:
    class Leaves(Notes):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.data == b"leave":
                raise SystemExit(3)

    async def main() -> None:
        async with server(Leaves, ssl=tls[0]) as serving:
            client = TlsClient(serving.address, tls[1])
            with client:
                await in_thread(client.shake_hands)
                client.send(b"leave")
                await asyncio.sleep(10)

    with pytest.raises(SystemExit):
        run(main())
