"""Listener.stop() of an asyncio server's listener, and taking clients from another listener's queue."""

import asyncio
import contextlib
from typing import Any

import pytest

import fastlisten
from fastlisten import aio
from helpers import LOOPBACK, connect, posix_only, read_all
from helpers.aio import Echo, Notes, Run, in_thread, run

__all__ = ["run"]  # a fixture

limits_of_two = pytest.mark.parametrize("limits", [{}, {"busy": "reset", "pending": 9}], ids=["", "busy"])


class Answer(Notes):
    """Sends back what comes first, and hangs up."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)
        self.transport.close()


@limits_of_two
def test_a_stop_closes_the_server_with_its_drain(run: Run, limits: Any) -> None:
    async def main() -> None:
        listener = fastlisten.bind(LOOPBACK)
        address = listener.getsockname()
        server = await aio.create_server(Answer, sock=listener, **limits)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(address)) for _ in range(5)]
            for client in clients:
                client.sendall(b"ping")
            listener.stop(5.0)
            with pytest.raises(asyncio.CancelledError):
                await server.serve_forever()
            assert [await in_thread(read_all, client) for client in clients] == [b"ping"] * 5
        assert server.sockets == ()
        assert server.stats().accepted == 5

    run(main())


@limits_of_two
def test_a_stop_without_a_drain_leaves_the_connections(run: Run, limits: Any) -> None:
    async def main() -> None:
        listener = fastlisten.bind(LOOPBACK)
        server = await aio.create_server(Echo, sock=listener, **limits)
        with connect(listener) as client:
            client.sendall(b"ping")
            assert await in_thread(client.recv, 100) == b"ping"
            await in_thread(listener.stop)
            while server.sockets:
                await asyncio.sleep(0)
            client.sendall(b"pong")
            assert await in_thread(client.recv, 100) == b"pong"
        await server.wait_closed()

    run(main())


def test_a_stop_after_the_close_is_nothing(run: Run) -> None:
    async def main() -> None:
        listener = fastlisten.bind(LOOPBACK)
        server = await aio.create_server(Echo, sock=listener)
        server.close()
        listener.stop(0)
        await server.wait_closed()

    run(main())


@posix_only("descriptors of another listener")
@limits_of_two
def test_a_server_takes_who_is_queued_for_another_listener(run: Run, limits: Any) -> None:
    async def main() -> None:
        with fastlisten.bind(LOOPBACK) as other, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(other)) for _ in range(40)]
            for client in clients:
                client.sendall(b"ping")
            listener = fastlisten.bind(LOOPBACK)
            server = await aio.create_server(Answer, sock=listener, **limits)
            taker = listener._state.taker
            assert taker is not None
            taker.help(listener._state, other)
            answers = [await in_thread(client.recv, 100) for client in clients[:9]]
            assert answers == [b"ping"] * 9
            if not limits:
                assert [await in_thread(read_all, client) for client in clients[9:]] == [b"ping"] * 31
                assert server.stats().accepted == 40
            with connect(listener) as client:  # its own go on coming
                client.sendall(b"own")
                assert await in_thread(client.recv, 100) == b"own"
            server.close(drain=0)
            await server.wait_closed()
        assert other.stats().accepted == 0

    run(main())


@posix_only("descriptors of another listener")
@pytest.mark.parametrize("threads", [0, 2])
def test_a_loop_takes_who_is_queued_for_another_listener(threads: int) -> None:
    with fastlisten.bind(LOOPBACK) as other, fastlisten.bind(LOOPBACK) as listener:
        clients = [connect(other) for _ in range(20)]
        own = connect(listener)
        served = 0

        def handler(connection: fastlisten.Connection) -> None:
            nonlocal served
            served += 1
            if served == 1:
                taker = listener._state.taker
                assert taker is not None
                taker.help(listener._state, other)
                taker.help(listener._state, other)  # it helps already
            connection.sendall(b"pong")
            if served == 21:
                listener.stop()

        listener.serve(handler, threads=threads)
        for client in [own, *clients]:
            with client:
                assert read_all(client) == b"pong"
        assert listener.stats().handled == 21
        assert other.stats().accepted == 0
