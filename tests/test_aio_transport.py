"""The transport of the asyncio servers: asyncio.Transport's contract, on each loop and way of watching."""

import asyncio
import contextlib
import contextvars
import gc
import io
import json
import logging
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from typing import Any

import pytest
from aio_support import LOOPS, WAYS, Echo, Notes, Run, asyncios, run, server
from preload import Faults, check, interpreter, plain_environment
from support import LIMIT, connect, needs, not_under_wine, posix_only, read_all, reset, under_wine, wait_until

from fastlisten import aio

__all__ = ["run"]  # a fixture

SMALL_BUFFER = 4096
BIG = 8 << 20


async def in_thread(function: Any, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


# --- reading


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


# --- writing and flow control


class Pour(Notes):
    """Sends 100 MB as fast as it may."""

    total = 100 << 20
    chunk = bytes(range(256)) * 256

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.may_write, self.sent, self.most_kept = True, 0, 0
        self.pour()

    def pour(self) -> None:
        while self.may_write and self.sent < self.total:
            self.transport.write(self.chunk)
            self.sent += len(self.chunk)
            self.most_kept = max(self.most_kept, self.transport.get_write_buffer_size())
        if self.sent == self.total:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.may_write = False

    def resume_writing(self) -> None:
        super().resume_writing()
        self.may_write = True
        self.pour()


def drink(client: socket.socket) -> int:
    size, expected = 0, 0
    while part := client.recv(1 << 16):
        assert part[0] == expected
        assert part[-1] == (expected + len(part) - 1) % 256
        expected = (expected + len(part)) % 256
        size += len(part)
    return size


def test_a_slow_reader_and_100_mb_stay_under_the_high_water_mark(run: Run) -> None:
    async def main() -> tuple[int, int, list[str]]:
        async with server(Pour) as serving:
            with connect(serving.address, receive_buffer=SMALL_BUFFER * 16) as client:
                size = await in_thread(drink, client)
            protocol = serving.made[0]
            assert await protocol.lost is None
            return size, protocol.most_kept, protocol.events

    size, kept, events = run(main(), 40)
    assert size == Pour.total
    high = 64 * 1024
    assert kept <= high + len(Pour.chunk)
    assert events.count("pause") == events.count("resume") >= 1


def test_one_big_write_of_each_kind_arrives_as_it_was(run: Run) -> None:
    data = bytes(range(256)) * (BIG // 256)

    class Kinds(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            changing = bytearray(data)
            transport.write(changing)
            changing[:] = bytes(len(changing))  # it is not locked, and what is sent is what it was
            transport.write(data)
            transport.write(memoryview(data).cast("I"))
            transport.write(b"")
            transport.writelines([b"a", bytearray(b"b"), memoryview(b"c")])
            transport.writelines([])
            transport.close()
            assert transport.get_write_buffer_size() > 0

    async def main() -> bytes:
        async with server(Kinds) as serving:
            with connect(serving.address) as client:
                return await in_thread(read_all, client)

    assert run(main()) == data * 3 + b"abc"


def test_many_small_writes_arrive_in_order(run: Run) -> None:
    pieces = [b"%06d" % i for i in range(10_000 if under_wine() else 100_000)]

    class Small(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            for piece in pieces:
                transport.write(piece)
            transport.close()

    async def main() -> bytes:
        async with server(Small) as serving:
            with connect(serving.address, receive_buffer=SMALL_BUFFER) as client:
                return await in_thread(read_all, client)

    assert run(main()) == b"".join(pieces)


def test_the_marks_decide_when_the_protocol_is_paused(run: Run) -> None:
    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address, receive_buffer=SMALL_BUFFER) as client:
                protocol = await serving.first()
                transport = protocol.transport
                assert transport.get_write_buffer_limits() == (16384, 65536)
                transport.write(bytes(BIG))
                assert protocol.events[-1] == "pause"
                kept = transport.get_write_buffer_size()
                assert 0 < kept <= BIG
                transport.write(b"x")
                assert protocol.events.count("pause") == 1
                transport.set_write_buffer_limits(low=10)
                assert transport.get_write_buffer_limits() == (10, 40)
                reading = asyncio.ensure_future(in_thread(read_all, client, BIG + 1))
                await protocol.until(lambda p: p.events[-1] == "resume")
                assert transport.get_write_buffer_size() <= 10
                await reading
                transport.set_write_buffer_limits(0)
                assert transport.get_write_buffer_limits() == (0, 0)

    run(main())


# --- ends


def test_the_client_ends_and_the_server_goes_on_writing(run: Run) -> None:
    class KeepsOpen(Notes):
        keep_open = True

    async def main() -> tuple[bytes, list[str]]:
        async with server(KeepsOpen) as serving:
            with connect(serving.address) as client:
                client.shutdown(socket.SHUT_WR)
                protocol = await serving.first()
                await protocol.until(lambda p: "eof" in p.events)
                for part in (b"a", b"b", b"c"):
                    await asyncio.sleep(0)
                    protocol.transport.write(part)
                protocol.transport.close()
                answer = await in_thread(read_all, client)
                await protocol.lost
                return answer, protocol.events

    assert run(main()) == (b"abc", ["made", "eof", "lost"])


@pytest.mark.parametrize("size", [10, BIG])
def test_the_server_ends_and_the_client_goes_on_writing(run: Run, size: int) -> None:
    class Ends(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.write(bytes(size))
            assert transport.can_write_eof()
            transport.write_eof()
            transport.write_eof()
            with pytest.raises(RuntimeError, match=r"Cannot call write\(\) after write_eof\(\)"):
                transport.write(b"x")

    async def main() -> bytes:
        async with server(Ends) as serving:
            with connect(serving.address) as client:
                assert len(await in_thread(read_all, client)) == size
                client.sendall(b"still here")
                client.shutdown(socket.SHUT_WR)
                protocol = await serving.first()
                assert await protocol.lost is None
                return protocol.data

    assert run(main()) == b"still here"


# What one call of ours to the protocol writes leaves when it returns.


class Answers(Notes):
    """Writes twice in one call and then does what `way` says."""

    way = "nothing"

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        changing = bytearray(b"one ")
        self.transport.write(changing)
        changing[:] = b"gone"
        self.transport.writelines([b"two ", memoryview(b"three ")])
        getattr(self, self.way)()

    def nothing(self) -> None:
        asyncio.get_running_loop().call_later(0, self.transport.close)

    def close(self) -> None:
        self.transport.close()

    def abort(self) -> None:
        self.transport.abort()

    def write_eof(self) -> None:
        self.transport.write_eof()
        self.transport.write_eof()
        asyncio.get_running_loop().call_later(0, self.transport.close)

    def fail(self) -> None:
        raise ValueError("as planned")

    def much_more(self) -> None:
        self.transport.write(bytes(BIG))
        self.transport.write(b"end")
        self.transport.close()

    def shut_the_socket(self) -> None:
        self.transport.get_extra_info("socket").shutdown(socket.SHUT_WR)
        self.transport.close()

    def leave_it_to_another(self) -> None:
        other = self.transport.get_extra_info("socket").dup()
        self.transport.write(b"four ")
        self.transport.close()

        def speak() -> None:
            with other:
                other.sendall(b"five ")

        asyncio.get_running_loop().call_later(0, speak)


WAYS_ON = [
    name for name in vars(Answers) if not name.startswith("_") and name not in ("way", "data_received")
]


@pytest.mark.parametrize("way", WAYS_ON)
def test_what_a_call_wrote_is_sent_however_it_ends(
    run: Run, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "way", way)

    async def main(create: Any) -> tuple[bytes, type]:
        async with server(Answers, create) as serving:
            with connect(serving.address) as client:
                client.sendall(b"question")
                data = await in_thread(read_all, client)
            error = await serving.made[0].lost
            return data, type(error)

    said = b"one two three "
    said += {"much_more": bytes(BIG) + b"end", "leave_it_to_another": b"four five "}.get(way, b"")
    outcome = run(main(aio.create_server))
    assert outcome == (said, ValueError if way == "fail" else type(None))
    # uvloop's own aborts without sending; asyncio's sends late without sendmsg() and raises when aborted then
    if run.loop == "asyncio" and way != "much_more" and hasattr(socket.socket, "sendmsg"):
        assert run(main(asyncios)) == outcome


@needs("Linux", "TCP_INFO of a listener")
def test_an_answer_and_the_end_are_one_segment(run: Run) -> None:
    segments = struct.Struct("=140xI8xI")  # tcpi_segs_in, tcpi_data_segs_in of struct tcp_info, linux/tcp.h

    class Greets(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.write(b"good ")
            transport.write(b"bye")
            transport.close()

    async def main() -> None:
        async with server(Greets) as serving:
            with connect(serving.address) as client:
                assert await in_thread(read_all, client) == b"good bye"
                await serving.made[0].lost
                info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, segments.size)
                assert segments.unpack(info) == (2, 1)  # the first is the answer to its SYN

    run(main())


@posix_only("there a reset takes away what the client has received and not read")
def test_an_answer_arrives_though_the_question_was_not_read(run: Run) -> None:
    class Refuses(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.write(b"no")
            transport.close()

    async def main() -> None:
        async with server(Refuses) as serving:
            with connect(serving.address) as client:
                client.sendall(b"question")  # closing over it is a reset: RFC 2525, 2.17
                assert await in_thread(client.recv, 100) == b"no"
                await serving.made[0].lost
                assert await in_thread(client.recv, 100) == b""  # the end came before the reset

    run(main())


def test_who_fills_until_something_is_kept_is_told_to_go_on(run: Run) -> None:
    class Fills(Notes):
        left = BIG

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)
            self.fill()

        def fill(self) -> None:
            while self.left and self.transport.get_write_buffer_size() == 0:
                self.transport.write(bytes(SMALL_BUFFER))
                self.left -= SMALL_BUFFER
            if not self.left:
                self.transport.close()

        def resume_writing(self) -> None:
            super().resume_writing()
            self.fill()

    async def main() -> None:
        async with server(Fills) as serving:
            with connect(serving.address, receive_buffer=SMALL_BUFFER) as client:
                assert len(await in_thread(read_all, client)) == BIG
            assert "resume" in serving.made[0].events

    run(main())


def test_a_last_word_when_writing_resumes_goes_out_before_the_end(run: Run) -> None:
    class LastWord(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=1, low=0)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.write(bytes(BIG))
            self.transport.close()

        def resume_writing(self) -> None:
            super().resume_writing()
            self.transport.write(b"bye")

    async def main() -> None:
        async with server(LastWord) as serving:
            with connect(serving.address, receive_buffer=SMALL_BUFFER) as client:
                client.sendall(b"x")
                data = await in_thread(read_all, client)
                assert (len(data), data[-3:]) == (BIG + 3, b"bye")
            assert await serving.made[0].lost is None

    run(main())


@posix_only("descriptors are small integers, the lowest free one is next")
def test_a_protocol_that_asks_for_the_socket_while_it_is_made_gets_the_one(run: Run) -> None:
    asked: list[Any] = []

    class Asks(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)
            transport.write(bytes(60_000))  # more than the socket takes: who asks next sends it and is paused
            asked.append(transport.get_extra_info("socket"))

        def pause_writing(self) -> None:
            super().pause_writing()
            asked.append(self.transport.get_extra_info("socket"))

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            async with server(Asks, sock=listening.dup()) as serving:
                with connect(serving.address, receive_buffer=SMALL_BUFFER):
                    protocol = await serving.first()
                    await protocol.until(lambda notes: "pause" in notes.events)
                    assert len(asked) == 2
                    assert asked[0]._sock is asked[1]._sock  # two would both close it
                    gc.collect()
                    assert os.fstat(asked[0].fileno())

    run(main())


def test_close_sends_what_was_written_and_reads_no_more(run: Run) -> None:
    class Closes(Notes):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.write(bytes(BIG))
            self.transport.close()
            self.transport.close()
            assert not self.transport.is_reading()
            assert self.transport.is_closing()

    async def main() -> list[str]:
        async with server(Closes) as serving:
            with connect(serving.address) as client:
                client.sendall(b"x")
                assert len(await in_thread(read_all, client)) == BIG
            protocol = serving.made[0]
            assert await protocol.lost is None
            return [event for event in protocol.events if event in ("made", "data", "eof", "lost")]

    assert run(main()) == ["made", "data", "lost"]


def test_abort_drops_what_was_written(run: Run) -> None:
    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address, receive_buffer=SMALL_BUFFER) as client:
                protocol = await serving.first()
                protocol.transport.write(bytes(BIG))
                protocol.transport.abort()
                protocol.transport.abort()
                assert protocol.transport.get_write_buffer_size() == 0
                assert not protocol.lost.done()  # never from inside the call
                assert await protocol.lost is None
                assert len(await in_thread(read_all, client)) < BIG

    run(main())


def test_close_does_not_call_the_protocol_from_inside(run: Run) -> None:
    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address):
                protocol = await serving.first()
                protocol.transport.close()
                assert protocol.events == ["made"]
                assert await protocol.lost is None
                assert protocol.events == ["made", "lost"]

    run(main())


def test_a_close_in_a_callback_ends_after_all_that_are_at_work(run: Run) -> None:
    others: list[Any] = []

    class ClosesAll(Notes):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            for protocol in others:
                protocol.transport.abort()
            self.note("returned")

    async def main() -> list[list[Any]]:
        async with server(ClosesAll) as serving:
            clients = [connect(serving.address) for _ in range(3)]
            while len(serving.made) < 3:
                await asyncio.sleep(0)
            others.extend(serving.made)
            clients[1].sendall(b"x")
            for protocol in serving.made:
                assert await protocol.lost is None
            for client in clients:
                client.close()
            return [protocol.events for protocol in serving.made]

    assert run(main()) == [["made", "lost"], ["made", "data", "returned", "lost"], ["made", "lost"]]


@not_under_wine("it reads a reset as an end")
def test_a_reset_reaches_connection_lost(run: Run) -> None:
    async def main() -> BaseException | None:
        async with server(Notes) as serving:
            client = connect(serving.address)
            protocol = await serving.first()
            reset(client)
            return await protocol.lost

    assert type(run(main())) is ConnectionResetError
    assert run.reports == []


@not_under_wine("its accept() raises for a client that has reset, where the others return it")
def test_a_reset_before_the_first_read(run: Run) -> None:
    async def main() -> tuple[Any, list[str]]:
        async with server(Notes) as serving:
            reset(connect(serving.address))
            protocol = await serving.first()
            return await protocol.lost, protocol.events

    error, events = run(main())
    assert type(error) is ConnectionResetError
    assert events == ["made", "lost"]
    assert run.reports == []


@not_under_wine("its accept() raises for a client that has reset, where the others return it")
def test_a_greeting_to_a_client_that_has_reset_is_told_of_the_reset(run: Run) -> None:
    class Greets(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.write(b"good day")

    async def main(create: Any) -> Any:
        async with server(Greets, create) as serving:
            reset(connect(serving.address))
            return type(await (await serving.first()).lost)

    assert run(main(aio.create_server)) is run(main(asyncios)) is ConnectionResetError
    assert run.reports == []


def test_a_reset_with_unsent_data(run: Run) -> None:
    async def main() -> BaseException | None:
        async with server(Notes) as serving:
            client = connect(serving.address, receive_buffer=SMALL_BUFFER)
            protocol = await serving.first()
            protocol.transport.pause_reading()
            protocol.transport.write(bytes(BIG))
            protocol.transport.close()
            reset(client)
            return await protocol.lost

    assert isinstance(run(main()), ConnectionResetError | BrokenPipeError)
    assert run.reports == []


def test_writes_after_the_end_are_dropped_and_logged(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address):
                protocol = await serving.first()
                protocol.transport.abort()
                for _ in range(6):
                    protocol.transport.write(b"x")
                await protocol.lost
                protocol.transport.write(b"x")
                protocol.transport.close()
                protocol.transport.abort()
                protocol.transport.pause_reading()
                protocol.transport.resume_reading()

    with caplog.at_level(logging.WARNING, "asyncio"):
        run(main())
    assert caplog.messages == ["socket.send() raised exception."] * 3


def test_a_transport_that_is_dropped_open_warns(run: Run) -> None:
    async def main() -> None:
        running = await aio.create_server(asyncio.Protocol, "127.0.0.1", 0)

        class Drops(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                transport.pause_reading()  # nobody watches it now

        running.close()
        await running.wait_closed()
        running = await aio.create_server(Drops, "127.0.0.1", 0)
        with connect(running.sockets[0].getsockname()) as client:
            while running.stats().accepted == 0:
                await asyncio.sleep(0)
            gc.collect()
            assert await in_thread(client.recv, 1) == b""
        running.close()
        await running.wait_closed()
        assert running.stats().active == 0

    gc.disable()
    try:
        with pytest.warns(ResourceWarning, match=r"unclosed transport <fastlisten\.Transport open fd="):
            run(main())
    finally:
        gc.enable()


# --- protocols


def test_set_protocol_in_the_middle(run: Run) -> None:
    async def main() -> tuple[bytes, bytes]:
        async with server(Notes) as serving:
            with connect(serving.address) as client:
                client.sendall(b"first")
                protocol = await serving.first()
                await protocol.until(lambda p: p.data)
                second = Notes()
                protocol.transport.set_protocol(second)
                assert protocol.transport.get_protocol() is second
                client.sendall(b"second")
                await second.until(lambda p: p.data)
                client.close()
                await second.lost
                assert not protocol.lost.done()
                return protocol.data, second.data

    assert run(main()) == (b"first", b"second")


class Buffered(Notes, asyncio.BufferedProtocol):
    size = 5

    def get_buffer(self, sizehint: int) -> Any:
        assert sizehint == -1
        self.buffer = bytearray(self.size)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.buffer[:nbytes]))


def test_a_buffered_protocol(run: Run) -> None:
    async def main() -> bytes:
        async with server(Buffered) as serving:
            with connect(serving.address) as client:
                client.sendall(b"more than five bytes")
                client.shutdown(socket.SHUT_WR)
                protocol = await serving.first()
                assert await protocol.lost is None
                assert protocol.events[-2:] == ["eof", "lost"]
                return protocol.data

    assert run(main()) == b"more than five bytes"


def test_a_protocol_behind_a_proxy_is_of_its_own_kind(run: Run) -> None:
    behind: list[Any] = []

    class Plain(Notes):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            behind.append(Buffered())
            self.transport.set_protocol(weakref.proxy(behind[-1]))

    def proxied() -> Any:
        behind.append(Plain())
        return weakref.proxy(behind[-1])

    async def main() -> None:
        async with server(proxied) as serving:
            with connect(serving.address) as client:
                await serving.first()
                client.sendall(b"one")
                await behind[0].until(lambda plain: plain.data == b"one")
                client.sendall(b"two")
                await behind[1].until(lambda buffered: buffered.data == b"two")

    run(main())
    assert run.reports == []


class Switches(Buffered):
    """Has another protocol called from within get_buffer()."""

    after: Notes

    def get_buffer(self, sizehint: int) -> Any:
        self.after = Notes()
        self.transport.set_protocol(self.after)
        return super().get_buffer(sizehint)


def test_get_buffer_that_sets_a_protocol_hands_out_nobody_elses_bytes(run: Run) -> None:
    protocols = [Echo, Switches]

    async def main() -> None:
        async with server(lambda: protocols.pop(0)()) as serving:
            with connect(serving.address) as other:
                other.sendall(b"secret")
                assert await in_thread(other.recv, 6) == b"secret"
            with connect(serving.address) as client:
                client.sendall(b"hello")
                while len(serving.made) < 2 or not hasattr(serving.made[1], "after"):
                    await asyncio.sleep(0)
                after = serving.made[1].after
                assert type(await after.lost) is AttributeError  # it has no buffer_updated()
                assert after.data == b""

    run(main())
    assert run.messages() == ["Fatal error: protocol.buffer_updated() call failed."]


def fails(*args: Any) -> Any:
    raise ZeroDivisionError("on purpose")


FAILURES = {
    "connection_made": (Notes, {"connection_made": fails}),
    "data_received": (Notes, {"data_received": fails}),
    "eof_received": (Notes, {"eof_received": fails}),
    "get_buffer": (Buffered, {"get_buffer": fails}),
    "buffer_updated": (Buffered, {"buffer_updated": fails}),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_callback_that_raises_ends_its_connection_and_is_reported_once(run: Run, name: str) -> None:
    base, methods = FAILURES[name]
    protocols = [type("Fails", (base,), methods), Echo, Echo]

    async def main() -> Any:
        async with server(lambda: protocols.pop(0)()) as serving:
            with connect(serving.address) as client:
                client.sendall(b"data")
                client.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):  # who closes over unread data resets
                    assert await in_thread(read_all, client) == b""
            error = await serving.made[0].lost
            for _ in range(2):
                reader, writer = await asyncio.open_connection(*serving.address)
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                writer.close()
                await writer.wait_closed()
            assert serving.server.stats().handler_errors == 1
            return error

    assert type(run(main())) is ZeroDivisionError
    assert run.messages() == [f"Fatal error: protocol.{name}() call failed."]
    assert type(run.reports[0]["exception"]) is ZeroDivisionError


def test_a_factory_that_raises_closes_its_connection_and_is_reported_once(run: Run) -> None:
    factories = [fails, Echo]

    async def main() -> None:
        async with server(lambda: factories.pop(0)()) as serving:
            with connect(serving.address) as client:
                assert await in_thread(client.recv, 1) == b""
            with connect(serving.address) as client:
                client.sendall(b"hello")
                assert await in_thread(client.recv, 5) == b"hello"

    run(main())
    assert run.messages() == ["Error on transport creation for incoming connection"]


def test_connection_lost_that_raises_is_reported(run: Run) -> None:
    class Fails(asyncio.Protocol):
        connection_lost = fails

    async def main() -> None:
        async with server(Fails) as serving:
            connect(serving.address).close()
            while serving.server.stats().handled == 0:
                await asyncio.sleep(0)

    run(main())
    assert run.messages() == ["Fatal error: protocol.connection_lost() call failed."]


@pytest.mark.parametrize("name", ["pause_writing", "resume_writing"])
def test_flow_control_that_raises_is_reported_and_changes_nothing(run: Run, name: str) -> None:
    protocol = type("Fails", (Notes,), {name: fails})

    async def main() -> int:
        async with server(protocol) as serving:
            with connect(serving.address) as client:
                (await serving.first()).transport.write(bytes(BIG))
                serving.made[0].transport.close()
                return len(await in_thread(read_all, client))

    assert run(main()) == BIG
    assert run.messages() == [f"protocol.{name}() failed"]


def test_system_exit_comes_out_and_the_other_clients_are_not_lost() -> None:
    class Leaves(Notes):
        count = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            Leaves.count += 1
            if Leaves.count == 2:
                raise SystemExit(7)

    loop = asyncio.SelectorEventLoop()
    made: list[Leaves] = []

    def factory() -> Leaves:
        made.append(Leaves())
        return made[-1]

    async def serve() -> Any:
        return await aio.create_server(factory, "127.0.0.1", 0)

    try:
        running = loop.run_until_complete(serve())
        clients = [connect(running.sockets[0].getsockname()) for _ in range(5)]
        with pytest.raises(SystemExit):
            loop.run_forever()

        async def rest() -> None:
            while Leaves.count < 5:
                await asyncio.sleep(0)
            for protocol in made:
                protocol.transport.abort()
                await protocol.lost
            running.close()
            await running.wait_closed()

        loop.run_until_complete(asyncio.wait_for(rest(), LIMIT))
        for client in clients:
            client.close()
        assert running.stats().accepted == 5
    finally:
        loop.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_connection_reads_on_after_an_interrupt(loop: str) -> None:
    class Interrupted(Notes):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.data == b"one":
                raise KeyboardInterrupt

        def eof_received(self) -> bool:
            super().eof_received()
            if self.events.count("eof") == 1:
                raise KeyboardInterrupt
            return False

    async def start() -> Any:
        return await aio.create_server(factory, "127.0.0.1", 0)

    def factory() -> Interrupted:
        made.append(Interrupted())
        return made[-1]

    made: list[Interrupted] = []
    running = LOOPS[loop]()
    try:
        serving = running.run_until_complete(start())
        with connect(serving.sockets[0].getsockname()) as client:
            client.sendall(b"one")
            with pytest.raises(KeyboardInterrupt):
                running.run_forever()
            client.sendall(b"two")
            client.shutdown(socket.SHUT_WR)
            with pytest.raises(KeyboardInterrupt):
                running.run_forever()

            async def rest() -> None:
                async with asyncio.timeout(LIMIT):
                    assert await made[0].lost is None
                    serving.close()
                    await serving.wait_closed()

            running.run_until_complete(rest())
            assert made[0].data == b"onetwo"
            assert made[0].events == ["made", "data", "data", "eof", "eof", "lost"]
    finally:
        running.close()


def test_each_connection_has_its_own_context(run: Run) -> None:
    mark: contextvars.ContextVar[int] = contextvars.ContextVar("mark")
    count = iter(range(100))

    class Marks(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            assert mark.get() == -1  # what it was where the server was made
            self.number = next(count)
            mark.set(self.number)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            assert mark.get() == self.number
            self.transport.close()

        def connection_lost(self, error: Any) -> None:
            assert mark.get() == self.number
            super().connection_lost(error)

    async def main() -> None:
        mark.set(-1)
        async with server(Marks, max_connections=1) as serving:
            for i in range(6):
                with connect(serving.address) as client:
                    if i % 2:
                        client.sendall(b"x")
                    else:
                        while len(serving.made) == i:
                            await asyncio.sleep(0)
                        client.sendall(b"x")
                    assert await in_thread(client.recv, 1) == b""
                assert await serving.made[i].lost is None

    run(main())
    assert run.reports == []


# --- what a transport tells


def test_extra_info_is_asyncios(run: Run) -> None:
    async def told(create: Any) -> tuple[Any, ...]:
        async with server(Notes, create) as serving:
            with connect(serving.address) as client:
                transport = (await serving.first()).transport
                sock = transport.get_extra_info("socket")
                assert sock.fileno() > 0
                assert sock.getpeername() == client.getsockname()
                found = (
                    transport.get_extra_info("peername") == client.getsockname(),
                    transport.get_extra_info("sockname") == serving.address,
                    sock.family,
                    sock.type,
                    # asyncio sets it where it knows the protocol; Windows Python does not ask for that
                    os.name == "nt" or bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)),
                    transport.get_extra_info("cipher"),
                    transport.get_extra_info("nothing", 7),
                    transport.is_reading(),
                    transport.is_closing(),
                    transport.can_write_eof(),
                    transport.get_write_buffer_limits()[1],  # uvloop's low mark is 16 bytes
                    transport.get_write_buffer_size(),
                )
                transport.abort()
                await serving.made[0].lost
                assert transport.get_extra_info("peername") == client.getsockname()
                assert transport.get_extra_info("sockname") == serving.address
                assert sock.fileno() == -1
                return found

    ours, theirs = run(told(aio.create_server)), run(told(asyncios))
    assert ours == theirs


def test_it_is_an_asyncio_transport(run: Run) -> None:
    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address):
                transport = (await serving.first()).transport
                assert isinstance(transport, asyncio.Transport)
                assert isinstance(transport, aio.Transport)
                assert isinstance(transport.get_extra_info("socket"), asyncio.trsock.TransportSocket)
                assert repr(transport).startswith("<fastlisten.Transport open fd=")
            await serving.made[0].lost
            assert repr(transport) == "<fastlisten.Transport closed not reading unsent=0>"

    run(main())
    with pytest.raises(TypeError, match="a Transport comes from a server"):
        aio.Transport()


