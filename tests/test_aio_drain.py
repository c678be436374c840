"""close(drain=) of an asyncio server: who is queued is served, what takes longer is aborted, what ends it."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import fastlisten
from fastlisten import aio
from helpers import LIMIT, connect, needs, posix_only, read_all
from helpers.aio import Echo, Notes, Run, asyncios, in_thread, run, turns
from helpers.descriptors import out_of_descriptors
from helpers.programs import run as run_program

__all__ = ["run"]  # a fixture

LIMITS: dict[str, dict[str, Any]] = {
    "": {},
    "limit": {"max_connections": 3},
    "busy": {"busy": "reset", "pending": 100},
    "busy limit": {"busy": b"full", "pending": 100, "max_connections": 3},
}
limits_of_all = pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
limits_of_two = pytest.mark.parametrize("limits", [LIMITS[""], LIMITS["busy"]], ids=["", "busy"])


class Answer(Notes):
    """Sends back what comes first, and hangs up."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)
        self.transport.close()


@contextlib.contextmanager
def queued(*addresses: Any, count: int = 100) -> Iterator[list[socket.socket]]:
    """Connect clients that have each sent their number; the event loop does nothing meanwhile."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(addresses[n % len(addresses)])) for n in range(count)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        yield clients


def told(client: socket.socket) -> bytes:
    """Return what a client got in the end; b"" for a reset, too."""
    try:
        return read_all(client)
    except ConnectionError:
        return b""


def served(clients: list[socket.socket]) -> int:
    """Return how many clients got their number back."""
    return sum(told(client) == b"%d" % n for n, client in enumerate(clients))


def balanced(server: aio.Server) -> Any:
    """Return the stats of a server that is over, whose books must balance."""
    stats = server.stats()
    assert stats.active == 0
    assert stats.accepted == stats.handled + stats.refused + stats.dropped
    return stats


async def until_open(server: aio.Server, count: int = 1) -> None:
    """Wait until so many clients are with their protocols, or wait for that in the server's own queue."""
    while server.stats().accepted < count:
        await asyncio.sleep(0)
    await turns()


@contextlib.asynccontextmanager
async def holding(factory: Callable[[], Any] = Echo, **options: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Serve, with one client whose connection is open; all is aborted at the end."""
    server = await aio.create_server(factory, "127.0.0.1", 0, **options)
    with connect(server.sockets[0].getsockname()) as client:
        await until_open(server)
        try:
            yield server, client
        finally:
            server.close(drain=0)
            await server.wait_closed()
            balanced(server)


async def exchanged(client: socket.socket, data: bytes = b"ping") -> bytes:
    client.sendall(data)
    return await in_thread(client.recv, 100)


# --- who is queued


@pytest.mark.parametrize("paused", [False, True], ids=["", "paused"])
@limits_of_all
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs("the IPv6 loopback address"))])
def test_all_who_are_queued_are_served(run: Run, host: str, limits: Any, paused: bool) -> None:
    """100 of 100; with busy= they are in our queue by then, or, while it is paused, in the kernel's."""

    async def main() -> None:
        server = await aio.create_server(Answer, host, 0, **limits)
        if paused:
            server.pause()
            await turns()
        with queued(server.sockets[0].getsockname()) as clients:
            server.close(drain=LIMIT)
            assert not server.is_serving()
            await server.wait_closed()
            assert server.sockets == ()
            assert served(clients) == balanced(server).handled == 100

    run(main())
    assert run.reports == []


@needs("unix sockets")
@posix_only("asyncio has no unix servers on Windows")
@limits_of_all
def test_all_who_are_queued_on_a_unix_socket_are_served(run: Run, limits: Any, unix_path: str) -> None:
    """The kernel does not tell how many they are; the path is unlinked as by any close()."""

    async def main() -> None:
        server = await aio.create_unix_server(Answer, unix_path, backlog=100, cleanup_socket=True, **limits)
        with queued(unix_path) as clients:
            server.close(LIMIT)
            await server.wait_closed()
            assert served(clients) == balanced(server).handled == 100
            assert not os.path.exists(unix_path)

    run(main())


@pytest.mark.parametrize("create", [aio.create_server, asyncios])
def test_without_a_drain_they_are_reset(run: Run, create: Any) -> None:
    async def main() -> None:
        server = await create(Answer, "127.0.0.1", 0)
        with queued(server.sockets[0].getsockname()) as clients:
            server.close()
            await server.wait_closed()
            assert served(clients) == 0

    run(main())


@limits_of_all
def test_the_queues_of_several_sockets(run: Run, limits: Any) -> None:
    async def main() -> None:
        server = await aio.create_server(Answer, ["127.0.0.1", "127.0.0.2"], 0, **limits)
        with queued(*[sock.getsockname() for sock in server.sockets]) as clients:
            server.close(drain=LIMIT)
            await server.wait_closed()
            assert served(clients) == balanced(server).handled == 100

    run(main())


@limits_of_two
def test_streams(run: Run, limits: Any) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(100))
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        server = await aio.start_server(echo, "127.0.0.1", 0, **limits)
        with queued(server.sockets[0].getsockname()) as clients:
            server.close(drain=LIMIT)
            await server.wait_closed()
            assert served(clients) == balanced(server).handled == 100

    run(main())


