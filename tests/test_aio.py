"""The servers of fastlisten.aio: asyncio's own, asked side by side; streams, TLS, limits, async iteration."""

import asyncio
import contextlib
import contextvars
import gc
import inspect
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from aio_support import Echo, Notes, Run, asyncios, run, run_awaits, server
from support import LIMIT, connect, exchange, needs, posix_only, read_all, under_wine

import fastlisten
from fastlisten import aio
from fastlisten.aio import _streams

__all__ = ["run", "run_awaits"]  # fixtures


async def in_thread(function: Any, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# --- as asyncio's own


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (aio.create_server, asyncio.BaseEventLoop.create_server),
        (aio.start_server, asyncio.start_server),
        pytest.param(
            aio.create_unix_server,
            asyncio.SelectorEventLoop.create_unix_server,
            marks=needs("unix sockets"),
        ),
        pytest.param(
            aio.start_unix_server,
            getattr(asyncio, "start_unix_server", None),
            marks=needs("unix sockets"),
        ),
    ],
)
def test_the_signatures_hold_asyncios(ours: Any, theirs: Any) -> None:
    mine = inspect.signature(ours).parameters
    for name, parameter in inspect.signature(theirs).parameters.items():
        if name != "self":
            assert (mine[name].kind, mine[name].default) == (parameter.kind, parameter.default), name


def udp() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


TAKEN: list[socket.socket] = []  # bound and listening while a test of a taken port needs it


def taken() -> Any:
    return TAKEN[-1].getsockname()


def tls_wrapped() -> socket.socket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return context.wrap_socket(socket.socket(), server_hostname="x", do_handshake_on_connect=False)


MISTAKES: dict[str, Any] = {
    "nothing": lambda: ((), {}),
    "sock and host": lambda: (("127.0.0.1",), {"sock": socket.socket()}),
    "sock and port": lambda: ((None, 0), {"sock": socket.socket()}),
    "datagram": lambda: ((), {"sock": udp()}),
    "ssl=True": lambda: (("127.0.0.1", 0), {"ssl": True}),
    "ssl=False": lambda: (("127.0.0.1", 0), {"ssl": False}),
    "handshake without ssl": lambda: (("127.0.0.1", 0), {"ssl_handshake_timeout": 1}),
    "shutdown without ssl": lambda: (("127.0.0.1", 0), {"ssl_shutdown_timeout": 1}),
    "a TLS socket": lambda: ((), {"sock": tls_wrapped()}),
    "str backlog": lambda: (("127.0.0.1", 0), {"backlog": "5"}),
    "float backlog": lambda: (("127.0.0.1", 0), {"backlog": 5.0}),
    "huge backlog": lambda: (("127.0.0.1", 0), {"backlog": 2**40}),
    "not our address": lambda: (("192.0.2.1", 0), {}),
    "taken port": lambda: (taken(), {}),
    "bytes port": lambda: (("127.0.0.1", b"x"), {}),
    "huge port": lambda: (("127.0.0.1", 70000), {}),
    "int host": lambda: ((5, 0), {}),
    "no hosts": lambda: (([], 0), {}),
    "unknown option": lambda: (("127.0.0.1", 0), {"nonsense": 1}),
    "reuse_port of nothing": lambda: (("127.0.0.1", 0), {"reuse_port": False}),
}


