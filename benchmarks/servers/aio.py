"""The event loops, each with protocols and with streams, and asyncio's and uvloop's with fastlisten.aio.

`loop`: a name in LOOPS.  `module` has create_server() and start_server(): "" for the loop's own and
asyncio's, else fastlisten.aio, with `defer_accept` in seconds, 0 for without.  `handshake_threads`: of ours.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Coroutine
from typing import Any, cast

from .handlers import ADDRESS, BACKLOG, HTTP_ANSWER, QUESTION_LIMIT

MESSAGE_LIMIT = 256 * 1024
"""Bytes that a stream's read() may bring: the longest message."""


def loop_factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the event loop of that name in LOOPS."""
    if loop.startswith("aiofastnet-"):
        import aiofastnet

        return aiofastnet.loop_factory(loop_factory(loop.removeprefix("aiofastnet-")))
    if loop.startswith("fastlisten-"):
        factory = getattr(importlib.import_module("fastlisten.aio"), loop.removeprefix("fastlisten-"))
    else:
        factory = importlib.import_module(loop).new_event_loop
    return cast(Callable[[], asyncio.AbstractEventLoop], factory)


def run(loop: str, main: Coroutine[Any, Any, None]) -> None:
    """Run it on the event loop of that name."""
    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        runner.run(main)


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


class _Messages(_Talk):
    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


PROTOCOLS: dict[str, type[asyncio.Protocol]] = {
    "close": _Close,
    "echo": _Echo,
    "http": _Http,
    "hold": _Hold,
    "message": _Messages,
    "tls": _Messages,
}


def protocol(
    work: str, loop: str, module: str = "", defer_accept: int = 0, handshake_threads: int = 0
) -> None:
    """create_server with a Protocol."""

    async def main() -> None:
        place: Any = importlib.import_module(module) if module else asyncio.get_running_loop()
        options: dict[str, Any] = {"defer_accept": defer_accept} if defer_accept else {}
        if handshake_threads:
            options["handshake_threads"] = handshake_threads
        if work == "tls":
            options["ssl"] = importlib.import_module("benchmarks.tls_load").server_context()
        server = await place.create_server(PROTOCOLS[work], *ADDRESS, backlog=BACKLOG, **options)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    run(loop, main())


async def _answer(work: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if work == "echo":
        writer.write(await reader.read(QUESTION_LIMIT))
    elif work == "http":
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HTTP_ANSWER)
    elif work == "hold":
        await reader.read(1)
    elif work == "message":
        while data := await reader.read(MESSAGE_LIMIT):
            writer.write(data)
            await writer.drain()
    writer.close()


def streams(work: str, loop: str, module: str = "asyncio", defer_accept: int = 0) -> None:
    """start_server with a coroutine a connection."""

    async def main() -> None:
        place = importlib.import_module(module)
        options = {"defer_accept": defer_accept} if defer_accept else {}
        server = await place.start_server(
            lambda reader, writer: _answer(work, reader, writer),
            *ADDRESS,
            backlog=BACKLOG,
            **options,
        )
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    run(loop, main())
