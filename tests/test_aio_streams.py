"""Streams on fastlisten.aio's servers."""

import asyncio
import contextlib
import socket
import sys
from typing import Any, cast

import pytest

from fastlisten import aio
from fastlisten.aio import _streams
from helpers import connect, exchange, read_all
from helpers.aio import Notes, Run, in_thread, run

__all__ = ["run"]  # a fixture


def test_streams_with_a_coroutine(run: Run) -> None:
    async def main() -> tuple[bytes, Any]:
        types: list[type] = []

        async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            types.extend([type(reader), type(writer)])
            while line := await reader.readline():
                writer.write(line.upper())
                await writer.drain()
            writer.close()
            await writer.wait_closed()

        async with await aio.start_server(upper, "127.0.0.1", 0) as running:
            with connect(running.sockets[0].getsockname()) as client:
                client.sendall(b"one\ntwo\n")
                client.shutdown(socket.SHUT_WR)
                return await in_thread(read_all, client), types

    data, types = run(main())
    assert data == b"ONE\nTWO\n"
    assert types == [asyncio.StreamReader, asyncio.StreamWriter]


@pytest.mark.parametrize("how", ["set_protocol", "pause_reading"])
def test_a_stream_reads_nothing_before_its_tasks_first_step(run: Run, how: str) -> None:
    async def main() -> None:
        async def first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            transport = cast(aio.Transport, writer.transport)
            if how == "set_protocol":
                transport.set_protocol(notes)
                await notes.until(lambda protocol: protocol.data == b"sent before the accept")
            else:
                transport.pause_reading()
                for _ in range(5):
                    await asyncio.sleep(0)
                    assert not reader._buffer  # type: ignore[attr-defined]
                transport.resume_reading()
                assert await reader.readexactly(22) == b"sent before the accept"
            transport.abort()
            done.set_result(None)

        notes = Notes()
        done = asyncio.get_running_loop().create_future()
        async with await aio.start_server(first, "127.0.0.1", 0) as running:
            with connect(running.sockets[0].getsockname()) as client:
                client.sendall(b"sent before the accept")
                await done

    run(main())
    assert run.reports == []


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio has eager tasks since 3.12")
def test_streams_with_eager_tasks(run: Run) -> None:
    if run.loop == "uvloop":
        pytest.skip("uvloop 0.23 calls the factory with an argument that it has since 3.13.3 only")

    async def main() -> list[bytes]:
        async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write((await reader.readline()).upper())
            writer.close()

        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        async with await aio.start_server(upper, "127.0.0.1", 0) as running:
            address = running.sockets[0].getsockname()
            return [await in_thread(exchange, address, b"%d one\n" % i) for i in range(10)]

    assert run(main()) == [b"%d ONE\n" % i for i in range(10)]
    assert run.reports == []


def test_streams_with_a_plain_function_and_a_limit(run: Run) -> None:
    async def main() -> Any:
        got: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.set_result((reader, writer))

        async with await aio.start_server(plain, "127.0.0.1", 0, limit=10) as running:
            with connect(running.sockets[0].getsockname()) as client:
                client.sendall(b"x" * 100)
                reader, writer = await got
                with pytest.raises(asyncio.LimitOverrunError):
                    await reader.readuntil(b"\n")
                writer.close()
                await writer.wait_closed()

    run(main())


@pytest.mark.parametrize("watches", [True, False], ids=["", "as before 3.11.7"])
@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_a_stream_callback_that_raises_closes_and_is_reported(
    run: Run, kind: str, watches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not watches:
        monkeypatch.setattr(_streams, "_WATCHES_TASKS", False)

    def plain(reader: Any, writer: Any) -> None:
        raise ZeroDivisionError("on purpose")

    async def coroutine(reader: Any, writer: Any) -> None:
        await reader.read(1)
        raise ZeroDivisionError("on purpose")

    async def main() -> None:
        callback: Any = plain if kind == "plain" else coroutine
        async with await aio.start_server(callback, "127.0.0.1", 0) as running:
            for _ in range(2):
                with connect(running.sockets[0].getsockname()) as client:
                    client.sendall(b"x")
                    with contextlib.suppress(ConnectionResetError):
                        assert await in_thread(client.recv, 1) == b""

    run(main())
    assert [type(report["exception"]) for report in run.reports] == [ZeroDivisionError] * 2


def test_a_stream_to_a_slow_reader(run: Run) -> None:
    size, kept = 20 << 20, []

    async def pour(reader: Any, writer: asyncio.StreamWriter) -> None:
        for _ in range(size >> 16):
            writer.write(bytes(1 << 16))
            await writer.drain()
            kept.append(writer.transport.get_write_buffer_size())
        writer.close()

    async def main() -> int:
        async with await aio.start_server(pour, "127.0.0.1", 0) as running:
            with connect(running.sockets[0].getsockname(), receive_buffer=4096) as client:
                return len(await in_thread(read_all, client))

    assert run(main(), 40) == size
    assert max(kept) <= 64 * 1024
