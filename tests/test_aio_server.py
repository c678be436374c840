"""fastlisten.aio's servers beside asyncio's own."""

import asyncio
import contextlib
import contextvars
import errno
import gc
import inspect
import os
import socket
import ssl
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastlisten
from fastlisten import aio
from helpers import LIMIT, connect, exchange, needs, posix_only, programs, read_all
from helpers.aio import Echo, Notes, Run, asyncios, in_thread, run, server, turns

__all__ = ["run"]  # a fixture


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
            given: dict[str, Any] = {"sock": sock} if "sock" in mistake else {"port": 0, **mistake}
            given[option] = True
            with pytest.raises((TypeError, ValueError), match=r"ssl|sock|reuse_address"):
                await aio.create_server(Echo, **given)

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


def test_wait_closed_waits_for_clients_where_the_loop_s_own_does(run: Run) -> None:
    """asyncio's does from Python 3.12.1 on; uvloop's does not, and who ends there would wait for ever."""

    async def waits(create: Any) -> bool:
        made: list[Notes] = []

        def factory() -> Notes:
            made.append(Notes())
            return made[-1]

        running = await create(factory, "127.0.0.1", 0)
        with connect(running.sockets[0].getsockname()):
            while not (made and made[0].events):
                await asyncio.sleep(0)
            running.close()
            waiting = asyncio.ensure_future(running.wait_closed())
            await turns()
            answer = not waiting.done()
            made[0].transport.close()
            await waiting
            await made[0].lost
        return answer

    async def main() -> None:
        own = await waits(asyncio.get_running_loop().create_server)
        assert await waits(aio.create_server) == own
        assert own == (run.loop == "asyncio" and sys.version_info >= (3, 12, 1))

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
            await aio.create_server(Notes, "127.0.0.1", 0, fast_open="x")  # type: ignore[arg-type]
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


@needs("unix sockets")
@posix_only("asyncio has no unix servers on Windows")
def test_a_unix_path_on_which_somebody_answers_is_not_taken_over(run: Run, unix_path: str) -> None:
    """asyncio unlinks it, and the other server is never reached again; a stale path is taken over."""

    async def main() -> None:
        first = await aio.create_unix_server(Echo, unix_path, cleanup_socket=False)
        for path in (unix_path, unix_path.encode(), Path(unix_path)):
            with pytest.raises(OSError, match="already in use") as error:
                await aio.create_unix_server(Echo, path)
            assert error.value.errno == errno.EADDRINUSE
        assert await in_thread(exchange, unix_path, b"hello") == b"hello"
        first.close()
        second = await aio.create_unix_server(Echo, unix_path)
        assert await in_thread(exchange, unix_path, b"hello") == b"hello"
        second.close()

    run(main())


@pytest.mark.parametrize("limits", [{}, {"busy": "reset", "pending": 2}], ids=["", "busy"])
def test_a_listener_that_is_closed_under_its_server_is_accepted_from_no_more(
    run: Run, limits: dict[str, Any]
) -> None:
    """Its number may be a stranger's the next moment, and the event loop and the refuser know only that."""

    async def main() -> None:
        listener = fastlisten.bind("127.0.0.1:0")
        running = await aio.create_server(Echo, sock=listener, **limits)
        assert await in_thread(exchange, listener.getsockname(), b"hello") == b"hello"
        listener.close()
        with socket.create_server(("127.0.0.1", 0)) as stranger:
            stranger.settimeout(LIMIT)
            with connect(stranger):
                await turns()
                stranger.accept()[0].close()  # nobody else has taken it
        running.close()

    run(main())


@needs("unix sockets")
@posix_only("asyncio has no unix servers on Windows")
def test_a_unix_path_is_unlinked_by_its_maker_only(run: Run, unix_path: str) -> None:
    """Neither when the socket was given, nor by a child that was forked."""

    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(unix_path)
            given = await aio.create_unix_server(Echo, sock=sock, cleanup_socket=True)
            given.close()
        assert os.path.exists(unix_path)
        made = await aio.create_unix_server(Echo, unix_path, cleanup_socket=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads
            child = os.fork()
        if child == 0:
            try:
                made.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.path.exists(unix_path)
        made.close()
        assert not os.path.exists(unix_path)

    run(main())


@pytest.mark.skipif("not hasattr(asyncio, 'ProactorEventLoop')", reason="needs a proactor: Windows")
def test_on_a_proactor_servers_are_asyncios_own() -> None:
    async def main() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            writer.close()

        with pytest.raises(ValueError, match="max_connections needs a selector event loop"):
            await aio.start_server(echo, "127.0.0.1", 0, max_connections=1)
        async with await aio.start_server(echo, "127.0.0.1", 0) as running:
            assert isinstance(running, asyncio.Server)
            address = running.sockets[0].getsockname()
            assert await in_thread(exchange, address, b"hello\n") == b"hello\n"

    asyncio.run(main())


def test_importing_fastlisten_does_not_import_asyncio() -> None:
    code = "import sys, fastlisten; print('asyncio' in sys.modules)"
    assert programs.run(code).stdout.strip() == "False"