MISTAKES: dict[str, Any] = {
    "write str": lambda t: t.write("text"),
    "write int": lambda t: t.write(5),
    "write None": lambda t: t.write(None),
    "writelines str": lambda t: t.writelines(["text"]),
    "writelines int": lambda t: t.writelines(5),
    "writelines some str": lambda t: t.writelines(piece for piece in (b"text", "text")),
    "writelines None": lambda t: t.writelines(None),
    "write every second byte": lambda t: t.write(memoryview(b"text")[::2]),
    "limits": lambda t: t.set_write_buffer_limits(1, 2),
    "negative limits": lambda t: t.set_write_buffer_limits(-1),
    "negative low": lambda t: t.set_write_buffer_limits(5, -1),
    "str limits": lambda t: t.set_write_buffer_limits("5"),
    "write after eof": lambda t: (t.write_eof(), t.write(b"x")),
    "write nothing after eof": lambda t: (t.write_eof(), t.write(b"")),
    "writelines after eof": lambda t: (t.write_eof(), t.writelines([b"x"])),
    "wrong type after eof": lambda t: (t.write_eof(), t.write("x")),
    "writelines nothing": lambda t: t.writelines([]),
    "write after close": lambda t: (t.close(), t.write(b"x")),
    "eof after close": lambda t: (t.close(), t.write_eof()),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_raise_what_asyncio_raises(mistake: str) -> None:
    run = Run("asyncio")

    async def outcome(create: Any) -> Any:
        async with server(Notes, create) as serving:
            with connect(serving.address):
                transport = (await serving.first()).transport
                await asyncio.sleep(0)
                raised = None
                try:
                    MISTAKES[mistake](transport)
                except Exception as error:
                    raised = type(error), str(error)
                reported = [(report["message"], repr(report["exception"])) for report in run.reports]
                run.reports.clear()
                return raised, transport.is_closing(), reported

    assert run(outcome(aio.create_server)) == run(outcome(asyncios))


# --- what asyncio does with a transport


no_sendfile = posix_only("Windows has no sendfile()")


class Files(Notes):
    """Sends a file for each thing that the client says, and reads on."""

    content = bytes(range(256)) * 4096
    before = b"before "
    fallback = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.tasks: list[asyncio.Task[int]] = []

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.tasks.append(asyncio.get_running_loop().create_task(self.send()))

    async def send(self) -> int:
        with tempfile.TemporaryFile() as file:
            file.write(self.content)
            file.flush()
            self.transport.write(self.before)
            return await asyncio.get_running_loop().sendfile(
                self.transport, file, 100, fallback=self.fallback
            )


@pytest.mark.parametrize("fallback", [True, pytest.param(False, marks=no_sendfile)])
@pytest.mark.parametrize("before", [b"", b"before ", bytes(BIG)], ids=len)
def test_sendfile(run: Run, before: bytes, fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Files, "before", before)
    monkeypatch.setattr(Files, "fallback", fallback)
    expected = before + Files.content[100:]

    async def main() -> None:
        async with server(Files) as serving:
            with connect(serving.address) as client:
                for i in range(2):  # the second time it is watched as before the first
                    client.sendall(b"question")
                    protocol = await serving.first()
                    await protocol.until(lambda notes, i=i: len(notes.tasks) > i)
                    task = protocol.tasks[i]
                    if run.loop == "uvloop":  # it has none, and says so
                        with pytest.raises(NotImplementedError):
                            await task
                        return
                    assert await in_thread(read_all, client, len(expected)) == expected
                    assert await task == len(Files.content) - 100

    run(main())
    assert not run.reports


@no_sendfile
def test_while_a_file_is_sent_nobody_may_write(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Files, "content", bytes(BIG))

    async def main(create: Any) -> list[str]:
        mistakes = []
        async with server(Files, create) as serving:
            with connect(serving.address, receive_buffer=SMALL_BUFFER) as client:
                client.sendall(b"question")
                protocol = await serving.first()
                await protocol.until(lambda notes: notes.tasks)
                await asyncio.sleep(0)
                for write, data in (("write", b"x"), ("writelines", [b"x"])):
                    with pytest.raises(RuntimeError) as raised:
                        getattr(protocol.transport, write)(data)
                    mistakes.append(str(raised.value))
                reset(client)
                with pytest.raises(ConnectionError) as ended:
                    await protocol.tasks[0]
                mistakes.append(ended.type.__name__)
        return mistakes

    if run.loop != "uvloop":
        assert run(main(aio.create_server)) == run(main(asyncios))


def test_a_file_like_object_is_no_data(run: Run) -> None:
    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address):
                transport = (await serving.first()).transport
                with pytest.raises(TypeError):
                    transport.write(io.BytesIO(b"x"))

    run(main())


