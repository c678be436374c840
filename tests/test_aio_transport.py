"""The transport of fastlisten.aio: what it tells, and what asyncio does with it."""

import asyncio
import io
import os
import socket
import tempfile
import threading
from typing import Any

import pytest

from fastlisten import aio
from helpers import LIMIT, connect, posix_only, read_all, reset, wait_until
from helpers.aio import BIG, SMALL_BUFFER, Echo, Notes, Run, asyncios, files_are_read, in_thread, run, server

__all__ = ["run"]  # a fixture


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


@files_are_read
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
                    if run.loop == "uvloop" and not fallback:  # the kernel sends files for asyncio's
                        with pytest.raises(RuntimeError, match="fallback is disabled"):
                            await task
                        return
                    assert await in_thread(read_all, client, len(expected)) == expected
                    assert await task == len(Files.content) - 100

    run(main())
    assert not run.reports


@files_are_read
def test_a_file_that_the_kernel_cannot_send_waits_for_the_client(run: Run) -> None:
    """The loop reads it, and no more of it than the client takes: there was no such waiting."""
    content = bytes(BIG)

    async def main() -> None:
        async with server(Notes) as serving:
            with connect(serving.address, receive_buffer=SMALL_BUFFER) as client:
                transport = (await serving.first()).transport
                loop = asyncio.get_running_loop()
                file = io.BytesIO(content)
                sending = asyncio.ensure_future(loop.sendfile(transport, file))
                while not transport._protocol_paused:
                    await asyncio.sleep(0)
                assert transport.get_write_buffer_size() < 2 * transport.get_write_buffer_limits()[1]
                assert await in_thread(read_all, client, len(content)) == content
                assert await sending == len(content)

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
