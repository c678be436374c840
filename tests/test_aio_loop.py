"""Event loops of fastlisten.aio: what they override, what they refuse, and what makes them."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastlisten import aio
from helpers import LIMIT, connect, exchange, needs, posix_only, read_all
from helpers.aio import BIG, LOOPS, Echo, Notes, files_are_read, in_thread
from helpers.certificates import tls_contexts
from helpers.programs import run as run_program

OURS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": aio.EventLoop}
if "uvloop" in LOOPS:
    OURS["uvloop"] = aio.UvloopEventLoop


# Loops that aio.create_server() may be called on.
EVERY = OURS | {f"{name}'s own": factory for name, factory in LOOPS.items()}


@pytest.fixture(params=OURS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which loop: asyncio's or uvloop's."""
    return str(request.param)


def run_on(factory: Callable[[], asyncio.AbstractEventLoop], main: Callable[[], Any], **options: Any) -> Any:
    """Run main() on a loop of this kind; it ends, and leaves no descriptor open."""

    async def limited() -> Any:
        async with asyncio.timeout(LIMIT):
            return await main()

    with asyncio.Runner(loop_factory=factory, **options) as runner:
        return runner.run(limited())


def running() -> Any:
    """The running loop, whose create_server() has more options than asyncio's."""
    return asyncio.get_running_loop()


@contextlib.contextmanager
def pair() -> Any:
    """A socket that was accepted, and its client."""
    with socket.create_server(("127.0.0.1", 0)) as listener, connect(listener) as client:
        yield listener.accept()[0], client


# --- servers


def test_what_asyncio_calls_is_ours(kind: str) -> None:
    """loop.create_server(), and asyncio.start_server(), which calls it."""

    async def main() -> None:
        loop = running()
        made: list[Any] = []

        def factory() -> Any:
            made.append(Echo())
            return made[-1]

        server = await loop.create_server(factory, "127.0.0.1", 0)
        async with server:
            assert type(server) is aio.Server
            assert await in_thread(exchange, server.sockets[0].getsockname(), b"x") == b"x"
            assert type(made[0].transport) is aio.Transport

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(1))
            writer.close()

        streams: Any = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with streams:
            assert type(streams) is aio.Server
            assert await in_thread(exchange, streams.sockets[0].getsockname(), b"y") == b"y"

    run_on(OURS[kind], main)


@posix_only("asyncio has no unix servers on Windows")
def test_unix_servers_are_ours_too(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "socket")
        server = await running().create_unix_server(Echo, path)
        async with server:
            assert type(server) is aio.Server
            assert await in_thread(exchange, path, b"x") == b"x"

    run_on(OURS[kind], main)


@posix_only("asyncio has no unix servers on Windows")
def test_the_options_of_a_loop_are_its_servers_defaults(kind: str, tmp_path: Path) -> None:
    """Those that its caller gives count more; a unix server has those that are not for TCP."""
    factory = aio.loop_factory(OURS[kind], no_delay=False, max_connections=1, busy=b"busy")

    async def main() -> None:
        loop = running()

        async def answers(server: asyncio.Server, busy: bool) -> tuple[bytes, bytes]:
            async with server:
                address = server.sockets[0].getsockname()
                with connect(address) as first, connect(address) as second:
                    first.sendall(b"x")
                    if not busy:  # who is refused may be gone by now
                        second.sendall(b"y")
                    return await in_thread(first.recv, 9), await in_thread(second.recv, 9)

        assert await answers(await loop.create_server(Echo, "127.0.0.1", 0), True) == (b"x", b"busy")
        unlimited = await loop.create_server(Echo, "127.0.0.1", 0, max_connections=9)
        assert await answers(unlimited, False) == (b"x", b"y")
        on_a_path = await loop.create_unix_server(Echo, str(tmp_path / "s"))
        assert await answers(on_a_path, True) == (b"x", b"busy")

    run_on(factory, main)


@needs("the openssl command")
def test_others_read_these_of_a_server(kind: str, tmp_path: Path) -> None:
    """websockets reads _ssl_context, and tests of others _active_count."""
    context, _ = tls_contexts(tmp_path)

    async def main() -> None:
        server: Any = await running().create_server(Echo, "127.0.0.1", 0, ssl=context)
        async with server:
            assert server._ssl_context is context
        plain: Any = await running().create_server(Echo, "127.0.0.1", 0)
        async with plain:
            assert (plain._ssl_context, plain._active_count) == (None, 0)
            with connect(plain.sockets[0].getsockname()) as client:
                client.sendall(b"x")
                assert await in_thread(client.recv, 1) == b"x"
                assert plain._active_count == 1

    run_on(OURS[kind], main)


# --- connect_accepted_socket()


