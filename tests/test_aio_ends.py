"""The transport of fastlisten.aio: close, abort, resets and half-closed connections."""

import asyncio
import gc
import logging
import socket
from typing import Any

import pytest

from fastlisten import aio
from helpers import connect, not_under_wine, read_all, reset
from helpers.aio import BIG, SMALL_BUFFER, Notes, Run, asyncios, in_thread, run, server

__all__ = ["run"]  # a fixture


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
