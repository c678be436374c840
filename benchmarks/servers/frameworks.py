"""uvicorn and aiohttp, as their packages are: a program that answers each request with 200 and six bytes."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from .aio import run
from .handlers import ADDRESS, BACKLOG

BODY = b"hello\n"
HEADERS = [(b"content-type", b"text/plain"), (b"content-length", str(len(BODY)).encode())]


async def _application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})


def uvicorn(_: str, loop: str) -> None:
    """uvicorn.Server, on the loop of that name."""
    from uvicorn import Config, Server

    class Announced(Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(self.servers[0].sockets[0].getsockname()[1], flush=True)

    host, port = ADDRESS
    config = Config(
        _application,
        host,
        port,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        backlog=BACKLOG,
    )
    run(loop, Announced(config).serve())


def aiohttp(_: str, loop: str) -> None:
    """aiohttp.web's runner, on the loop of that name."""
    from aiohttp import web

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=BODY, content_type="text/plain")

    async def main() -> None:
        application = web.Application()
        application.router.add_get("/", answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, *ADDRESS, backlog=BACKLOG).start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.get_running_loop().create_future()

    run(loop, main())
