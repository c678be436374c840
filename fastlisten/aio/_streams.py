"""asyncio's streams on our servers: start_server(), start_unix_server(), and start_tls() of a writer."""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
import sys
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, cast

from fastlisten.aio._create import create_server, create_unix_server, start_tls
from fastlisten.aio._server import Factory, Server
from fastlisten.aio._transport import Transport

ClientConnected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]

# How many bytes a StreamReader keeps; asyncio's default.
LIMIT = 2**16

# Before 3.11.7 and 3.12.1 its streams leave the task of a callback alone: cpython's gh-110894.
_WATCHES_TASKS = sys.version_info >= (3, 12, 1) or (3, 11, 7) <= sys.version_info < (3, 12)


def _stream_protocol(client_connected_cb: ClientConnected, limit: int) -> Factory:
    loop = asyncio.get_running_loop()
    if not _WATCHES_TASKS:
        client_connected_cb = functools.partial(_watched, client_connected_cb)
    if not isinstance(loop, asyncio.BaseEventLoop):
        client_connected_cb = functools.partial(_with_start_tls, client_connected_cb)

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, client_connected_cb, loop=loop)

    return factory


def _watched(
    callback: ClientConnected, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Awaitable[None] | None:
    """Call it, and have a coroutine that raises reported and its connection closed."""
    answer = callback(reader, writer)
    return _guarded(answer, writer) if asyncio.iscoroutine(answer) else answer


async def _guarded(coroutine: Awaitable[None], writer: asyncio.StreamWriter) -> None:
    try:
        await coroutine
    except Exception as error:
        asyncio.get_running_loop().call_exception_handler(
            {
                "message": "Unhandled exception in client_connected_cb",
                "exception": error,
                "transport": writer.transport,
            }
        )
        writer.transport.close()


class _StartsTls:
    """The event loop, as StreamWriter.start_tls() asks for it: with a start_tls() that takes our transports.

    uvloop's own takes uvloop's only.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    async def start_tls(self, transport: Any, *args: Any, **options: Any) -> Any:
        if type(transport) is Transport:
            return await start_tls(self._loop, transport, *args, **options)
        return await asyncio.BaseEventLoop.start_tls(cast(Any, self._loop), transport, *args, **options)


def _with_start_tls(
    callback: ClientConnected, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Awaitable[None] | None:
    """Call it with a writer that can start TLS on our transport."""
    writer.start_tls = functools.partial(_start_tls, weakref.ref(writer))  # type: ignore[method-assign]
    return callback(reader, writer)


async def _start_tls(weak: Callable[[], Any], context: ssl.SSLContext, **options: Any) -> None:
    writer = weak()
    loop, writer._loop = writer._loop, _StartsTls(writer._loop)
    try:
        await asyncio.StreamWriter.start_tls(writer, context, **options)
    finally:
        writer._loop = loop


async def start_server(
    client_connected_cb: ClientConnected,
    host: Any = None,
    port: Any = None,
    *,
    limit: int = LIMIT,
    **kwds: Any,
) -> Server:
    """asyncio.start_server(): call `client_connected_cb(reader, writer)` for each client.

    client_connected_cb: a plain function or a coroutine function, which becomes a task.  limit: how many
    bytes a reader keeps.  The other arguments are create_server()'s.
    """
    return await create_server(_stream_protocol(client_connected_cb, limit), host, port, **kwds)


async def start_unix_server(
    client_connected_cb: ClientConnected,
    path: str | bytes | os.PathLike[str] | None = None,
    *,
    limit: int = LIMIT,
    **kwds: Any,
) -> Server:
    """asyncio.start_unix_server(): start_server() on a unix path, with create_unix_server()'s arguments."""
    return await create_unix_server(_stream_protocol(client_connected_cb, limit), path, **kwds)
