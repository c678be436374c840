"""TLS on fastlisten.aio's servers."""

import asyncio
import contextlib
import os
import ssl
from typing import Any

import pytest

from fastlisten import aio
from fastlisten.aio._tls import TlsTransport
from helpers import connect, needs, read_all
from helpers.aio import Echo, Run, in_thread, run, server

__all__ = ["run"]  # a fixture


@needs("the openssl command")
def test_tls(run: Run, tls: Any) -> None:
    async def main() -> None:
        async with server(Echo, ssl=tls[0]) as serving:
            reader, writer = await asyncio.open_connection(
                *serving.address, ssl=tls[1], server_hostname="localhost"
            )
            data = os.urandom(3 << 20)
            writer.write(data)
            assert await reader.readexactly(len(data)) == data
            transport = serving.made[0].transport
            assert transport.get_extra_info("cipher")
            assert transport.get_extra_info("peername") == writer.get_extra_info("sockname")
            writer.close()
            await writer.wait_closed()
            assert await serving.made[0].lost is None

    run(main())


@needs("the openssl command")
def test_tls_streams_and_start_tls(run: Run, tls: Any) -> None:
    async def main() -> None:
        async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readline() == b"STARTTLS\n"
            writer.write(b"GO\n")
            await writer.drain()
            await writer.start_tls(tls[0])
            writer.write((await reader.readline()).upper())
            await writer.drain()
            writer.close()

        async with await aio.start_server(upgrade, "127.0.0.1", 0) as running:
            reader, writer = await asyncio.open_connection(*running.sockets[0].getsockname())
            writer.write(b"STARTTLS\n")
            assert await reader.readline() == b"GO\n"
            await writer.start_tls(tls[1], server_hostname="localhost")
            writer.write(b"secret\n")
            assert await reader.readline() == b"SECRET\n"
            assert await reader.read() == b""
            writer.close()
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                await writer.wait_closed()

    run(main())


@needs("the openssl command")
def test_start_tls_gets_the_hello_that_came_before_the_accept(run: Run, tls: Any) -> None:
    async def main() -> None:
        async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):  # the client leaves in the middle
                await writer.start_tls(tls[0])

        outgoing = ssl.MemoryBIO()
        hello = tls[1].wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            hello.do_handshake()
        async with await aio.start_server(upgrade, "127.0.0.1", 0) as running:
            with connect(running.sockets[0].getsockname()) as client:
                client.sendall(outgoing.read())
                assert await in_thread(client.recv, 1) == b"\x16"  # a handshake's record: RFC 8446, 5.1

    run(main())


def hello_of(context: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    """Begin a handshake in memory: the client's hello is in the second BIO."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls_client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls_client.do_handshake()
    return tls_client, incoming, outgoing


@needs("the openssl command")
@pytest.mark.parametrize("padding", [0, 100_000])
def test_start_tls_gets_the_hello_that_came_with_the_line_before_it(run: Run, tls: Any, padding: int) -> None:
    """As behind a PROXY header: line and ClientHello in one segment, also when the stream had paused."""

    def talk(address: Any) -> bytes:
        client_side, incoming, outgoing = hello_of(tls[1])
        with connect(address) as client:
            client.sendall(b"x" * padding + b"STARTTLS\r\n" + outgoing.read())
            while True:
                try:
                    client_side.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    client.sendall(outgoing.read())
                    incoming.write(client.recv(1 << 16))
            client_side.write(b"hello")
            client.sendall(outgoing.read())
            while True:
                try:
                    return client_side.read(100)
                except ssl.SSLWantReadError:
                    incoming.write(client.recv(1 << 16))

    async def main() -> None:
        async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(padding)
            assert await reader.readline() == b"STARTTLS\r\n"
            await writer.start_tls(tls[0])
            writer.write(await reader.read(100))
            await writer.drain()
            writer.close()

        async with await aio.start_server(upgrade, "127.0.0.1", 0) as running:
            assert await in_thread(talk, running.sockets[0].getsockname()) == b"hello"

    run(main())


@needs("the openssl command")
def test_a_client_that_stalls_in_the_handshake_hurts_nobody(run: Run, tls: Any) -> None:
    async def main() -> None:
        async with server(Echo, ssl=tls[0], ssl_handshake_timeout=0.2) as serving:
            with connect(serving.address) as stalled:
                with connect(serving.address) as wrong:
                    wrong.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    reader, writer = await asyncio.open_connection(
                        *serving.address, ssl=tls[1], server_hostname="localhost"
                    )
                    writer.write(b"hello")
                    assert await reader.readexactly(5) == b"hello"
                    with contextlib.suppress(ConnectionError):
                        await in_thread(read_all, wrong)
                with contextlib.suppress(ConnectionError):
                    assert await in_thread(stalled.recv, 1) == b""
                writer.close()
                await writer.wait_closed()
            while serving.server.stats().active:
                await asyncio.sleep(0)

    run(main())


@needs("the openssl command")
def test_a_server_speaks_tls_by_a_transport_of_ours(run: Run, tls: Any) -> None:
    async def main() -> None:
        async with server(Echo, ssl=tls[0]) as serving:
            _, writer = await asyncio.open_connection(
                *serving.address, ssl=tls[1], server_hostname="localhost"
            )
            transport = (await serving.first()).transport
            assert type(transport) is TlsTransport
            assert isinstance(transport, asyncio.Transport)
            writer.close()
            await writer.wait_closed()

    run(main())