@needs("TCP_INFO of a listener")
@limits_of_two
def test_who_comes_later_is_not_waited_for(run: Run, limits: Any) -> None:
    """The queue as it was is what is owed an answer: it ends, too, where each client brings one more."""

    async def main(come: contextlib.ExitStack) -> None:
        class BringsOneMore(Answer):
            def data_received(self, data: bytes) -> None:
                super().data_received(data)
                with contextlib.suppress(ConnectionError):  # the socket is closed
                    come.enter_context(connect(address)).sendall(b"late")

        server = await aio.create_server(BringsOneMore, "127.0.0.1", 0, **limits)
        address = server.sockets[0].getsockname()
        with queued(address, count=40) as clients:
            server.close(drain=LIMIT)
            await server.wait_closed()
            assert served(clients) == 40
            # the refuser looks how many are queued when it hears of the drain
            assert balanced(server).accepted <= 2 * 40 or limits

    with contextlib.ExitStack() as come:
        run(main(come))


def test_who_is_taken_by_somebody_else_is_not_waited_for(run: Run) -> None:
    """Of a queue that processes share: it is shorter than it was, and no event tells so."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            server = await aio.create_server(Answer, sock=sock.dup())
            with queued(sock.getsockname(), count=5) as clients:
                server.close(drain=LIMIT)
                for _ in clients:
                    sock.accept()[0].close()
                async with asyncio.timeout(LIMIT / 2):
                    await server.wait_closed()

    run(main())


@limits_of_all
def test_with_nobody_queued_the_sockets_close_and_connections_go_on(run: Run, limits: Any) -> None:
    """wait_closed() waits for them, also before Python 3.12: the loop must not end under them."""

    async def main() -> None:
        async with holding(**limits) as (server, client):
            address = server.sockets[0].getsockname()
            server.close(drain=float("inf"))
            waiting = asyncio.ensure_future(server.wait_closed())
            while server.sockets:
                await asyncio.sleep(0.001)
            with pytest.raises(ConnectionRefusedError):
                connect(address)
            assert await exchanged(client) == b"ping"
            await turns()
            assert not waiting.done()
            client.close()
            await waiting

    run(main())


@limits_of_two
def test_a_pause_does_not_hold_a_drain_up(run: Run, limits: Any) -> None:
    async def main() -> None:
        server = await aio.create_server(Answer, "127.0.0.1", 0, max_connections=1, **limits)
        with queued(server.sockets[0].getsockname(), count=20) as clients:
            server.close(drain=LIMIT)
            server.pause()
            await server.wait_closed()
            assert served(clients) == 20

    run(main())


@needs("Linux")
@limits_of_two
def test_a_shortage_does_not_end_a_drain(run: Run, limits: Any) -> None:
    async def main() -> None:
        server = await aio.create_server(Answer, "127.0.0.1", 0, **limits)
        server.pause()
        await turns()
        with queued(server.sockets[0].getsockname(), count=20) as clients:
            with out_of_descriptors():
                server.close(drain=LIMIT)
                while sum(server.stats().accept_errors.values()) < 3:
                    await asyncio.sleep(0.001)
                assert server.stats().accepted == 0
            await server.wait_closed()
            assert served(clients) == balanced(server).handled == 20

    run(main())


# --- the time it has, and what ends it sooner


def ends_by_its_time(server: aio.Server) -> None:
    server.close(drain=0.1)


def a_longer_time_is_not_heard(server: aio.Server) -> None:
    server.close(drain=0.1)
    server.close(drain=LIMIT)


def is_given_less_time(server: aio.Server) -> None:
    server.close(drain=LIMIT)
    server.close(drain=0.1)


def is_given_no_time(server: aio.Server) -> None:
    server.close(drain=LIMIT)
    server.close(drain=0)


def has_no_time(server: aio.Server) -> None:
    server.close(drain=0)


ENDS = [ends_by_its_time, a_longer_time_is_not_heard, is_given_less_time, is_given_no_time, has_no_time]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("limits", [{}, {"busy": "reset", "pending": 9}], ids=["", "busy"])
def test_at_the_end_of_its_time(run: Run, limits: Any, end: Any) -> None:
    """Who is still queued is reset or dropped, and who is connected is aborted."""

    async def main() -> None:
        async with holding(max_connections=1, **limits) as (server, client):
            with queued(server.sockets[0].getsockname(), count=5) as clients:
                if limits:
                    await until_open(server, 6)
                end(server)
                async with asyncio.timeout(LIMIT / 2):
                    await server.wait_closed()
                assert server.sockets == ()
                assert await in_thread(told, client) == b""
                assert served(clients) == 0
                stats = balanced(server)
                assert (stats.handled, stats.dropped) == (1, 5 if limits else 0)

    run(main())
    assert run.reports == []


@pytest.mark.parametrize("limits", [{}, {"busy": "reset", "pending": 9}], ids=["", "busy"])
def test_close_in_a_drain_is_what_close_is(run: Run, limits: Any) -> None:
    """The queue is given up at once, and who is connected goes on for the time that the drain gave."""

    async def main() -> None:
        async with holding(max_connections=1, **limits) as (server, client):
            with queued(server.sockets[0].getsockname(), count=5) as clients:
                server.close(drain=LIMIT)
                await turns()
                server.close()
                assert server.sockets == ()
                assert served(clients) == 0
                assert await exchanged(client) == b"ping"
                server.close(drain=0.05)
                await server.wait_closed()
                assert await in_thread(told, client) == b""

    run(main())


@pytest.mark.parametrize("drain", [-1, -0.1, float("nan"), float("-inf")])
def test_a_drain_is_not_negative(run: Run, drain: float) -> None:
    async def main() -> None:
        async with holding() as (server, client):
            with pytest.raises(ValueError, match="drain must not be negative, not"):
                server.close(drain=drain)
            assert server.is_serving()
            assert await exchanged(client) == b"ping"

    run(main())


# --- the rest of a server's life


def test_a_server_that_does_not_serve_has_nobody_to_drain(run: Run) -> None:
    async def main() -> None:
        server = await aio.create_server(Answer, "127.0.0.1", 0, start_serving=False)
        server.close(drain=LIMIT)
        assert server.sockets == ()
        await server.wait_closed()
        server.close(drain=LIMIT)  # and a closed one neither
        await server.wait_closed()

    run(main())


@limits_of_two
def test_in_a_drain_a_server_is_closed(run: Run, limits: Any) -> None:
    async def main() -> None:
        async with holding(**limits) as (server, _):
            server.close(drain=LIMIT)
            for start in (server.start_serving, server.serve_forever):
                with pytest.raises(RuntimeError, match="closed"):
                    await start()
            assert not server.is_serving()

    run(main())


@pytest.mark.parametrize("within", [False, True], ids=["serve_forever", "async with"])
@limits_of_two
def test_serve_forever_ends_with_the_drain(run: Run, limits: Any, within: bool) -> None:
    """Not before: what comes after it is the end of the program, and of who is not served by then."""

    async def main() -> None:
        async with holding(**limits) as (server, client):

            async def forever() -> None:
                async with server if within else contextlib.nullcontext():
                    await server.serve_forever()

            serving = asyncio.create_task(forever())
            await turns()
            server.close(drain=LIMIT)
            await turns()
            assert not serving.done()
            assert await exchanged(client) == b"ping"
            client.close()
            with pytest.raises(asyncio.CancelledError):
                await serving
            assert (server.stats().active, server.sockets) == (0, ())

    run(main())


def test_serve_forever_ends_at_the_end_of_the_drains_time(run: Run) -> None:
    async def main() -> None:
        async with holding() as (server, client):
            serving = asyncio.create_task(server.serve_forever())
            await turns()
            server.close(drain=0.05)
            with pytest.raises(asyncio.CancelledError):
                await serving
            assert await in_thread(told, client) == b""

    run(main())


@pytest.mark.parametrize("error", [None, ValueError], ids=["", "raises"])
def test_async_with_waits_for_a_drain_unless_something_is_raised(run: Run, error: Any) -> None:
    """It closes a server, which would end the drain."""

    async def main() -> int:
        server = await aio.create_server(Answer, "127.0.0.1", 0)
        with queued(server.sockets[0].getsockname(), count=20) as clients:
            with contextlib.suppress(ValueError):
                async with server:
                    server.close(drain=LIMIT)
                    if error is not None:
                        raise error
            assert server.sockets == ()
            return served(clients)

    assert run(main()) == (0 if error else 20)


@limits_of_two
def test_cancelling_serve_forever_ends_a_drain(run: Run, limits: Any) -> None:
    async def main() -> None:
        server = await aio.create_server(Answer, "127.0.0.1", 0, max_connections=1, **limits)
        address = server.sockets[0].getsockname()
        serving = asyncio.create_task(server.serve_forever())
        await turns()
        with connect(address) as first:
            await until_open(server)
            with queued(address, count=5) as clients:
                server.close(drain=LIMIT)
                serving.cancel()
                await turns()
                assert server.sockets == ()
                assert served(clients) == 0
            first.sendall(b"x")
            with pytest.raises(asyncio.CancelledError):
                await serving
        balanced(server)

    run(main())


@needs("signals between processes")
def test_a_signal_drains(run: Run) -> None:
    async def main() -> None:
        server = await aio.create_server(Answer, "127.0.0.1", 0)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, server.close, LIMIT)
        with queued(server.sockets[0].getsockname(), count=20) as clients:
            server.pause()  # or they would be served before the signal is heard
            os.kill(os.getpid(), signal.SIGTERM)
            await server.wait_closed()
            assert served(clients) == 20
        loop.remove_signal_handler(signal.SIGTERM)

    run(main())


@limits_of_two
def test_a_listener_that_is_closed_under_a_drain_ends_it(run: Run, limits: Any) -> None:
    """Its number may be a stranger's the next moment, from whom nobody is taken."""

    async def main() -> None:
        listener = fastlisten.bind("127.0.0.1:0")
        server = await aio.create_server(Answer, sock=listener, max_connections=1, **limits)
        address = listener.getsockname()
        with connect(address) as first:
            await until_open(server)
            with queued(address, count=5) as clients:
                if limits:
                    await until_open(server, 6)
                server.close(drain=LIMIT)
                number = listener.fileno()
                listener.close()
                with socket.create_server(("127.0.0.1", 0)) as stranger, connect(stranger):
                    assert stranger.fileno() == number
                    first.sendall(b"x")
                    await server.wait_closed()
                    stranger.settimeout(LIMIT)
                    stranger.accept()[0].close()
                assert server.sockets == ()
                assert served(clients) == (5 if limits else 0)  # who was in our queue
        balanced(server)

    run(main())


