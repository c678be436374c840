"""asyncio and uvloop, each with protocols and with streams."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, cast

from .handlers import ADDRESS, BACKLOG, HTTP_ANSWER, QUESTION_LIMIT


def _run(loop: str, main: Coroutine[Any, Any, None]) -> None:
    if loop == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main)
    else:
        asyncio.run(main)


class _Close(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class _Hold(asyncio.Protocol):
    pass


class _Talk(asyncio.Protocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass


class _Echo(_Talk):
    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        self.transport.close()


class _Http(_Talk):
    question = b""

    def data_received(self, data: bytes) -> None:
        self.question += data
        if b"\r\n\r\n" in self.question:
            self.transport.write(HTTP_ANSWER)
            self.transport.close()


PROTOCOLS: dict[str, type[asyncio.Protocol]] = {
    "close": _Close,
    "echo": _Echo,
    "http": _Http,
    "hold": _Hold,
}


def protocol(work: str, loop: str) -> None:
    """loop.create_server with a Protocol."""

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(
            PROTOCOLS[work], *ADDRESS, backlog=BACKLOG
        )
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    _run(loop, main())


async def _answer(work: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if work == "echo":
        writer.write(await reader.read(QUESTION_LIMIT))
    elif work == "http":
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HTTP_ANSWER)
    elif work == "hold":
        await reader.read(1)
    writer.close()


def streams(work: str, loop: str) -> None:
    """asyncio.start_server with a coroutine a connection."""

    async def main() -> None:
        server = await asyncio.start_server(
            lambda reader, writer: _answer(work, reader, writer), *ADDRESS, backlog=BACKLOG
        )
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    _run(loop, main())
