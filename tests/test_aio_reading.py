"""The transport of fastlisten.aio: reading, and the order in which protocols are called."""

import asyncio
import contextlib
import socket
from typing import Any

import pytest

from fastlisten import aio
from helpers import connect, read_all
from helpers.aio import BIG, Echo, Notes, Run, asyncios, in_thread, run, server

__all__ = ["run"]  # a fixture


def test_what_was_sent_before_the_accept_is_read_in_the_same_turn(run: Run) -> None:
    turn = 0

    class Turns(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.made = transport, turn

        def data_received(self, data: bytes) -> None:
            seen.set_result((self.made, turn))

    async def main() -> None:
        nonlocal seen, turn
        seen = asyncio.get_running_loop().create_future()
        async with server(Turns) as serving:
            with connect(serving.address) as client:
                client.sendall(b"hello")
                while not seen.done():
                    turn += 1
                    await asyncio.sleep(0)
                made, read = seen.result()
                assert made == read > 0

    seen: asyncio.Future[tuple[int, int]]
    run(main())


class Ordered(asyncio.Protocol):
    """Has the loop call something at each step, between the steps."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.lost = asyncio.get_running_loop().create_future()
        self.soon("factory + 1")

    def soon(self, event: str) -> None:
        asyncio.get_running_loop().call_soon(self.events.append, event)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.events.append("made")
        self.soon("made + 1")

    def data_received(self, data: bytes) -> None:
        self.events.append("data")
        self.soon("close - 1")
        self.end()
        self.soon("close + 1")

    def end(self) -> None:
        self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.events.append("lost")
        self.lost.set_result(error)


class Aborted(Ordered):
    def end(self) -> None:
        self.transport.abort()


class Fails(Ordered):
    def end(self) -> None:
        raise ValueError("as planned")


class Quiet(Ordered):
    """Schedules nothing before it closes."""

    def soon(self, event: str) -> None:
        if event == "close + 1":
            super().soon(event)


@pytest.mark.parametrize("protocol", [Ordered, Aborted, Fails, Quiet])
def test_what_was_scheduled_before_is_called_before(run: Run, protocol: type[Ordered]) -> None:
    clients = 5  # of one batch

    async def main(create: Any) -> list[list[str]]:
        async with server(protocol, create, start_serving=False) as serving:
            sockets = []
            await serving.server.start_serving()
            for _ in range(clients):
                sockets.append(connect(serving.address))
                sockets[-1].sendall(b"question")
            while len(serving.made) < clients:
                await asyncio.sleep(0)
            for made in serving.made:
                await made.lost
            await asyncio.sleep(0)
            for sock in sockets:
                sock.close()
            return [made.events for made in serving.made]

    expected = ["factory + 1", "made", "made + 1", "data", "close - 1", "lost", "close + 1"]
    if protocol is Quiet:
        expected = ["made", "data", "lost", "close + 1"]
    elif protocol is Fails:
        expected = expected[:-1]
    assert run(main(aio.create_server)) == [expected] * clients
    if run.loop == "asyncio":  # uvloop's own transport reads before "made + 1"
        assert run(main(asyncios)) == [expected] * clients


def test_connection_made_comes_before_connection_lost_whoever_closes(run: Run) -> None:
    class Closes(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(serving.made) == 3:
                for other in serving.server._connections.clients():
                    other.abort()

    def factory() -> Closes:
        if len(serving.made) == 1:
            asyncio.get_running_loop().call_soon(int)  # the second is told of its connection a turn later
        return Closes()

    async def main() -> list[list[str]]:
        nonlocal serving
        async with server(factory) as serving:
            with contextlib.ExitStack() as stack:
                for _ in range(3):
                    stack.enter_context(connect(serving.address))
                while len(serving.made) < 3:
                    await asyncio.sleep(0)
                for protocol in serving.made:
                    await protocol.lost
                return [protocol.events for protocol in serving.made]

    serving: Any = None
    assert run(main()) == [["made", "lost"]] * 3


def test_a_close_from_a_task_keeps_its_place(run: Run) -> None:
    async def main() -> list[str]:
        async with server(Notes) as serving:
            with connect(serving.address):
                protocol = await serving.first()
                loop = asyncio.get_running_loop()
                loop.call_soon(protocol.note, "before")
                protocol.transport.close()
                loop.call_soon(protocol.note, "after")
                await protocol.lost
                await protocol.until(lambda p: "after" in p.events)
                return protocol.events

    assert run(main()) == ["made", "before", "lost", "after"]


def test_echo_until_the_client_ends(run: Run) -> None:
    async def main() -> tuple[Any, ...]:
        async with server(Echo) as serving:
            reader, writer = await asyncio.open_connection(*serving.address)
            for i in range(50):
                writer.write(b"%d\n" % i)
                assert await reader.readline() == b"%d\n" % i
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            protocol = serving.made[0]
            assert await protocol.lost is None
            assert protocol.transport.is_closing()
            assert protocol.transport.get_protocol() is None
            stats = serving.server.stats()
            return protocol.events[0], protocol.events[-2:], stats.accepted, stats.handled, stats.active

    assert run(main()) == ("made", ["eof", "lost"], 1, 1, 0)


def test_between_the_last_data_and_the_end_the_loop_turns(run: Run) -> None:
    # A task that data_received() starts has to come to its first step before the end is told,
    # or the answer to a client that half-closes would be lost.
    class Answer(Notes):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            asyncio.get_running_loop().call_soon(self.answer)

        def answer(self) -> None:
            self.note("answer")
            self.transport.write(b"answer")

    async def main() -> tuple[bytes, list[str]]:
        async with server(Answer) as serving:
            with connect(serving.address) as client:
                client.sendall(b"question")
                client.shutdown(socket.SHUT_WR)
                return await in_thread(read_all, client), serving.made[0].events

    answer, events = run(main())
    assert (answer, events) == (b"answer", ["made", "data", "answer", "eof", "lost"])


def test_paused_reading_gets_nothing_and_loses_nothing(run: Run) -> None:
    class Paused(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.pause_reading()
            transport.pause_reading()

    async def main() -> None:
        async with server(Paused) as serving:
            with connect(serving.address) as client:
                client.sendall(b"one")
                protocol = await serving.first()
                assert not protocol.transport.is_reading()
                for _ in range(10):
                    await asyncio.sleep(0)
                assert protocol.data == b""
                protocol.transport.resume_reading()
                protocol.transport.resume_reading()
                assert protocol.transport.is_reading()
                await protocol.until(lambda p: p.data == b"one")
                protocol.transport.pause_reading()
                client.sendall(b"two")
                for _ in range(10):
                    await asyncio.sleep(0)
                assert protocol.data == b"one"
                protocol.transport.resume_reading()
                await protocol.until(lambda p: p.data == b"onetwo")

    run(main())


def test_a_batch_of_clients_leaves_room_for_other_tasks(run: Run) -> None:
    clients = 200
    made_between: list[int] = []

    async def main() -> None:
        async with server(Notes, backlog=clients) as serving:
            sockets = [connect(serving.address) for _ in range(clients)]
            seen = 0
            while seen < clients:
                await asyncio.sleep(0)
                made_between.append(len(serving.made) - seen)
                seen = len(serving.made)
            for client in sockets:
                client.close()

    run(main())
    assert max(made_between) <= 32


def test_a_firehose_leaves_room_for_other_tasks(run: Run) -> None:
    async def main() -> int:
        async with server(Notes) as serving:
            with connect(serving.address) as client:
                sender = in_thread(client.sendall, bytes(BIG))
                sending = asyncio.ensure_future(sender)
                most, turns, last = 0, 0, 0
                protocol = await serving.first()
                while len(protocol.data) < BIG:
                    await asyncio.sleep(0)
                    turns += 1
                    most = max(most, len(protocol.data) - last)
                    last = len(protocol.data)
                await sending
                assert turns > BIG // (1 << 20)
                return most

    assert run(main()) <= 1 << 20