@contextlib.contextmanager
def closing_sockets(options: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    finally:
        if "sock" in options:
            options["sock"].close()


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # asyncio's, for a wrong backlog
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_raise_what_asyncio_raises(mistake: str) -> None:
    run = Run("asyncio")

    async def outcome(create: Any) -> Any:
        args, options = MISTAKES[mistake]()
        with closing_sockets(options):
            try:
                running = await create(asyncio.Protocol, *args, **options)
            except Exception as error:
                text = str(error).replace(str(create.__qualname__), "create_server")
                number = getattr(error, "errno", None)
                return type(error), number, text.split("fd=")[0].replace("BaseEventLoop.", "")
            running.close()
            await running.wait_closed()
            return "no error"

    with socket.create_server(("127.0.0.1", 0)) as sock:
        TAKEN[:] = [sock]
        theirs = run(outcome(bound_asyncios))
        ours = run(outcome(aio.create_server))
    if mistake == "unknown option":
        assert ours[0] is theirs[0] is TypeError
    else:
        assert ours == theirs


async def bound_asyncios(factory: Any, *args: Any, **options: Any) -> Any:
    return await asyncio.get_running_loop().create_server(factory, *args, **options)


def test_a_server_on_a_taken_port_fails_on_every_loop(run: Run) -> None:
    async def main(address: Any) -> None:
        with pytest.raises(OSError, match="error while attempting to bind on address"):
            await aio.create_server(asyncio.Protocol, *address)

    with socket.create_server(("127.0.0.1", 0)) as other:
        run(main(other.getsockname()))


def test_the_life_of_a_server(run: Run) -> None:
    async def main() -> None:
        running = await aio.create_server(Notes, "127.0.0.1", 0, start_serving=False)
        assert not running.is_serving()
        assert running.get_loop() is asyncio.get_running_loop()
        address = running.sockets[0].getsockname()
        with pytest.raises(ConnectionRefusedError):
            connect(address)
        await running.start_serving()
        await running.start_serving()
        assert running.is_serving()
        assert isinstance(running, asyncio.AbstractServer)
        waiting = asyncio.ensure_future(running.wait_closed())
        client = connect(address)
        while running.stats().accepted == 0:
            await asyncio.sleep(0)
        async with running:
            assert running.is_serving()
            client.close()
        assert running.sockets == ()
        assert not running.is_serving()
        await waiting
        running.close()
        with pytest.raises(ConnectionRefusedError):
            connect(address)
        with pytest.raises(RuntimeError, match="closed"):
            await running.serve_forever()

    run(main())


def test_serve_forever_until_cancelled(run: Run) -> None:
    async def main() -> None:
        running = await aio.create_server(Notes, "127.0.0.1", 0, start_serving=False)
        serving = asyncio.ensure_future(running.serve_forever())
        await turns(2)
        assert running.is_serving()
        with pytest.raises(RuntimeError, match="already being awaited"):
            await running.serve_forever()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert running.sockets == ()

    run(main())


@pytest.mark.parametrize("loop", ["asyncio"])
def test_cancelling_serve_forever_does_to_the_clients_what_asyncios_does(loop: str) -> None:
    async def closes(create: Any) -> bool:
        async with server(Notes, create) as serving:
            forever = asyncio.create_task(serving.server.serve_forever())
            with connect(serving.address):
                protocol = await serving.first()
                forever.cancel()
                await turns()
                closing: bool = protocol.transport.is_closing()
                protocol.transport.abort()
                await asyncio.wait([forever])
                assert forever.cancelled()
        return closing

    run = Run(loop)
    assert run(closes(aio.create_server)) == run(closes(asyncios))


def test_a_closed_server_does_not_start(run: Run) -> None:
    async def main() -> None:
        closed = await aio.create_server(Echo, "127.0.0.1", 0, start_serving=False)
        closed.close()
        with pytest.raises(RuntimeError, match="closed"):
            await closed.start_serving()

    run(main())


def test_a_closed_server_is_freed_by_its_count(run: Run) -> None:
    async def main() -> bool:
        one = await aio.create_server(Echo, "127.0.0.1", 0)
        assert await in_thread(exchange, one.sockets[0].getsockname()) == b"ping"
        one.close()
        await one.wait_closed()
        await turns()
        weak = weakref.ref(one)
        gc.disable()
        try:
            del one
            return weak() is None
        finally:
            gc.enable()

    assert run(main())


def test_connections_begin_in_the_context_where_asyncios_do() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    class Looks(Notes):
        def connection_made(self, transport: Any) -> None:
            self.seen = variable.get()
            super().connection_made(transport)

    async def main(create: Any) -> str:
        variable.set("created")
        async with server(Looks, create, start_serving=False) as serving:
            variable.set("started")
            await serving.server.start_serving()
            variable.set("later")
            with connect(serving.address):
                seen: str = (await serving.first()).seen
                return seen

    run = Run("asyncio")
    assert run(main(aio.create_server)) == run(main(asyncios))


@pytest.mark.parametrize(
    "mistake",
    [{"ssl": True}, {"ssl_handshake_timeout": 1}, {"sock": None}, {"reuse_address": os.name != "posix"}],
    ids=str,
)
@pytest.mark.parametrize("option", ["dualstack_ipv6", "exclusive"])
def test_asyncios_checks_hold_for_options_it_does_not_know(run: Run, option: str, mistake: Any) -> None:
    async def main() -> None:
        with socket.socket() as sock:
            given = {"sock": sock} if "sock" in mistake else {"port": 0, **mistake}
            with pytest.raises((TypeError, ValueError), match=r"ssl|sock|reuse_address"):
                await aio.create_server(Echo, **given, **{option: True})

    run(main())


def test_ssl_that_is_false_is_no_tls(run: Run) -> None:
    async def main() -> bytes:
        async with server(Echo, ssl=0) as serving:
            answer: bytes = await in_thread(exchange, serving.address)
            return answer

    assert run(main()) == b"ping"


def test_serve_forever_until_closed(run: Run) -> None:
    async def main() -> None:
        running = await aio.create_server(Notes, "127.0.0.1", 0)
        serving = asyncio.ensure_future(running.serve_forever())
        await turns(2)
        running.close()
        with pytest.raises(asyncio.CancelledError):
            await serving

    run(main())


@pytest.mark.skipif(sys.version_info < (3, 12, 1), reason="asyncio waits for clients since 3.12.1")
def test_wait_closed_waits_for_the_clients(run: Run) -> None:
    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address):
                protocol = await serving.first()
                serving.server.close()
                waiting = asyncio.ensure_future(serving.server.wait_closed())
                await turns()
                assert not waiting.done()
                protocol.transport.close()
                await waiting

    run(main())