@limits_of_two
def test_a_loop_that_is_closed_in_a_drain_leaves_nothing(limits: Any) -> None:
    """The server says so when it is dropped; its thread and its descriptors end. (conftest counts them.)"""

    async def main() -> None:
        server = await aio.create_server(Answer, "127.0.0.1", 0, max_connections=1, **limits)
        clients.append(connect(server.sockets[0].getsockname()))
        await until_open(server)
        clients.append(connect(server.sockets[0].getsockname()))
        server.close(drain=LIMIT)
        await turns()

    def run_and_drop() -> None:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(main())
        gc.collect()

    clients: list[socket.socket] = []
    with pytest.warns(ResourceWarning, match="unclosed") as warned:
        run_and_drop()
    assert any("unclosed server" in str(warning.message) for warning in warned)
    for client in clients:
        with client:
            assert told(client) == b""


def test_on_a_closed_loop_it_is_a_close() -> None:
    """Nobody can be served there."""
    loop = asyncio.SelectorEventLoop()
    server = loop.run_until_complete(aio.create_server(Answer, "127.0.0.1", 0))
    loop.close()
    server.close(drain=LIMIT)
    assert server.sockets == ()


FORKS = """if True:
    import ast, asyncio, os, signal, sys, warnings
    import fastlisten
    from fastlisten import aio
    from helpers import connect
    from helpers.aio import Echo

    async def main():
        listener = fastlisten.bind("127.0.0.1:0")
        server = await aio.create_server(Echo, sock=listener, **ast.literal_eval(sys.argv[1]))
        server.pause()
        loop = asyncio.get_running_loop()
        with connect(server.sockets[0].getsockname()):
            if sys.argv[2] == "before":
                server.close(drain=30)
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                asyncio._set_running_loop(loop)  # from 3.14 on none runs in a child
                server.close(drain=0.1)  # there may be a client: who is queued is for both to take
                await server.wait_closed()
                os._exit(0 if server.sockets == () else 1)
            _, status = os.waitpid(child, 0)
        server.close(drain=0.1)
        await server.wait_closed()
        print(status, server.sockets, server.stats().active)

    warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads
    asyncio.run(main())
    """


@needs("fork")
@pytest.mark.parametrize("when", ["before", "after"])
@limits_of_two
def test_a_forked_child_drains_by_itself(limits: Any, when: str) -> None:
    """Its parent's refuser is not there, and is not waited for."""
    done = run_program(FORKS, repr(limits), when)
    assert done.stdout == "0 () 0\n"
