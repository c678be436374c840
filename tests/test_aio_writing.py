"""The transport of fastlisten.aio: writing and flow control."""

import asyncio
import gc
import os
import socket
import struct
from typing import Any

import pytest

from fastlisten import aio
from helpers import connect, needs, posix_only, read_all, under_wine
from helpers.aio import BIG, SMALL_BUFFER, Notes, Run, asyncios, in_thread, run, server, turns

__all__ = ["run"]  # a fixture


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
                protocol = await serving.first()
                await protocol.until(lambda p: "pause" in p.events)  # a quick reader would empty it in time
                assert len(await in_thread(read_all, client)) == BIG
            assert "resume" in protocol.events

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

        said = False

        def resume_writing(self) -> None:
            super().resume_writing()
            if not self.said:  # a kernel that has no room even for this makes it pause and resume again
                self.said = True
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


def test_write_eof_in_resume_writing_ends_the_stream_once(run: Run) -> None:
    """A second shutdown() fails when the client has ended, too, and the connection was lost for that."""

    class EndsWhenSent(Notes):
        keep_open = True

        def eof_received(self) -> bool:
            self.transport.write(bytes(BIG))
            return super().eof_received()

        def resume_writing(self) -> None:
            super().resume_writing()
            self.transport.write_eof()

    async def main() -> Any:
        async with server(EndsWhenSent) as serving:
            with connect(serving.address) as client:
                client.shutdown(socket.SHUT_WR)
                assert len(await in_thread(read_all, client)) == BIG
                protocol = await serving.first()
                await turns()
                assert not protocol.lost.done()
                protocol.transport.close()
                return await protocol.lost

    assert run(main()) is None
    assert run.reports == []