@pytest.mark.skipif(sys.version_info < (3, 13), reason="asyncio has it since 3.13")
@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
def test_closing_the_clients(run: Run, how: str) -> None:
    async def main() -> None:
        async with server(Notes) as serving:
            clients = [connect(serving.address) for _ in range(5)]
            while len(serving.made) < 5:
                await asyncio.sleep(0)
            serving.made[0].transport.write(b"last words")
            getattr(serving.server, how)()
            for protocol in serving.made:
                assert await protocol.lost is None
            for client in clients:
                with client:
                    assert await in_thread(read_all, client) in (b"", b"last words")

    run(main())


def test_before_313_a_server_has_no_close_clients() -> None:
    for name in ("close_clients", "abort_clients"):
        assert hasattr(aio.Server, name) == hasattr(asyncio.Server, name)


def test_several_hosts_and_a_given_socket(run: Run) -> None:
    async def main() -> None:
        hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.1"]
        running = await aio.create_server(Notes, hosts, 0)
        assert len(running.sockets) == 2
        running.close()
        sock = socket.create_server(("127.0.0.1", 0))
        async with server(Echo, sock=sock) as serving:
            assert serving.server.sockets[0].fileno() == sock.fileno()
            assert await in_thread(exchange, serving.address) == b"ping"
        assert sock.fileno() == -1
        listener = fastlisten.bind("127.0.0.1:0")
        async with server(Echo, sock=listener) as serving:
            assert await in_thread(exchange, serving.address) == b"ping"
            assert listener.stats().accepted == 1

    run(main())


def test_bind_options(run: Run) -> None:
    async def main() -> None:
        async with server(
            Notes, keep_alive=True, **({"defer_accept": 1} if hasattr(socket, "TCP_DEFER_ACCEPT") else {})
        ) as serving:
            with connect(serving.address) as client:
                client.sendall(b"x")
                sock = (await serving.first()).transport.get_extra_info("socket")
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        async with server(Notes, no_delay=False) as serving:
            with connect(serving.address):
                sock = (await serving.first()).transport.get_extra_info("socket")
                assert not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with pytest.raises(TypeError, match="fast_open"):
            await aio.create_server(Notes, "127.0.0.1", 0, fast_open="x")
        with pytest.raises(ValueError, match="max_connections must be at least 1"):
            await aio.create_server(Notes, "127.0.0.1", 0, max_connections=0)

    run(main())