def test_reading_from_another_thread_sees_the_server_alive(run: Run) -> None:
    # The loop of the server in one thread, clients of another: nothing is shared but the sockets.
    ready = threading.Event()
    address: list[Any] = []

    async def main() -> int:
        async with server(Echo) as serving:
            address.append(serving.address)
            ready.set()
            while len(serving.made) < 20:
                await asyncio.sleep(0.001)
            for protocol in serving.made:
                await protocol.lost
            return len(serving.made)

    def clients() -> None:
        ready.wait(LIMIT)
        for i in range(20):
            with connect(address[0]) as client:
                client.sendall(b"%d" % i)
                assert client.recv(10) == b"%d" % i

    thread = threading.Thread(target=clients)
    thread.start()
    assert run(main()) == 20
    thread.join(LIMIT)
    wait_until(lambda: not thread.is_alive())


# --- faults

FAULTY_SERVER = """
import asyncio, functools, json, sys
from aio_support import Run
from fastlisten import aio
from fastlisten.aio import _server
from fastlisten.aio._hub import Hub

made = lost = 0

class Echo(asyncio.Protocol):
    gone = False
    def connection_made(self, transport):
        global made
        made += 1
        self.transport = transport
    def data_received(self, data):
        assert not self.gone
        self.transport.write(data)
    def eof_received(self):
        assert not self.gone
    def connection_lost(self, error):
        global lost
        assert not self.gone
        self.gone = True
        lost += 1

async def main():
    loop = asyncio.get_running_loop()
    server = await aio.create_server(Echo, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    while server.stats().active or server.stats().queue_depth:
        await asyncio.sleep(0.01)
    stats = server.stats()
    server.close()
    await server.wait_closed()
    return [stats.accepted, stats.handled, stats.active, made, lost]

name, polled = sys.argv[1:]
_server.Hub = functools.partial(Hub, polled=polled == "True")
run = Run(name)
print(json.dumps([run(main(), 60), run.messages()]))
"""