class Buffered(asyncio.BufferedProtocol):
    """Keeps what comes in a buffer of its own."""

    def __init__(self) -> None:
        self.buffer = bytearray(8)
        self.got: asyncio.Future[bytes] = running().create_future()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.got.set_result(bytes(self.buffer[:nbytes]))


def test_a_client_that_was_accepted_elsewhere(kind: str) -> None:
    """It is told of before the call returns; what it has said comes after that, as in asyncio."""

    async def main() -> None:
        with pair() as (accepted, client):
            client.sendall(b"early")
            transport, protocol = await running().connect_accepted_socket(Echo, accepted)
            assert type(transport) is aio.Transport
            assert isinstance(protocol, Echo)
            if kind == "asyncio":  # uvloop's own may have read by now
                assert protocol.events == ["made"]
            assert transport.get_extra_info("peername") == client.getsockname()
            assert transport.get_extra_info("sockname") == client.getpeername()
            assert transport.get_extra_info("socket").fileno() == accepted.fileno()
            assert await in_thread(client.recv, 9) == b"early"
            client.shutdown(socket.SHUT_WR)
            await protocol.lost
            assert protocol.events == ["made", "data", "eof", "lost"]
            await asyncio.sleep(0)
            assert accepted.fileno() == -1

    run_on(OURS[kind], main)


def test_it_may_be_a_buffered_protocol_and_be_closed_in_connection_made(kind: str) -> None:
    class Closes(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.write(b"bye")
            transport.close()

    async def main() -> None:
        loop = running()
        with pair() as (accepted, client):
            transport, protocol = await loop.connect_accepted_socket(Buffered, accepted)
            client.sendall(b"filled")
            assert await protocol.got == b"filled"
            transport.abort()
        with pair() as (accepted, client):
            _, closing = await loop.connect_accepted_socket(Closes, accepted)
            assert await in_thread(read_all, client) == b"bye"
            await closing.lost
            assert closing.events == ["made", "lost"]

    run_on(OURS[kind], main)


@needs("the openssl command")
def test_a_client_that_was_accepted_elsewhere_over_tls(kind: str, tmp_path: Path) -> None:
    context, trusting = tls_contexts(tmp_path)

    async def main() -> None:
        loop = running()
        with pair() as (accepted, client):
            speaking = in_thread(lambda: trusting.wrap_socket(client, server_hostname="localhost"))
            task = asyncio.ensure_future(speaking)
            transport, _ = await loop.connect_accepted_socket(Echo, accepted, ssl=context)
            assert transport.get_extra_info("cipher")
            with await task as tls:
                tls.sendall(b"secret")
                assert await in_thread(tls.recv, 9) == b"secret"
            transport.abort()
        with pair() as (accepted, client):
            client.sendall(b"this is no ClientHello")
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await loop.connect_accepted_socket(Echo, accepted, ssl=context)
            await in_thread(read_all, client)

    run_on(OURS[kind], main)


def test_what_connect_accepted_socket_refuses(kind: str) -> None:
    """As the base loop does, in its words; a socket that was refused is still its caller's."""

    async def refused(loop: Any, sock: Any, **options: Any) -> list[Any]:
        found = []
        for factory in (Echo, BrokenFactory):
            try:
                transport, _ = await loop.connect_accepted_socket(factory, sock, **options)
                transport.abort()
            except Exception as error:
                found.append((type(error), str(error).partition(",")[0]))  # which socket comes after it
        return found

    def BrokenFactory() -> Any:  # noqa: N802
        raise LookupError

    async def main() -> list[Any]:
        loop = running()
        with pair() as (accepted, _), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram, accepted:
            found: list[Any] = [await refused(loop, datagram)]
            found.append(await refused(loop, accepted, ssl_handshake_timeout=1.0))
            found.append(await refused(loop, accepted, ssl_shutdown_timeout=1.0))
            with pytest.raises(LookupError):
                await loop.connect_accepted_socket(BrokenFactory, accepted)
            if type(loop) is OURS[kind]:  # some versions of asyncio close it
                assert accepted.fileno() >= 0
            return found

    answers = run_on(OURS[kind], main)
    assert answers == run_on(LOOPS[kind], main)
    assert {kind for answer in answers for kind, _ in answer} == {ValueError}


def test_a_call_that_is_cancelled_closes_the_client(kind: str) -> None:
    async def main() -> None:
        with pair() as (accepted, client):
            call = asyncio.ensure_future(running().connect_accepted_socket(Echo, accepted))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await in_thread(read_all, client) == b""

    run_on(OURS[kind], main)


def test_anyios_listeners_have_our_transports(kind: str) -> None:
    """They accept by themselves, and hand each client to connect_accepted_socket()."""
    anyio = pytest.importorskip("anyio")
    local_address = pytest.importorskip("anyio.abc").SocketAttribute.local_address

    async def main() -> None:
        served: asyncio.Future[Any] = running().create_future()

        async def echo(stream: Any) -> None:
            async with stream:
                served.set_result(stream._transport)
                await stream.send(await stream.receive())

        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, echo)
            address = listener.extra(local_address)
            assert await in_thread(exchange, address, b"x") == b"x"
            assert type(await served) is aio.Transport
            group.cancel_scope.cancel()
        await listener.aclose()

    run_on(OURS[kind], main)


