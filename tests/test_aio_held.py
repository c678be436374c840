"""fastlisten.aio: what is written together leaves together, at the end of a wake or on the next turn."""

import asyncio
import gc
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fastlisten import aio
from helpers import connect, posix_only, read_all
from helpers.aio import BIG, LOOPS, Notes, Run, in_thread, run, server

__all__ = ["run"]  # a fixture


def readable(client: socket.socket) -> bool:
    return bool(select.select([client], [], [], 0)[0])


def test_what_a_task_writes_leaves_on_the_next_turn_together(run: Run) -> None:
    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address) as client:
                transport = (await serving.first()).transport
                for _ in range(2):
                    changing = bytearray(b"one ")
                    transport.write(changing)
                    changing[:] = b"gone"
                    transport.writelines([b"two ", b"three"])
                    assert not readable(client)
                    await asyncio.sleep(0)
                    assert client.recv(100) == b"one two three"

    run(main())


def test_who_writes_once_a_turn_waits_for_no_other_turn(run: Run) -> None:
    """Where nothing else is scheduled, and until several writes have come together again."""

    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address) as client:
                transport = (await serving.first()).transport
                transport.write(b"one")
                assert not readable(client)
                await asyncio.sleep(0)
                assert client.recv(100) == b"one"
                transport.write(b"two")
                assert client.recv(100) == b"two"
                scheduled = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_soon(scheduled.set_result, None)
                transport.write(b"three ")
                transport.write(b"four")
                assert not readable(client)
                await scheduled
                await asyncio.sleep(0)
                assert client.recv(100) == b"three four"
                transport.write(b"five ")
                transport.write(b"six")
                assert not readable(client)

    run(main())


def test_what_is_written_to_others_leaves_at_the_end_of_the_wake(run: Run) -> None:
    others: list[Notes] = []

    class Tells(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            others.append(self)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            for other in others:
                other.transport.write(b"one ")
                other.transport.write(b"two")

    async def main() -> None:
        async with server(Tells) as serving:
            with connect(serving.address) as one, connect(serving.address) as two:
                while len(others) < 2:
                    await asyncio.sleep(0)
                one.sendall(b"question")
                assert await in_thread(one.recv, 100) == b"one two"
                assert await in_thread(two.recv, 100) == b"one two"

    run(main())


def ask_for_the_size(transport: aio.Transport) -> None:
    assert transport.get_write_buffer_size() == 0


def ask_for_the_descriptor(transport: aio.Transport) -> None:
    assert transport.get_extra_info("socket").fileno() > 0


def duplicate(transport: aio.Transport) -> None:
    transport.get_extra_info("socket").dup().close()


def shut_down(transport: aio.Transport) -> None:
    transport.get_extra_info("socket").shutdown(socket.SHUT_WR)


def allow_nothing_to_be_kept(transport: aio.Transport) -> None:
    transport.set_write_buffer_limits(0)


def write_much(transport: aio.Transport) -> None:
    transport.write(bytes(BIG))


def fork(transport: aio.Transport) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


AT_ONCE = [
    aio.Transport.close,
    aio.Transport.abort,
    aio.Transport.write_eof,
    ask_for_the_size,
    ask_for_the_descriptor,
    duplicate,
    shut_down,
    allow_nothing_to_be_kept,
    write_much,
    pytest.param(fork, marks=posix_only("it has fork()")),
]


@pytest.mark.parametrize("act", AT_ONCE)
def test_it_leaves_at_once_when_somebody_could_tell(run: Run, act: Callable[[aio.Transport], None]) -> None:
    """The client reads while the event loop waits for it: nobody else can have sent it."""

    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address) as client:
                transport = (await serving.first()).transport
                transport.write(b"bye")
                act(transport)
                assert client.recv(3) == b"bye"

    run(main())


@pytest.mark.parametrize("share", [ask_for_the_descriptor, allow_nothing_to_be_kept])
def test_nothing_is_held_from_then_on(run: Run, share: Callable[[aio.Transport], None]) -> None:
    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address) as client:
                transport = (await serving.first()).transport
                share(transport)
                transport.write(b"now")
                assert client.recv(3) == b"now"

    run(main())


def test_frameworks_that_look_at_the_socket_are_sent_for_together(run: Run) -> None:
    """uvicorn asks for the peer's address by the socket, aiohttp sets TCP_NODELAY."""

    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address) as client:
                transport = (await serving.first()).transport
                sock = transport.get_extra_info("socket")
                assert sock.getpeername() == client.getsockname()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                assert (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_STREAM)
                transport.write(b"one ")
                transport.write(b"two")
                assert not readable(client)
                assert await in_thread(client.recv, 100) == b"one two"

    run(main())


def test_what_another_thread_writes_does_not_wait_for_a_loop_that_sleeps(run: Run) -> None:
    """It should not, asyncio says; where it does, the client gets it as from asyncio's own."""

    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address) as client:
                transport = (await serving.first()).transport

                def tell() -> bytes:
                    transport.write(b"now")
                    return client.recv(100)

                assert await in_thread(tell) == b"now"

    run(main())


@posix_only("it has fork()")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # 3.12: beside threads
def test_a_child_of_another_thread_sends_nothing_of_its_parent_s(run: Run) -> None:
    """There a fork does not send first: what is held is the loop's thread's."""

    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address) as client:
                transport = (await serving.first()).transport

                def fork_and_drop() -> None:
                    child = os.fork()
                    if child == 0:
                        transport.__del__()  # as when nobody has it there any more
                        os._exit(0)
                    os.waitpid(child, 0)

                transport.write(b"once")
                forking = threading.Thread(target=fork_and_drop)
                forking.start()
                forking.join()
                assert not readable(client)
                transport.close()
                assert read_all(client) == b"once"

    run(main())


async def one_client() -> tuple[aio.Transport, socket.socket]:
    """A connection of a server that is closed since."""
    running = await aio.create_server(Notes, "127.0.0.1", 0)
    client = connect(running.sockets[0].getsockname())
    while not (clients := running._connections.clients()):
        await asyncio.sleep(0)
    running.close()
    return clients[0], client


def collect() -> None:
    """Have a transport go that only the closed loop knows."""
    with pytest.warns(ResourceWarning, match="unclosed transport"):
        gc.collect()


@pytest.mark.parametrize("loop_name", LOOPS)
def test_it_leaves_at_once_when_the_loop_does_not_run(loop_name: str) -> None:
    loop = LOOPS[loop_name]()
    transport, client = loop.run_until_complete(one_client())
    with client:
        transport.write(b"now")
        assert client.recv(100) == b"now"
        loop.close()
        transport.write(b"closed")
        assert client.recv(100) == b"closed"
        del loop, transport
        collect()


@pytest.mark.parametrize("loop_name", LOOPS)
def test_who_is_dropped_has_sent_what_was_written(loop_name: str) -> None:
    """The loop stops in the turn in which it was written, and is not run again."""
    loop = LOOPS[loop_name]()
    transport, client = loop.run_until_complete(one_client())
    loop.call_soon(transport.write, b"last word")
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    with client:
        del loop, transport
        collect()
        assert read_all(client) == b"last word"
