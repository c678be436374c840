"""fastlisten.aio's servers: max_connections, pause, busy and shortages."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import warnings
from typing import Any

import pytest

from fastlisten import aio, bind
from helpers import (
    LIMIT,
    LOOPBACK,
    connect,
    exchange,
    needs,
    posix_only,
    programs,
    under_wine,
    wait_until,
)
from helpers.aio import Echo, Notes, Run, in_thread, run, server, turns

__all__ = ["run"]  # a fixture


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


def test_a_pause_holds_nobody_who_was_accepted(run: Run) -> None:
    """As serve(busy=) has it: who waits in our queue is served, who waits in the kernel's is not."""

    async def main() -> None:
        async with server(Echo, max_connections=1, pending=1, busy="reset") as serving:
            with connect(serving.address) as first, connect(serving.address) as second:
                while serving.server.stats().accepted < 2:
                    await asyncio.sleep(0)
                serving.server.pause()
                with connect(serving.address) as third:
                    first.close()
                    second.sendall(b"hello")
                    assert await in_thread(second.recv, 5) == b"hello"
                    second.close()
                    await turns()
                    assert len(serving.made) == 2
                    assert serving.server.stats().accepted == 2
                    third.sendall(b"later")
                    serving.server.resume()
                    assert await in_thread(third.recv, 5) == b"later"

    run(main())


@posix_only("what Windows makes non-blocking os.set_blocking() cannot reach")
def test_a_place_that_comes_free_is_for_who_waits_though_the_listener_blocks(run: Run) -> None:
    """Another holder of the socket may make it blocking: the thread that refuses then sleeps in accept()."""

    async def main() -> None:
        with bind(LOOPBACK) as listener:
            options: dict[str, Any] = {"max_connections": 1, "pending": 1, "busy": "reset"}
            async with server(Echo, sock=listener, **options) as serving:
                with connect(serving.address) as first, connect(serving.address) as second:
                    while serving.server.stats().accepted < 2:
                        await asyncio.sleep(0)
                    os.set_blocking(listener.fileno(), True)
                    # it comes back once, and goes to sleep
                    with contextlib.suppress(ConnectionError), connect(serving.address) as third:
                        assert await in_thread(third.recv, 1) == b""
                    first.close()
                    second.sendall(b"hello")
                    assert await in_thread(second.recv, 5) == b"hello"

    run(main())


@pytest.mark.usefixtures("caplog")  # it keeps what the records of a debug mode name until the test is over
def test_a_server_that_is_closed_has_no_descriptors_whoever_still_names_it(run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_debug(True)
        loop.slow_callback_duration = 0
        async with server(Echo, pending=1, busy="reset") as serving:
            assert await in_thread(exchange, serving.address, b"hello") == b"hello"

    run(main())


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
                await create(Notes, exhausted="hope")  # type: ignore[arg-type]

    run(main())


@needs("Linux")
def test_room_is_made_for_as_many_descriptors_as_there_may_be_connections() -> None:
    code = """if True:
        import asyncio, os
        from fastlisten import aio
        from helpers.programs import descriptor_table

        async def main():
            server = await aio.create_server(asyncio.Protocol, "127.0.0.1", 0, max_connections=500)
            print(descriptor_table(os.getpid()) >= min(500, os.sysconf("SC_OPEN_MAX")))
            server.close()

        asyncio.run(main())
        """
    assert programs.run(code).stdout.strip() == "True"


@needs("fork")
def test_a_forked_child_closes_the_listener_of_a_busy_server() -> None:
    """The thread that refuses is the parent's: the child's close() must not wait for it."""

    async def main() -> None:
        listener = bind(LOOPBACK)
        running = await aio.create_server(Echo, sock=listener, busy="reset", pending=5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads
            child = os.fork()
        if child == 0:
            try:
                listener.close()
            finally:
                os._exit(0)
        try:
            wait_until(lambda: os.waitpid(child, os.WNOHANG)[0] == child)
        except AssertionError:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        finally:
            running.close()
            await running.wait_closed()

    asyncio.run(main())