def faulty_plans(chance: random.Random, again: bool) -> dict[str, Any]:
    """Say which calls fail, how, and how many succeed in between."""
    faults: dict[str, list[Any]] = {
        "recv": ["ECONNRESET", "ETIMEDOUT", -1, -3, *(["EAGAIN", "EAGAIN", "EINTR"] if again else [])],
        "send": ["EPIPE", "ECONNRESET", -1, -3, "EAGAIN", "EAGAIN", "EINTR"],
    }
    return {
        call: [
            entry
            for _ in range(60)
            for entry in ((chance.choice(codes), chance.randint(1, 3)), (0, chance.randint(1, 60)))
        ]
        for call, codes in faults.items()
    }


@needs("Linux", "a C compiler")
@pytest.mark.parametrize(("loop", "polled"), WAYS)
def test_10000_connections_with_faults_in_recv_and_send(faults: Faults, loop: str, polled: bool) -> None:
    chance = random.Random(f"{loop} {polled}")
    # libuv tells of POLLERR once and then watches the descriptor no more.  No kernel says EAGAIN after that,
    # but a fault does, and nobody would ask again.
    again = polled or loop != "uvloop"
    process = subprocess.Popen(
        [*interpreter(), "-c", FAULTY_SERVER, loop, str(polled)],
        env=faults.environment(**faulty_plans(chance, again)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    count, answered = 10_000, 0
    with process, contextlib.ExitStack() as at_once:
        at_once.callback(process.kill)
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        open_now: list[tuple[socket.socket, bytes]] = []
        for number in range(count):
            data = b"%d " % number * chance.choice((1, 1, 1, 3000))
            with contextlib.suppress(ConnectionError):  # a fault has ended it already
                client = connect(address)
                open_now.append((client, data))
                if chance.random() < 0.8:
                    client.sendall(data)
            while open_now and (len(open_now) == 50 or number == count - 1):
                client, data = open_now.pop(chance.randrange(len(open_now)))
                match chance.randrange(4):
                    case 0:
                        client.close()
                    case 1:
                        reset(client)
                    case _:
                        got = b""
                        with client, contextlib.suppress(ConnectionError):
                            with contextlib.suppress(OSError):  # ENOTCONN: reset already
                                client.shutdown(socket.SHUT_WR)
                            while part := client.recv(1 << 16):
                                got += part
                        assert data.startswith(got)
                        answered += got == data
        output, errors = process.communicate("", timeout=60)
    check(process.returncode, output, errors)
    (accepted, handled, active, made, lost), messages = json.loads(output)
    assert (active, messages) == (0, [])
    assert accepted == handled == made == lost == count
    assert answered > count // 4


FORKS = """if True:
    import asyncio, functools, os, socket, sys
    from fastlisten import aio
    from fastlisten.aio import _server
    from fastlisten.aio._hub import Hub
    from support import LIMIT, connect

    class Heard(asyncio.Protocol):
        def connection_made(self, transport):
            made.append(self)
            self.transport = transport
            self.heard = asyncio.get_running_loop().create_future()

        def data_received(self, data):
            self.transport.write(b"once")
            if os.fork() == 0:  # what its parent wrote is sent; the stream is its parent's to end
                if sys.argv[2] == "close":
                    self.transport.close()
                    os._exit(0)
                sys.exit(0)
            assert os.wait()[1] == 0
            self.heard.set_result(data)

    made = []

    async def main():
        server = await aio.create_server(Heard, "127.0.0.1", 0)
        with connect(server.sockets[0].getsockname()) as client:
            while not made:
                await asyncio.sleep(0)
            for _ in range(5):
                await asyncio.sleep(0)  # now it is watched
            child = os.fork()
            if child == 0:
                sys.exit(0)  # it closes nothing itself: what it has goes with it
            assert os.waitpid(child, 0)[1] == 0
            client.sendall(b"still there")
            assert await asyncio.wait_for(made[0].heard, LIMIT) == b"still there"
            made[0].transport.close()
            # no thread: at its end a child takes the loop's own wake-up out of the poller that both have
            client.setblocking(False)
            loop, answer = asyncio.get_running_loop(), b""
            while data := await asyncio.wait_for(loop.sock_recv(client, 100), LIMIT):
                answer += data
            assert answer == b"once"
        server.close()
        await server.wait_closed()
        print("heard", flush=True)

    _server.Hub = functools.partial(Hub, polled=sys.argv[1] == "True")
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(main())
    """


@needs("Linux")
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the child of a loop never ends there")
@pytest.mark.parametrize("end", ["exit", "close"])
@pytest.mark.parametrize("polled", [True, False])
def test_a_forked_child_that_ends_leaves_the_parents_connections_alone(polled: bool, end: str) -> None:
    command = [sys.executable, "-c", FORKS, str(polled), end]
    done = subprocess.run(
        command, env=plain_environment(), capture_output=True, text=True, timeout=2 * LIMIT, check=False
    )
    assert done.stdout == "heard\n", done.stderr


LOST_WITHOUT_END = """if True:
    import asyncio, json, logging, sys, time
    import fastlisten
    from aio_support import Echo, Run, server
    from preload import change_plan
    from support import connect

    lines = []
    logging.basicConfig(level=logging.INFO, handlers=[type("Keeps", (logging.Handler,), {
        "emit": lambda self, record: lines.append(record.getMessage())})()])

    async def awaits():
        listener = fastlisten.bind("127.0.0.1:0")
        try:
            with connect(listener.getsockname()):
                await listener.accept_async()
        except PermissionError:
            pass
        finally:
            listener.close()

    async def serves(exhausted):
        async with server(Echo, exhausted=exhausted) as serving:
            change_plan(accept=[("EPERM", 1 << 30)])
            with connect(serving.address) as client:
                turns = 0
                while serving.server._accepting.failures < 4:
                    turns += 1
                    await asyncio.sleep(0.001)
                change_plan()
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(client, b"hello")
                assert await loop.sock_recv(client, 5) == b"hello"
                while serving.server._accepting.failures:
                    await asyncio.sleep(0.001)
            return turns

    run = Run(sys.argv[1])
    change_plan(accept=[("EPERM", 1 << 30)])
    run(awaits())
    change_plan()
    turns = run(serves(sys.argv[2]))
    print(json.dumps([turns > 4, lines, run.messages()]))
    """


@needs("Linux", "a C compiler")
@pytest.mark.parametrize("exhausted", ["pause", "shed"])
@pytest.mark.parametrize("loop", LOOPS)
def test_an_accept_that_loses_every_client_pauses(faults: Faults, loop: str, exhausted: str) -> None:
    quick, lines, reports = faults.python(LOST_WITHOUT_END, loop, exhausted)
    assert quick
    assert reports == []
    assert [line[:16] for line in lines if line.startswith("accepting")] == [
        "accepting pauses",
        "accepting again ",
    ]
