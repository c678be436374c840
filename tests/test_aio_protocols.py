"""Real packages on the asyncio servers: their protocols over our transport, on each loop."""

import asyncio
import contextlib
import hashlib
import io
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from fastlisten import aio
from helpers import connect, read_all
from helpers.aio import Run, in_thread, run

__all__ = ["run"]  # a fixture

BIG = bytes(range(256)) * (32 << 10)  # 8 MB


class Places(dict[str, int]):
    """Puts our functions in the place of the loop's own, and counts the servers made."""

    def put(self) -> None:
        loop: Any = asyncio.get_running_loop()
        for name in ("create_server", "create_unix_server"):
            setattr(loop, name, self._counted(name, getattr(aio, name)))

    def _counted(self, name: str, function: Any) -> Any:
        async def create(*args: Any, **options: Any) -> Any:
            self[name] = self.get(name, 0) + 1
            return await function(*args, **options)

        return create


# --- aiohttp


@contextlib.asynccontextmanager
async def aiohttp_server(web: Any, folder: Path) -> Any:
    (folder / "file").write_bytes(BIG)

    async def echo(request: Any) -> Any:
        return web.Response(body=await request.read())

    async def stream(request: Any) -> Any:
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(BIG), 1 << 16):
            await response.write(BIG[start : start + (1 << 16)])
        return response

    async def talk(request: Any) -> Any:
        channel = web.WebSocketResponse(max_msg_size=2 * len(BIG))
        await channel.prepare(request)
        async for message in channel:
            await channel.send_bytes(message.data)
        return channel

    app = web.Application(client_max_size=len(BIG))
    app.add_routes(
        [
            web.post("/echo", echo),
            web.get("/stream", stream),
            web.get("/talk", talk),
            web.static("/static", folder),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    running = await aio.create_server(runner.server, "127.0.0.1", 0)
    try:
        host, port = running.sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        running.close()
        await runner.cleanup()
        await running.wait_closed()


def test_aiohttp(run: Run, tmp_path: Path) -> None:
    aiohttp = pytest.importorskip("aiohttp")
    web = pytest.importorskip("aiohttp.web")

    async def main() -> None:
        async with (
            aiohttp_server(web, tmp_path) as url,
            aiohttp.ClientSession() as session,
        ):
            for body in (b"", b"small", BIG):
                async with session.post(f"{url}/echo", data=io.BytesIO(body)) as answer:
                    assert await answer.read() == body
            for path in ("stream", "static/file"):
                async with session.get(f"{url}/{path}") as answer:
                    assert await answer.read() == BIG
            async with session.ws_connect(f"{url}/talk", max_msg_size=2 * len(BIG)) as channel:
                for message in (b"hello", BIG):
                    await channel.send_bytes(message)
                    assert (await channel.receive()).data == message
            answers = await asyncio.gather(*(session.post(f"{url}/echo", data=b"%d" % i) for i in range(50)))
            assert [await answer.read() for answer in answers] == [b"%d" % i for i in range(50)]

    run(main(), 40)
    assert run.reports == []


# --- uvicorn


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Echoes a body, sends a big one in pieces for /stream, echoes messages of a websocket."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "bytes": message["bytes"]})
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    parts = [BIG[i : i + (1 << 16)] for i in range(0, len(BIG), 1 << 16)]
    pieces = parts if scope["path"] == "/stream" else [body]
    headers = [(b"content-length", b"%d" % sum(map(len, pieces)))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body"})


@contextlib.asynccontextmanager
async def uvicorn_server(http: str, ws: str = "none") -> Any:
    config = pytest.importorskip("uvicorn").Config(
        application, http=http, ws=ws, lifespan="off", log_config=None, access_log=False
    )
    config.load()
    state = pytest.importorskip("uvicorn.server").ServerState()
    running = await aio.create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    try:
        yield running.sockets[0].getsockname()
    finally:
        running.close()
        for connection in list(state.connections):
            connection.shutdown()
        await running.wait_closed()
        await asyncio.gather(*state.tasks)


def answer_body(client: socket.socket, count: int = 1) -> list[bytes]:
    """Read so many HTTP answers from a kept-alive connection."""
    bodies = []
    with client.makefile("rb") as file:
        for _ in range(count):
            assert file.readline().startswith(b"HTTP/1.1 200")
            length = 0
            while (line := file.readline()) != b"\r\n":
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            bodies.append(file.read(length))
    return bodies


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_uvicorn(run: Run, http: str) -> None:
    pytest.importorskip(http)

    def question(body: bytes, path: str = "/") -> bytes:
        return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
            path.encode(),
            len(body),
            body,
        )

    async def main() -> None:
        async with uvicorn_server(http) as address:
            with connect(address) as client:
                for body in (b"one", b"", BIG):
                    sending = asyncio.ensure_future(in_thread(client.sendall, question(body)))
                    assert await in_thread(answer_body, client) == [body]
                    await sending
                client.sendall(question(b"a") + question(b"b") + question(b"c"))  # pipelined
                assert await in_thread(answer_body, client, 3) == [b"a", b"b", b"c"]
            with connect(address, receive_buffer=4096) as client:
                client.sendall(question(b"", "/stream"))
                assert await in_thread(answer_body, client) == [BIG]
            with connect(address) as client:
                client.sendall(b"nonsense\r\n\r\n")
                assert (await in_thread(read_all, client)).startswith(b"HTTP/1.1 400")
            with connect(address) as client:  # gone before the answer
                client.sendall(question(b"", "/stream"))

    run(main(), 40)
    assert run.reports == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning:websockets", "ignore::DeprecationWarning:uvicorn")
def test_uvicorn_upgrades_to_a_websocket(run: Run) -> None:
    client = pytest.importorskip("websockets.asyncio.client")

    async def main() -> None:
        async with (
            uvicorn_server("h11", "websockets-sansio") as (host, port),
            client.connect(f"ws://{host}:{port}/", max_size=len(BIG), proxy=None) as channel,
        ):
            for message in (b"hello", BIG[: 1 << 20]):
                await channel.send(message)
                assert await channel.recv() == message

    run(main(), 40)
    assert run.reports == []


# --- websockets


def test_websockets(run: Run) -> None:
    pytest.importorskip("websockets")
    client = pytest.importorskip("websockets.asyncio.client")
    server = pytest.importorskip("websockets.asyncio.server")
    places = Places()

    async def echo(channel: Any) -> None:
        async for message in channel:
            await channel.send(message)

    async def talk(url: str, messages: list[bytes]) -> None:
        async with client.connect(url, max_size=len(BIG), proxy=None) as channel:
            for message in messages:
                await channel.send(message)
                assert await channel.recv() == message

    async def main() -> None:
        places.put()
        async with server.serve(echo, "127.0.0.1", 0, max_size=len(BIG)) as running:
            host, port = running.sockets[0].getsockname()
            url = f"ws://{host}:{port}/"
            await asyncio.gather(*(talk(url, [b"%d" % i for i in range(20)]) for _ in range(20)))
            await talk(url, [BIG])

    run(main(), 40)
    assert places == {"create_server": 1}
    assert run.reports == []


# --- asyncssh


def test_asyncssh_with_heavy_flow_control(run: Run, tmp_path: Path) -> None:
    asyncssh = pytest.importorskip("asyncssh")
    places = Places()
    data = os.urandom(20 << 20)
    (tmp_path / "big").write_bytes(data)
    key = asyncssh.generate_private_key("ssh-ed25519")

    class Open(asyncssh.SSHServer):  # type: ignore[misc,name-defined]
        def begin_auth(self, username: str) -> bool:
            return False

    async def main() -> None:
        places.put()
        listening = await asyncssh.listen(
            "127.0.0.1", 0, server_factory=Open, server_host_keys=[key], sftp_factory=True
        )
        try:
            async with (
                asyncssh.connect(
                    "127.0.0.1", listening.get_port(), known_hosts=None, client_keys=[], config=None
                ) as connection,
                connection.start_sftp_client() as files,
            ):
                await files.get(str(tmp_path / "big"), str(tmp_path / "got"))
                await files.put(str(tmp_path / "got"), str(tmp_path / "back"))
        finally:
            listening.close()
            await listening.wait_closed()

    run(main(), 50)
    back = (tmp_path / "back").read_bytes()
    assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
    assert places == {"create_server": 1}
    assert run.reports == []
