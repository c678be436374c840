"""The transport of TLS: what asyncio's and uvloop's do, for each of the two, and what ours does beside it."""

import asyncio
import contextlib
import gc
import logging
import random
import socket
import ssl
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from fastlisten import aio
from fastlisten.aio._tls import TlsTransport
from helpers import connect, needs, read_all
from helpers.aio import BIG, LOOPS, Echo, Notes, Run, asyncios, in_thread, server
from helpers.tls_client import APPLICATION_DATA, TlsClient, ended, opened

pytestmark = needs("the openssl command")


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    """Run on each loop; how descriptors are watched, TLS does not know."""
    return Run(request.param)


both = pytest.mark.parametrize("create", [asyncios, aio.create_server], ids=["the loop's", "ours"])


# --- reading


@both
def test_paused_reading_slows_the_client_down(run: Run, tls: Any, create: Any) -> None:
    class Pauses(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.pause_reading()
            assert not transport.is_reading()

    async def main() -> None:
        async with server(Pauses, create, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            sending = asyncio.ensure_future(in_thread(client.send, bytes(2 * BIG)))
            protocol = await serving.first()
            await asyncio.sleep(0.2)  # for as long as it is slow, nothing more can be seen
            assert not sending.done()
            assert protocol.events == ["made"]
            protocol.transport.resume_reading()
            assert protocol.transport.is_reading()
            await protocol.until(lambda p: len(p.data) == 2 * BIG)
            await sending

    run(main())


def test_an_end_that_comes_while_reading_is_paused_is_told_after_the_data(run: Run, tls: Any) -> None:
    async def main() -> None:
        async with server(Notes, ssl=tls[0]) as serving:
            async with opened(serving, tls[1]) as client:
                protocol = await serving.first()
                protocol.transport.pause_reading()
                client.send(b"last words")
                client.socket.shutdown(socket.SHUT_WR)
                while protocol.transport.get_read_buffer_size() < 10:
                    await asyncio.sleep(0)
                await asyncio.sleep(0.01)
                assert protocol.events == ["made"]
                protocol.transport.resume_reading()
                assert await protocol.lost is None
            assert protocol.data == b"last words"
            assert protocol.events == ["made", "data", "eof", "lost"]

    run(main())


class InPlace(asyncio.BufferedProtocol):
    """Takes what is received into a buffer of its own, of so many bytes."""

    size = 1 << 16

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.memory = bytearray(self.size)
        self.data = b""
        self.changed = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.events.append("made")

    def get_buffer(self, sizehint: int) -> Any:
        return memoryview(self.memory)

    def buffer_updated(self, nbytes: int) -> None:
        self.data += self.memory[:nbytes]
        self.transport.write(self.memory[:nbytes])
        self.changed.set()


@both
@pytest.mark.parametrize("size", [100, 1 << 16])
def test_a_buffered_protocol(run: Run, tls: Any, create: Any, size: int) -> None:
    class Sized(InPlace):
        pass

    Sized.size = size

    async def main() -> None:
        async with server(Sized, create, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            data = bytes(range(256)) * 40
            client.send(data)
            assert await in_thread(client.read, len(data)) == data

    run(main())


class Paces(Echo):
    """Pauses reading after each call, for a turn."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.pause_reading()
        asyncio.get_running_loop().call_soon(self.transport.resume_reading)


class Scarce(InPlace):
    size = 1000


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [Echo, Paces, InPlace, Scarce])
def test_what_is_sent_comes_back_however_it_is_cut(run: Run, tls: Any, kind: Any, seed: int) -> None:
    """Messages of any size, and pieces on the way that begin and end anywhere in a record."""
    chance = random.Random(seed)

    def sizes(most: list[int], total: int) -> Iterator[slice]:
        at = 0
        while at < total:
            size = chance.randint(1, chance.choice(most))
            yield slice(at, at + size)
            at += size

    async def main() -> None:
        async with server(kind, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            data = chance.randbytes(BIG // 4)
            for part in sizes([100, 16_384, 70_000, BIG], len(data)):
                client.session.write(data[part])
            sealed = client.outgoing.read()

            def send() -> None:
                for part in sizes([3, 6, 1000, 20_000, BIG] if seed else [BIG], len(sealed)):
                    client.socket.sendall(sealed[part])

            sending = asyncio.ensure_future(in_thread(send))
            assert await in_thread(client.read, len(data)) == data
            await sending

    run(main())


def test_a_buffer_of_no_length_is_an_error(run: Run, tls: Any) -> None:
    class Empty(InPlace):
        def get_buffer(self, sizehint: int) -> Any:
            return bytearray()

        def connection_lost(self, error: Any) -> None:
            self.events.append(error)

    async def main() -> None:
        async with server(Empty, ssl=tls[0]) as serving:
            with TlsClient(serving.address, tls[1]) as client, contextlib.suppress(EOFError, ConnectionError):
                await in_thread(client.shake_hands)
                await in_thread(client.read, 1)
            await ended(serving)
            assert isinstance(serving.made[0].events[-1], RuntimeError)

    run(main())
    assert run.messages() == ["Fatal error on SSL protocol"]


def test_what_came_with_the_handshake_s_end_is_delivered_in_its_wake(run: Run, tls: Any) -> None:
    async def main() -> None:
        async with server(Echo, ssl=tls[0]) as serving:
            with TlsClient(serving.address, tls[1]) as client:

                def talk() -> bytes:
                    client.begin()
                    while True:
                        client.feed()
                        try:
                            client.session.do_handshake()
                            break
                        except ssl.SSLWantReadError:
                            pass
                    client.send(b"early")  # with the client's Finished
                    return client.read(5)

                assert await in_thread(talk) == b"early"

    run(main())


# --- writing


@both
def test_what_write_takes_and_what_it_refuses(run: Run, tls: Any, create: Any) -> None:
    async def main() -> list[Any]:
        async with server(Notes, create, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            transport = (await serving.first()).transport
            assert transport.can_write_eof() is False
            told = []
            for act, *arguments in (
                (transport.write, "text"),
                (transport.write, 5),
                (transport.write_eof,),
                (transport.set_write_buffer_limits, 1, 2),
            ):
                with pytest.raises(Exception) as raised:  # noqa: PT011
                    act(*arguments)
                told.append((type(raised.value), str(raised.value)))
            kept = bytearray(b"c")
            transport.write(b"")
            transport.write(b"ab")
            transport.write(kept)
            kept[:] = b"X"
            transport.write(memoryview(b"de"))
            transport.writelines([b"f", bytearray(b"g"), memoryview(b"h")])
            assert await in_thread(client.read, 8) == b"abcdefgh"
            return told

    assert [kind for kind, _ in run(main())] == [TypeError, TypeError, NotImplementedError, ValueError]


def test_what_one_callback_writes_is_one_record(run: Run, tls: Any) -> None:
    class Answers(Notes):
        def data_received(self, data: bytes) -> None:
            for part in (b"head", b"", b"body", bytearray(b"tail")):
                self.transport.write(part)
            assert self.transport.get_write_buffer_size() == 0

    async def main() -> None:
        async with server(Answers, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            client.send(b"?")
            assert await in_thread(client.read, 12) == b"headbodytail"
            handshake_and_tickets = [kind for kind, length in client.records() if length != 12 + 17]
            assert len(client.records()) - len(handshake_and_tickets) == 1
            assert client.records()[-1][0] == APPLICATION_DATA

    run(main())


@both
def test_a_client_that_reads_slowly_slows_the_protocol_down(run: Run, tls: Any, create: Any) -> None:
    async def main() -> None:
        async with server(Notes, create, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            protocol = await serving.first()
            written = 0
            while "pause" not in protocol.events:
                protocol.transport.write(bytes(1 << 16))
                written += 1 << 16
                assert written < 64 << 20
            assert protocol.transport.get_write_buffer_size() > 0
            assert len(await in_thread(client.read, written)) == written
            await protocol.until(lambda p: "resume" in p.events)
            assert protocol.transport.get_write_buffer_size() == 0

    run(main())


def test_a_protocol_that_writes_much_in_one_callback_is_paused_in_it(run: Run, tls: Any) -> None:
    class Floods(Notes):
        written = 0

        def data_received(self, data: bytes) -> None:
            while "pause" not in self.events:
                self.transport.write(bytes(1 << 14))
                self.written += 1 << 14
                assert self.written < 64 << 20

    async def main() -> None:
        async with server(Floods, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            client.send(b"?")
            protocol = await serving.first()
            await protocol.until(lambda p: "pause" in p.events)
            assert len(await in_thread(client.read, protocol.written)) == protocol.written

    run(main())
    assert run.reports == []


# --- the end


@both
@pytest.mark.parametrize("size", [5, BIG // 4])
def test_close_sends_all_that_was_written(run: Run, tls: Any, create: Any, size: int) -> None:
    class Closes(Notes):
        def data_received(self, data: bytes) -> None:
            self.transport.write(bytes(size))
            self.transport.close()
            assert self.transport.is_closing()

    async def main() -> None:
        async with server(Closes, create, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            client.send(b"?")
            assert len(await in_thread(client.read, size + 1)) == size
            await in_thread(client.unwrap)
            assert await serving.made[0].lost is None
            assert serving.made[0].events.count("lost") == 1

    run(main())


def test_close_with_data_that_nobody_has_read_is_in_order(run: Run, tls: Any) -> None:
    async def main() -> None:
        async with server(Notes, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            protocol = await serving.first()
            protocol.transport.pause_reading()
            client.send(b"an upload that is refused")
            while protocol.transport.get_read_buffer_size() < 10:
                await asyncio.sleep(0)
            protocol.transport.write(b"413")
            protocol.transport.close()
            assert await in_thread(client.read, 4) == b"413"
            await in_thread(client.unwrap)
            assert await protocol.lost is None

    run(main())


@both
def test_abort_ends_at_once(run: Run, tls: Any, create: Any) -> None:
    async def main() -> None:
        async with server(Notes, create, ssl=tls[0]) as serving, opened(serving, tls[1]):
            protocol = await serving.first()
            protocol.transport.write(bytes(BIG))
            protocol.transport.abort()
            assert protocol.transport.is_closing()
            assert await protocol.lost is None
            protocol.transport.abort()

    run(main())


@both
def test_a_client_that_does_not_agree_to_the_end_is_cut(run: Run, tls: Any, create: Any) -> None:
    async def main() -> None:
        asking = server(Notes, create, ssl=tls[0], ssl_shutdown_timeout=0.1)
        async with asking as serving, opened(serving, tls[1]):
            protocol = await serving.first()
            protocol.transport.close()
            error = await protocol.lost
            assert isinstance(error, TimeoutError)
            assert str(error) == "SSL shutdown timed out"

    run(main())
    assert run.reports == []


@both
def test_the_client_ends(run: Run, tls: Any, create: Any) -> None:
    async def main() -> list[Any]:
        async with server(Notes, create, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            await in_thread(client.unwrap)
            assert await in_thread(read_all, client.socket) == b""
            assert await serving.made[0].lost is None
            return list(serving.made[0].events)

    assert run(main()) == ["made", "eof", "lost"]


@both
def test_the_client_ends_without_a_close_notify(run: Run, tls: Any, create: Any) -> None:
    if run.loop == "uvloop" and create is asyncios:
        pytest.skip("uvloop's own does not call eof_received()")

    async def main() -> list[Any]:
        async with server(Notes, create, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            client.socket.shutdown(socket.SHUT_WR)
            assert await serving.made[0].lost is None
            return list(serving.made[0].events)

    assert run(main()) == ["made", "eof", "lost"]


def test_an_answer_to_the_end_is_sent(run: Run, tls: Any) -> None:
    class Answers(Notes):
        def eof_received(self) -> bool:
            self.transport.write(b"goodbye")
            return super().eof_received()

    async def main() -> None:
        async with server(Answers, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            client.socket.shutdown(socket.SHUT_WR)
            assert await in_thread(client.read, 7) == b"goodbye"

    run(main())


def test_keeping_half_a_connection_open_is_warned_of(
    run: Run, tls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Keeps(Notes):
        keep_open = True

    async def main() -> None:
        async with server(Keeps, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            await in_thread(client.unwrap)
            await serving.made[0].lost

    run(main())
    assert [record.message for record in caplog.records] == [
        "returning true from eof_received() has no effect when using ssl"
    ]


def test_writes_after_the_end_are_warned_of(run: Run, tls: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with server(Notes, ssl=tls[0]) as serving, opened(serving, tls[1]):
            protocol = await serving.first()
            protocol.transport.abort()
            await protocol.lost
            for _ in range(6):
                protocol.transport.write(b"x")

    run(main())
    assert {record.message for record in caplog.records} == {"SSL connection is closed"}


def test_nothing_is_left_of_a_connection_that_has_ended(run: Run, tls: Any) -> None:
    async def main() -> None:
        async with server(Echo, ssl=tls[0]) as serving:
            gc.disable()
            try:
                async with opened(serving, tls[1]) as client:
                    client.send(b"hello")
                    assert await in_thread(client.read, 5) == b"hello"
                    await in_thread(client.unwrap)
                protocol = serving.made[0]
                await protocol.lost
                weak = weakref.ref(protocol.transport)
                assert type(protocol.transport) is TlsTransport
                del protocol.transport
                await asyncio.sleep(0)
                assert weak() is None
            finally:
                gc.enable()

    run(main())


# --- what it tells of itself


def test_what_a_transport_tells(run: Run, tls: Any) -> None:
    async def main() -> None:
        async with server(Notes, ssl=tls[0]) as serving, opened(serving, tls[1]) as client:
            protocol = await serving.first()
            transport = protocol.transport
            told = transport.get_extra_info
            assert told("sslcontext") is tls[0]
            assert isinstance(told("ssl_object"), ssl.SSLObject)
            assert told("cipher") == client.session.cipher()
            assert told("compression") is None
            assert told("peercert") is None
            assert told("peername") == client.socket.getsockname()
            assert told("sockname") == serving.address
            assert told("socket").getpeername() == client.socket.getsockname()
            assert told("nothing", 5) == 5
            assert isinstance(transport, asyncio.sslproto._SSLProtocolTransport)
            assert "open" in repr(transport)
            assert transport.get_protocol() is protocol
            low, high = transport.get_write_buffer_limits()
            assert (low, high) == (128 << 10, 512 << 10)
            transport.set_write_buffer_limits(low=1)
            assert transport.get_write_buffer_limits() == (1, 4)
            transport.set_read_buffer_limits(high=8)
            assert transport.get_read_buffer_limits() == (2, 8)
            other = Notes()
            transport.set_protocol(other)
            client.send(b"for the other")
            await other.until(lambda p: p.data == b"for the other")
            transport.abort()
            await other.lost
            assert transport.get_protocol() is None
            assert "closed" in repr(transport)

    run(main())


def test_debug_mode_tells_of_each_step(run: Run, tls: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_debug(True)
        async with server(Notes, ssl=tls[0]) as serving:
            async with opened(serving, tls[1]) as client:
                client.socket.shutdown(socket.SHUT_WR)
                await serving.made[0].lost
            with connect(serving.address) as wrong:
                wrong.sendall(b"GET / HTTP/1.0\r\n\r\n")
                with contextlib.suppress(ConnectionError):
                    await in_thread(read_all, wrong)

    with caplog.at_level(logging.DEBUG, "asyncio"):
        run(main())
    told = " ".join(record.message for record in caplog.records)
    for words in ("starts SSL handshake", "SSL handshake took", "received EOF", "SSL handshake failed"):
        assert words in told


@pytest.mark.parametrize("name", ["ssl_handshake_timeout", "ssl_shutdown_timeout"])
def test_a_timeout_is_a_positive_number(run: Run, tls: Any, name: Any) -> None:
    options: dict[str, Any] = {name: 0}

    async def main() -> None:
        with pytest.raises(ValueError, match="should be a positive number, got 0"):
            await aio.create_server(Notes, "127.0.0.1", 0, ssl=tls[0], **options)

    run(main())