@needs("the IPv6 loopback address")
def test_dual_stack(run: Run) -> None:
    async def main() -> None:
        running = await aio.create_server(Echo, None, 0, dualstack_ipv6=True)
        async with running:
            port = running.sockets[0].getsockname()[1]
            for host in ("127.0.0.1", "::1"):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                writer.close()
                await writer.wait_closed()

    run(main())


@needs("unix sockets")
@posix_only("asyncio has no unix servers on Windows")
def test_a_unix_server(run: Run, unix_path: str) -> None:
    async def main() -> None:
        for _ in range(2):  # the second finds the path of the first, where it is left
            running = await aio.create_unix_server(Echo, unix_path, mode=0o600)
            async with running:
                assert os.stat(unix_path).st_mode & 0o777 == 0o600
                reader, writer = await asyncio.open_unix_connection(unix_path)
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                assert writer.get_extra_info("peername") == unix_path
                writer.close()
                await writer.wait_closed()
            assert os.path.exists(unix_path) == (sys.version_info < (3, 13))
        running = await aio.create_unix_server(Echo, unix_path, cleanup_socket=False)
        running.close()
        assert os.path.exists(unix_path)
        both = "path and sock can not be specified at the same time"
        with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ValueError, match=both):
            await aio.create_unix_server(Echo, unix_path, sock=sock)
        with pytest.raises(ValueError, match="path was not specified, and no sock specified"):
            await aio.create_unix_server(Echo)

    run(main())


# --- streams


def test_streams_with_a_coroutine(run: Run) -> None:
    async def main() -> tuple[bytes, Any]:
        types: list[type] = []

        async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            types.extend([type(reader), type(writer)])
            while line := await reader.readline():
                writer.write(line.upper())
                await writer.drain()
            writer.close()
            await writer.wait_closed()

        async with await aio.start_server(upper, "127.0.0.1", 0) as running:
            with connect(running.sockets[0].getsockname()) as client:
                client.sendall(b"one\ntwo\n")
                client.shutdown(socket.SHUT_WR)
                return await in_thread(read_all, client), types

    data, types = run(main())
    assert data == b"ONE\nTWO\n"
    assert types == [asyncio.StreamReader, asyncio.StreamWriter]


@pytest.mark.parametrize("how", ["set_protocol", "pause_reading"])
def test_a_stream_reads_nothing_before_its_tasks_first_step(run: Run, how: str) -> None:
    async def main() -> None:
        async def first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            transport = cast(aio.Transport, writer.transport)
            if how == "set_protocol":
                transport.set_protocol(notes)
                await notes.until(lambda protocol: protocol.data == b"sent before the accept")
            else:
                transport.pause_reading()
                for _ in range(5):
                    await asyncio.sleep(0)
                    assert not reader._buffer  # type: ignore[attr-defined]
                transport.resume_reading()
                assert await reader.readexactly(22) == b"sent before the accept"
            transport.abort()
            done.set_result(None)

        notes = Notes()
        done = asyncio.get_running_loop().create_future()
        async with await aio.start_server(first, "127.0.0.1", 0) as running:
            with connect(running.sockets[0].getsockname()) as client:
                client.sendall(b"sent before the accept")
                await done

    run(main())
    assert run.reports == []


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio has eager tasks since 3.12")
def test_streams_with_eager_tasks(run: Run) -> None:
    if run.loop == "uvloop":
        pytest.skip("uvloop 0.23 calls the factory with an argument that it has since 3.13.3 only")

    async def main() -> list[bytes]:
        async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write((await reader.readline()).upper())
            writer.close()

        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        async with await aio.start_server(upper, "127.0.0.1", 0) as running:
            address = running.sockets[0].getsockname()
            return [await in_thread(exchange, address, b"%d one\n" % i) for i in range(10)]

    assert run(main()) == [b"%d ONE\n" % i for i in range(10)]
    assert run.reports == []