# --- what has to know our transports


@pytest.mark.parametrize("loop_name", EVERY)
def test_nobody_else_may_watch_a_transports_descriptor(loop_name: str) -> None:
    """As with the loop's own transports, while it is open: there were two readers of a socket."""

    async def main() -> None:
        loop = running()
        server = await aio.create_server(Echo, "127.0.0.1", 0)
        async with server:
            with connect(server.sockets[0].getsockname()) as client:
                client.sendall(b"x")
                assert await in_thread(client.recv, 1) == b"x"
                (transport,) = server._connections.clients()
                number = transport.get_extra_info("socket").fileno()
                with transport.get_extra_info("socket").dup() as copy:
                    for watch in (loop.add_reader, loop.add_writer):
                        with pytest.raises(RuntimeError, match="is used by transport <fastlisten"):
                            watch(number, print)
                    for forget in (loop.remove_reader, loop.remove_writer):
                        with pytest.raises(RuntimeError, match="is used by transport <fastlisten"):
                            forget(number)
                    copy.setblocking(False)
                    loop.add_writer(copy, print)  # another number is another's
                    loop.remove_writer(copy)
                own = transport.get_extra_info("socket")._sock
                for use in (loop.sock_recv(own, 1), loop.sock_recv_into(own, bytearray(1))):
                    with pytest.raises(RuntimeError, match="is used by transport <fastlisten"):
                        await use
                client.sendall(b"y")
                assert await in_thread(client.recv, 1) == b"y"
                transport.abort()
                assert await in_thread(read_all, client) == b""

    run_on(EVERY[loop_name], main)


@pytest.mark.parametrize("loop_name", EVERY)
@needs("the openssl command")
def test_start_tls_of_our_transport(loop_name: str, tmp_path: Path) -> None:
    """On uvloop it said that the transport is not supported; and TLS inside of it, too."""
    context, trusting = tls_contexts(tmp_path)

    async def main() -> None:
        loop = running()
        made: asyncio.Future[tuple[Any, Any]] = loop.create_future()

        class Later(Echo):
            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                if not made.done():
                    transport.pause_reading()
                    made.set_result((transport, self))

        server = await aio.create_server(Later, "127.0.0.1", 0)
        async with server:
            with connect(server.sockets[0].getsockname()) as client:
                transport, protocol = await made
                task = asyncio.ensure_future(
                    in_thread(lambda: trusting.wrap_socket(client, server_hostname="localhost"))
                )
                over = await loop.start_tls(transport, protocol, context, server_side=True)
                protocol.transport = over
                with await task as tls:
                    tls.sendall(b"secret")
                    assert await in_thread(tls.recv, 9) == b"secret"
                    over.abort()

    run_on(EVERY[loop_name], main)


