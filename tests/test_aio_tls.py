"""TLS on fastlisten.aio's servers."""

import asyncio
import contextlib
import os
import socket
import ssl
from asyncio.sslproto import _SSLProtocolTransport
from typing import Any

import pytest

from fastlisten import aio
from fastlisten.aio._tls import TlsTransport
from helpers import LIMIT, connect, needs, read_all
from helpers.aio import LOOPS, Echo, Notes, Run, in_thread, run, server
from helpers.tls_client import TlsClient

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


def ours(loop: str) -> Any:
    """The class of our event loops that is built on this one."""
    return aio.EventLoop if loop == "asyncio" else aio.UvloopEventLoop


@pytest.fixture(params=LOOPS)
def run_on_ours(request: pytest.FixtureRequest) -> Any:
    """Run a coroutine on an event loop of ours."""

    def run(main: Any) -> Any:
        async def limited() -> Any:
            async with asyncio.timeout(LIMIT):
                return await main

        with asyncio.Runner(loop_factory=ours(request.param)) as runner:
            return runner.run(limited())

    return run


@needs("the openssl command")
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("server_side", [True, False])
def test_start_tls_on_our_loops(run_on_ours: Any, tls: Any, layers: int, server_side: bool) -> None:
    """In either role, over a plain connection and over TLS."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        as_server: dict[str, Any] = {"sslcontext": tls[0], "server_side": True}
        as_client: dict[str, Any] = {"sslcontext": tls[1], "server_hostname": "localhost"}
        ours, theirs = (as_server, as_client) if server_side else (as_client, as_server)

        class Upgrades(Notes):
            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                if server_side:
                    self.task = asyncio.ensure_future(self.upgrade(transport))

            async def upgrade(self, transport: Any) -> None:
                self.transport = await loop.start_tls(transport, self, **ours)  # type: ignore[assignment]
                self.transport.write(b"up")

            def data_received(self, data: bytes) -> None:
                if data == b"go":  # the client is ready for a hello of ours
                    self.task = asyncio.ensure_future(self.upgrade(self.transport))
                else:
                    self.transport.write(data)

        outer = {"ssl": tls[0]} if layers else {}
        async with server(Upgrades, loop.create_server, **outer) as serving:
            outer = {"ssl": tls[1], "server_hostname": "localhost"} if layers else {}
            reader, writer = await asyncio.open_connection(*serving.address, **outer)
            if not server_side:
                writer.write(b"go")
            protocol = writer.transport.get_protocol()
            below = writer.transport
            transport: Any = await loop.start_tls(below, protocol, **theirs)
            writer._transport = reader._transport = protocol._transport = transport  # type: ignore[attr-defined]
            assert await reader.readexactly(2) == b"up"
            data = os.urandom(1 << 20)
            writer.write(data)
            assert await reader.readexactly(len(data)) == data
            upgraded = serving.made[0].transport
            assert type(upgraded) is (_SSLProtocolTransport if layers else TlsTransport)
            transport.abort()
            below.abort()

    run_on_ours(main())


@needs("the openssl command")
def test_start_tls_that_fails_raises_and_ends_the_connection_once(run_on_ours: Any, tls: Any) -> None:
    async def main() -> list[Any]:
        raised: list[Any] = []

        class Upgrades(Notes):
            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                self.task = asyncio.ensure_future(self.upgrade(transport))

            async def upgrade(self, transport: Any) -> None:
                try:
                    await asyncio.get_running_loop().start_tls(transport, self, tls[0], server_side=True)
                except (OSError, ssl.SSLError) as error:
                    raised.append(type(error))

        for words in (b"GET / HTTP/1.0\r\n\r\n", b""):
            async with server(Upgrades, asyncio.get_running_loop().create_server) as serving:
                with connect(serving.address) as client:
                    protocol = await serving.first()
                    client.sendall(words)
                    client.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionError):
                        await in_thread(read_all, client)
                await protocol.lost
                await protocol.task
                assert protocol.events == ["made", "lost"]
        return raised

    assert run_on_ours(main()) == [ssl.SSLError, ConnectionResetError]


@needs("the openssl command")
def test_start_tls_on_a_transport_that_has_ended_raises(run_on_ours: Any, tls: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with server(Notes, loop.create_server) as serving:
            with connect(serving.address):
                protocol = await serving.first()
                protocol.transport.abort()
                await protocol.lost
                with pytest.raises(ConnectionError):
                    await loop.start_tls(protocol.transport, protocol, tls[0], server_side=True)
            with connect(serving.address) as client:
                while len(serving.made) < 2:
                    await asyncio.sleep(0)
                protocol = serving.made[1]
                task = asyncio.ensure_future(
                    loop.start_tls(protocol.transport, protocol, tls[0], server_side=True)
                )
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await in_thread(read_all, client) == b""

    run_on_ours(main())


@needs("the openssl command")
def test_tls_of_a_client_that_was_accepted_elsewhere(run_on_ours: Any, tls: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for good in (True, False):
                with TlsClient(listener.getsockname(), tls[1]) as client:
                    sock, _ = listener.accept()
                    waiting = asyncio.ensure_future(loop.connect_accepted_socket(Echo, sock, ssl=tls[0]))
                    if not good:
                        client.socket.sendall(b"GET / HTTP/1.0\r\n\r\n")
                        with pytest.raises(ssl.SSLError):
                            await waiting
                        continue
                    await in_thread(client.shake_hands)
                    transport, protocol = await waiting
                    assert type(transport) is TlsTransport
                    client.send(b"hello")
                    assert await in_thread(client.read, 5) == b"hello"
                    assert protocol.events == ["made", "data"]
                    transport.close()
                    await in_thread(client.unwrap)
                    assert await protocol.lost is None

    run_on_ours(main())


@needs("the openssl command")
def test_tls_on_a_unix_path(run: Run, tls: Any, unix_path: str) -> None:
    async def main() -> None:
        async with await aio.create_unix_server(Echo, unix_path, ssl=tls[0]):
            reader, writer = await asyncio.open_unix_connection(
                unix_path, ssl=tls[1], server_hostname="localhost"
            )
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            await writer.wait_closed()

    if hasattr(socket, "AF_UNIX"):
        run(main())