def test_streams_with_a_plain_function_and_a_limit(run: Run) -> None:
    async def main() -> Any:
        got: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.set_result((reader, writer))

        async with await aio.start_server(plain, "127.0.0.1", 0, limit=10) as running:
            with connect(running.sockets[0].getsockname()) as client:
                client.sendall(b"x" * 100)
                reader, writer = await got
                with pytest.raises(asyncio.LimitOverrunError):
                    await reader.readuntil(b"\n")
                writer.close()
                await writer.wait_closed()

    run(main())


@pytest.mark.parametrize("watches", [True, False], ids=["", "as before 3.11.7"])
@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_a_stream_callback_that_raises_closes_and_is_reported(
    run: Run, kind: str, watches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not watches:
        monkeypatch.setattr(_streams, "_WATCHES_TASKS", False)

    def plain(reader: Any, writer: Any) -> None:
        raise ZeroDivisionError("on purpose")

    async def coroutine(reader: Any, writer: Any) -> None:
        await reader.read(1)
        raise ZeroDivisionError("on purpose")

    async def main() -> None:
        callback: Any = plain if kind == "plain" else coroutine
        async with await aio.start_server(callback, "127.0.0.1", 0) as running:
            for _ in range(2):
                with connect(running.sockets[0].getsockname()) as client:
                    client.sendall(b"x")
                    with contextlib.suppress(ConnectionResetError):
                        assert await in_thread(client.recv, 1) == b""

    run(main())
    assert [type(report["exception"]) for report in run.reports] == [ZeroDivisionError] * 2


def test_a_stream_to_a_slow_reader(run: Run) -> None:
    size, kept = 20 << 20, []

    async def pour(reader: Any, writer: asyncio.StreamWriter) -> None:
        for _ in range(size >> 16):
            writer.write(bytes(1 << 16))
            await writer.drain()
            kept.append(writer.transport.get_write_buffer_size())
        writer.close()

    async def main() -> int:
        async with await aio.start_server(pour, "127.0.0.1", 0) as running:
            with connect(running.sockets[0].getsockname(), receive_buffer=4096) as client:
                return len(await in_thread(read_all, client))

    assert run(main(), 40) == size
    assert max(kept) <= 64 * 1024


# --- TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    folder: Path = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", "key.pem", "-out", "cert.pem"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    theirs = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    return ours, theirs


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


# --- limits


def test_max_connections(run: Run) -> None:
    async def main() -> None:
        async with server(Echo, max_connections=2) as serving:
            clients = [connect(serving.address) for _ in range(5)]
            for client in clients:
                client.sendall(b"hello")
            while len(serving.made) < 2:
                await asyncio.sleep(0)
            await turns()
            assert len(serving.made) == serving.server.stats().active == 2
            for i, client in enumerate(clients):
                assert await in_thread(client.recv, 5) == b"hello"
                assert serving.server.stats().active <= 2
                client.close()
                await serving.made[i].lost
            assert serving.server.stats().accepted == 5

    run(main())


def test_pause_and_resume(run: Run) -> None:
    async def main() -> None:
        async with server(Echo) as serving:
            serving.server.pause()
            assert serving.server.stats().paused
            with connect(serving.address) as client:
                client.sendall(b"hello")
                await turns()
                assert serving.made == []
                serving.server.resume()
                assert await in_thread(client.recv, 5) == b"hello"
            assert not serving.server.stats().paused

    run(main())


@pytest.mark.parametrize("busy", ["reset", b"full"])
def test_exactly_so_many_wait_while_the_loop_is_blocked(run: Run, busy: Any) -> None:
    clients: list[socket.socket] = []
    answers: list[Any] = []

    def refused(client: socket.socket) -> Any:
        client.settimeout(0.2 if len(answers) < 3 else LIMIT)
        try:
            # Wine reads a reset as an end.
            return client.recv(10) or ("reset" if under_wine() else b"")
        except TimeoutError:
            return "waits"
        except ConnectionResetError:
            return "reset"

    async def main() -> None:
        address: Any = None

        def come() -> None:
            for _ in range(6):
                try:
                    clients.append(connect(address))
                except ConnectionResetError:  # the reset was faster than our look at the connect
                    answers.append("reset")
                else:
                    answers.append(refused(clients[-1]))

        class Blocks(Echo):
            def data_received(self, data: bytes) -> None:
                if data == b"block":
                    thread = threading.Thread(target=come)
                    thread.start()
                    thread.join(LIMIT)  # the event loop does nothing meanwhile
                super().data_received(data)

        async with server(Blocks, pending=3, busy=busy) as serving:
            address = serving.address
            with connect(address) as first:
                first.sendall(b"block")
                assert await in_thread(first.recv, 5) == b"block"
            for client in clients[:3]:
                client.settimeout(LIMIT)
                client.sendall(b"ours")
                assert await in_thread(client.recv, 4) == b"ours"
            for client in clients:
                client.close()
            stats = serving.server.stats()
            assert (stats.accepted, stats.refused) == (7, 3)

    run(main())
    assert answers == ["waits"] * 3 + [busy if isinstance(busy, bytes) else "reset"] * 3


def test_busy_with_max_connections(run: Run) -> None:
    async def main() -> None:
        async with server(Echo, max_connections=1, pending=2, busy=b"full") as serving:
            clients = []
            for i in range(3):  # one is served, two wait
                clients.append(connect(serving.address))
                clients[-1].sendall(b"hello")
                if i == 0:
                    assert await in_thread(clients[0].recv, 5) == b"hello"
            while serving.server.stats().accepted < 3:
                await asyncio.sleep(0)
            assert await in_thread(exchange, serving.address, b"") == b"full"
            assert len(serving.made) == 1
            for i, client in enumerate(clients):
                if i:
                    assert await in_thread(client.recv, 5) == b"hello"
                client.close()
                await serving.made[i].lost
            assert serving.server.stats().refused == 1

    run(main())


def test_busy_on_a_plain_socket_that_was_given(run: Run) -> None:
    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        async with server(Echo, sock=sock, pending=5, busy="reset") as serving:
            assert await in_thread(exchange, serving.address) == b"ping"
            serving.server.pause()
            with connect(serving.address) as client:
                client.sendall(b"hello")
                await turns()
                assert len(serving.made) == 1
                serving.server.resume()
                assert await in_thread(client.recv, 5) == b"hello"

    run(main())


@needs("Linux")
def test_out_of_descriptors_pauses_with_one_line_and_recovers(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> None:
        async with server(Echo) as serving:
            clients = [connect(serving.address) for _ in range(3)]
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                while sum(serving.server.stats().accept_errors.values()) < 3:
                    await asyncio.sleep(0.001)
                assert serving.server.stats().accept_errors.keys() == {"EMFILE"}
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for client in clients:
                client.sendall(b"hello")
                assert await in_thread(client.recv, 5) == b"hello"
                client.close()

    with caplog.at_level(logging.INFO, "fastlisten"):
        run(main())
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("accepting pauses: [Errno 24]")
    assert caplog.messages[1].startswith("accepting again after")


@needs("Linux")
def test_out_of_descriptors_sheds(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> None:
        async with server(Echo, exhausted="shed") as serving:
            await in_thread(int)  # the thread is there now
            clients = [socket.socket() for _ in range(40)]
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                for client in clients:
                    client.settimeout(LIMIT)
                    client.connect(serving.address)
                for client in clients:
                    with pytest.raises(ConnectionResetError):
                        await in_thread(client.recv, 5)
                assert serving.server.stats().refused == len(clients)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for client in clients:
                client.close()
            with connect(serving.address) as client:
                client.sendall(b"hello")
                assert await in_thread(client.recv, 5) == b"hello"

    with caplog.at_level(logging.INFO, "fastlisten"):
        run(main())
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("accepting pauses: [Errno 24]")
    assert caplog.messages[1].startswith("accepting again after")


def test_what_exhausted_may_be(run: Run) -> None:
    async def main() -> None:
        for create in (aio.create_server, aio.create_unix_server):
            with pytest.raises(ValueError, match="exhausted must be 'pause' or 'shed', not 'hope'"):
                await create(Notes, exhausted="hope")  # type: ignore[operator]

    run(main())


# --- Listener.accept_async() and async iteration


def test_accept_async(run_awaits: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with fastlisten.bind("127.0.0.1:0") as listener:
            waiting = asyncio.ensure_future(listener.accept_async())
            await turns()
            assert not waiting.done()
            with connect(listener) as client:
                sock, address = await waiting
                with sock:
                    assert type(sock) is socket.socket
                    assert sock.gettimeout() == 0
                    assert address == client.getsockname() == sock.getpeername()
                    client.sendall(b"hello")
                    assert await loop.sock_recv(sock, 10) == b"hello"
            assert listener.stats().accepted == 1

    run_awaits(main())


def test_cancelling_accepts_loses_no_client(run_awaits: Run) -> None:
    async def main() -> int:
        got = 0
        with fastlisten.bind("127.0.0.1:0", backlog=200) as listener:
            clients = [connect(listener) for _ in range(100)]
            for i in range(300):
                waiting = [asyncio.ensure_future(listener.accept_async()) for _ in range(3)]
                await turns(i % 4)
                for task in waiting:
                    task.cancel()
                for done in await asyncio.gather(*waiting, return_exceptions=True):
                    if isinstance(done, tuple):
                        done[0].close()
                        got += 1
                if got == 100:
                    break
            for client in clients:
                client.close()
            assert listener.stats().accepted == got
            return got

    assert run_awaits(main()) == 100


def test_several_tasks_accept(run_awaits: Run) -> None:
    async def main() -> None:
        with fastlisten.bind("127.0.0.1:0") as listener:
            waiting = [asyncio.ensure_future(listener.accept_async()) for _ in range(5)]
            await turns()
            clients = [connect(listener) for _ in range(5)]
            for sock, _ in await asyncio.gather(*waiting):
                sock.close()
            for client in clients:
                client.close()

    run_awaits(main())


def test_closing_a_listener_ends_who_waits(run_awaits: Run) -> None:
    async def main() -> None:
        listener = fastlisten.bind("127.0.0.1:0")

        async def iterate() -> list[Any]:
            return [connection async for connection in listener]

        iterating = asyncio.ensure_future(iterate())
        waiting = asyncio.ensure_future(listener.accept_async())
        await turns()
        listener.close()
        assert await iterating == []
        with pytest.raises(OSError, match=r"Bad file descriptor|\[WinError 10038\]"):
            await waiting

    run_awaits(main())


@pytest.mark.parametrize("how", ["close", "pause"])
def test_a_waiter_just_cancelled_keeps_nobody_from_being_told(run_awaits: Run, how: str) -> None:
    async def main() -> None:
        listener = fastlisten.bind("127.0.0.1:0")
        waiting = [asyncio.create_task(listener.accept_async()) for _ in range(3)]
        await turns()
        waiting[0].cancel()
        waiting[2].cancel()
        getattr(listener, how)()
        if how == "close":
            with pytest.raises(OSError, match=r"descriptor|10038"):
                await waiting[1]
        else:
            listener.resume()
            with connect(listener.getsockname()):
                (await waiting[1])[0].close()
            listener.close()
        assert [task.cancelled() for task in waiting] == [True, False, True]

    run_awaits(main())
    assert run_awaits.reports == []


def test_a_client_and_a_cancelling_in_one_turn(run: Run) -> None:
    async def main() -> None:
        listener = fastlisten.bind("127.0.0.1:0")
        first, second = (asyncio.create_task(listener.accept_async()) for _ in range(2))
        await turns()
        found = listener._arrivals
        assert found is not None
        first.cancel()
        with connect(listener.getsockname()):
            found._wake_one()  # the loop's call, in the turn in which the task was cancelled
            (await second)[0].close()
        assert first.cancelled()
        listener.close()

    run(main())


@pytest.mark.parametrize("limits", [{}, {"busy": "reset", "pending": 2}], ids=["", "busy"])
def test_a_listener_that_a_server_has_is_not_awaited(run: Run, limits: dict[str, Any]) -> None:
    async def main() -> None:
        listener = fastlisten.bind("127.0.0.1:0")
        waiting = asyncio.create_task(listener.accept_async())
        await turns()
        idle = await aio.create_server(Echo, sock=listener, start_serving=False, **limits)
        with pytest.raises(RuntimeError, match="somebody waits"):
            await idle.start_serving()
        waiting.cancel()
        await asyncio.wait([waiting])
        await idle.start_serving()
        with pytest.raises(RuntimeError, match="server accepts"):
            await listener.accept_async()
        with pytest.raises(RuntimeError, match="server accepts"):
            await anext(aiter(listener))
        with pytest.raises(RuntimeError, match="server accepts"):
            listener.serve(print)
        assert await in_thread(exchange, listener.getsockname()) == b"ping"
        idle.close()
        await idle.wait_closed()

    run(main())


def test_async_iteration_until_stop(run_awaits: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with fastlisten.bind("127.0.0.1:0") as listener:
            served: list[bytes] = []

            async def serve() -> None:
                async for connection in listener:
                    assert isinstance(connection, fastlisten.Connection)
                    with connection:
                        served.append(await loop.sock_recv(connection, 10))
                        await loop.sock_sendall(connection, served[-1])

            for _ in range(2):
                tasks = [asyncio.ensure_future(serve()) for _ in range(3)]
                await turns()
                answers = [await in_thread(exchange, listener, b"%d" % i) for i in range(9)]
                assert answers == [b"%d" % i for i in range(9)]
                await in_thread(listener.stop)
                await asyncio.gather(*tasks)
            assert len(served) == 18
            listener.stop()
            assert [c async for c in listener] == []

    run_awaits(main())


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_drain_takes_what_the_kernel_had_queued(run_awaits: Run, tasks: int, paused: bool) -> None:
    clients = 20

    async def main() -> None:
        with fastlisten.bind("127.0.0.1:0", backlog=clients) as listener:

            async def iterate() -> int:
                count = 0
                async for connection in listener:
                    connection.close()
                    count += 1
                    await asyncio.sleep(0)
                return count

            if paused:
                listener.pause()
            iterations = [asyncio.ensure_future(iterate()) for _ in range(tasks)]
            await turns()
            queued = [connect(listener) for _ in range(clients)]
            listener.stop(drain=LIMIT)
            assert sum(await asyncio.gather(*iterations)) == clients
            listener.resume()
            late = connect(listener)  # is for the next
            listener.stop(drain=0)
            assert await iterate() == 0
            iterating = asyncio.ensure_future(iterate())
            while listener.stats().accepted == clients:
                await asyncio.sleep(0)
            listener.stop()
            assert await iterating == 1
            for sock in (*queued, late):
                sock.close()

    run_awaits(main())


def test_async_iteration_pauses_and_resumes(run_awaits: Run) -> None:
    async def main() -> None:
        with fastlisten.bind("127.0.0.1:0") as listener:
            listener.pause()
            iterator = listener.__aiter__()
            waiting = asyncio.ensure_future(iterator.__anext__())
            with connect(listener):
                await turns()
                assert not waiting.done()
                listener.resume()
                (await waiting).close()

    run_awaits(main())


@pytest.mark.skipif("not hasattr(asyncio, 'ProactorEventLoop')", reason="needs a proactor: Windows")
def test_on_a_proactor_servers_are_asyncios_own() -> None:
    async def main() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            writer.close()

        with pytest.raises(ValueError, match="max_connections needs a selector event loop"):
            await aio.start_server(echo, "127.0.0.1", 0, max_connections=1)
        async with await aio.start_server(echo, "127.0.0.1", 0) as running:
            assert type(running) is asyncio.Server
            address = running.sockets[0].getsockname()
            assert await in_thread(exchange, address, b"hello\n") == b"hello\n"

    asyncio.run(main())


@needs("Linux")
def test_room_is_made_for_as_many_descriptors_as_there_may_be_connections() -> None:
    code = """if True:
        import asyncio, os
        from fastlisten import aio
        from support import descriptor_table

        async def main():
            server = await aio.create_server(asyncio.Protocol, "127.0.0.1", 0, max_connections=500)
            print(descriptor_table(os.getpid()) >= min(500, os.sysconf("SC_OPEN_MAX")))
            server.close()

        asyncio.run(main())
        """
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_importing_fastlisten_does_not_import_asyncio() -> None:
    code = "import sys, fastlisten; print('asyncio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