@files_are_read
@pytest.mark.parametrize("loop_name", EVERY)
def test_sendfile_of_our_transport(loop_name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789" * (BIG // 10))

    async def main() -> None:
        loop = running()
        server = await aio.create_server(Notes, "127.0.0.1", 0)
        async with server:
            with connect(server.sockets[0].getsockname()) as client, path.open("rb") as file:
                while not server._connections.clients():
                    await asyncio.sleep(0)
                (transport,) = server._connections.clients()
                reading = asyncio.ensure_future(in_thread(read_all, client))
                assert await loop.sendfile(transport, file, 5) == path.stat().st_size - 5
                number = transport.get_extra_info("socket").fileno()
                with pytest.raises(RuntimeError, match="is used by transport"):
                    loop.add_reader(number, print)
                transport.close()
                assert await reading == path.read_bytes()[5:]

    run_on(EVERY[loop_name], main)


def test_a_connection_that_holds_up_the_loop_is_named(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """In debug mode, where asyncio names the callback: all that one wake serves is one callback there."""
    slow: list[str] = []

    class Slow(Notes):
        def data_received(self, data: bytes) -> None:
            slow.append(repr(self.transport))
            until = time.monotonic() + 0.02
            while time.monotonic() < until:
                pass
            self.transport.close()

    async def main() -> None:
        loop = running()
        server = await loop.create_server(Slow, "127.0.0.1", 0)
        async with server:
            loop.set_debug(True)
            loop.slow_callback_duration = 0.01
            with connect(server.sockets[0].getsockname()) as client:
                while not server._connections.clients():
                    await asyncio.sleep(0)
                client.sendall(b"x")
                assert await in_thread(read_all, client) == b""

    with caplog.at_level(logging.WARNING, logger="asyncio"):
        run_on(OURS[kind], main)
    assert [text for text in caplog.messages if "fastlisten.Transport" in text and "took 0." in text], (
        caplog.messages
    )
    assert slow


# --- as the base loop


@posix_only("Windows' selector loop has neither subprocesses nor signals")
def test_subprocesses_signals_and_executors_are_the_base_loops(kind: str) -> None:
    async def main() -> tuple[Any, ...]:
        loop = running()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "print('child')"), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        heard: asyncio.Future[str] = loop.create_future()
        loop.add_signal_handler(signal.SIGUSR1, heard.set_result, "heard")
        os.kill(os.getpid(), signal.SIGUSR1)
        told = await heard
        loop.remove_signal_handler(signal.SIGUSR1)
        return out, process.returncode, told, await in_thread(len, "abc")

    assert run_on(OURS[kind], main) == (b"child\n", 0, "heard", 3)


@posix_only("descriptors are counted by dup()")
def test_a_loop_that_is_closed_leaves_nothing_open(kind: str) -> None:
    def lowest_free() -> int:
        free = os.dup(0)
        os.close(free)
        return free

    async def main() -> None:
        with pair() as (accepted, client):
            transport, protocol = await running().connect_accepted_socket(Echo, accepted)
            client.sendall(b"x")
            assert await in_thread(client.recv, 1) == b"x"
            transport.close()
            await protocol.lost

    run_on(OURS[kind], main)
    before = lowest_free()
    run_on(OURS[kind], main)
    assert lowest_free() == before


# --- what makes a loop


def test_run_and_new_event_loop() -> None:
    async def main() -> tuple[type, bool]:
        loop = running()
        return type(loop), loop.get_debug()

    assert aio.run(main()) == (aio.EventLoop, sys.flags.dev_mode)
    assert aio.run(main(), debug=True) == (aio.EventLoop, True)
    assert aio.run(main(), loop_factory=asyncio.SelectorEventLoop)[0] is asyncio.SelectorEventLoop
    loop = aio.new_event_loop()
    try:
        assert type(loop) is aio.EventLoop
        assert isinstance(loop, asyncio.SelectorEventLoop)
    finally:
        loop.close()


def test_a_factory_builds_on_the_class_it_is_given() -> None:
    class Own(asyncio.SelectorEventLoop):
        mark = "own"

    factory: Any = aio.loop_factory(Own, backlog=7)
    loop = factory()
    try:
        assert (loop.mark, isinstance(loop, Own)) == ("own", True)

        async def main() -> Any:
            async with await loop.create_server(Echo, "127.0.0.1", 0) as server:
                return server._backlog, type(server)

        assert loop.run_until_complete(main()) == (7, aio.Server)
    finally:
        loop.close()


@pytest.mark.parametrize("base", LOOPS)
def test_a_factory_builds_on_a_class_of_asyncios_and_uvloops(base: str) -> None:
    given: Any = asyncio.SelectorEventLoop
    if base == "uvloop":
        import uvloop

        given = uvloop.Loop

    async def main() -> type:
        async with await running().create_server(Echo, "127.0.0.1", 0) as server:
            return type(server)

    assert run_on(aio.loop_factory(given), main) is aio.Server


class NoSelector(asyncio.AbstractEventLoop):
    pass


@pytest.mark.parametrize(
    ("base", "options", "error", "words"),
    [
        (None, {"max_conections": 3}, TypeError, "no option of a loop: max_conections; there are: admission"),
        (None, {"sock": None}, TypeError, "no option of a loop: sock"),
        (None, {"max_connections": 0}, ValueError, "max_connections must be at least 1"),
        (None, {"busy": 5}, TypeError, "busy must be 'reset' or bytes"),
        (None, {"exhausted": "spin"}, ValueError, "exhausted must be 'pause' or 'shed'"),
        (asyncio.new_event_loop, {}, TypeError, "no class of selector event loops"),
        (NoSelector, {}, TypeError, "no class of selector event loops"),
        (int, {}, TypeError, "no class of selector event loops"),
    ],
)
def test_what_a_factory_refuses_at_once(base: Any, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        aio.loop_factory(base, **options)


WITHOUT_UVLOOP = """
import sys
sys.modules["uvloop"] = None  # as if it were not installed
from fastlisten import aio
from fastlisten.aio import *
try:
    from fastlisten.aio import UvloopEventLoop
except ImportError as error:
    print(error)
"""


def test_uvloop_is_asked_for_only_by_who_wants_it() -> None:
    assert run_program(WITHOUT_UVLOOP).stdout == "UvloopEventLoop needs uvloop: pip install uvloop\n"
