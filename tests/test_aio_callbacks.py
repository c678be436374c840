"""The transport of fastlisten.aio: what its protocols are, and callbacks that raise."""

import asyncio
import contextlib
import contextvars
import socket
import weakref
from typing import Any

import pytest

from fastlisten import aio
from helpers import LIMIT, connect, read_all
from helpers.aio import BIG, LOOPS, Echo, Notes, Run, in_thread, run, server

__all__ = ["run"]  # a fixture


def test_set_protocol_in_the_middle(run: Run) -> None:
    async def main() -> tuple[bytes, bytes]:
        async with server(Notes) as serving:
            with connect(serving.address) as client:
                client.sendall(b"first")
                protocol = await serving.first()
                await protocol.until(lambda p: p.data)
                second = Notes()
                protocol.transport.set_protocol(second)
                assert protocol.transport.get_protocol() is second
                client.sendall(b"second")
                await second.until(lambda p: p.data)
                client.close()
                await second.lost
                assert not protocol.lost.done()
                return protocol.data, second.data

    assert run(main()) == (b"first", b"second")


class Buffered(Notes, asyncio.BufferedProtocol):
    size = 5

    def get_buffer(self, sizehint: int) -> Any:
        assert sizehint == -1
        self.buffer = bytearray(self.size)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.buffer[:nbytes]))


def test_a_buffered_protocol(run: Run) -> None:
    async def main() -> Any:
        async with server(Buffered) as serving:
            with connect(serving.address) as client:
                client.sendall(b"more than five bytes")
                client.shutdown(socket.SHUT_WR)
                protocol = await serving.first()
                assert await protocol.lost is None
                assert protocol.events[-2:] == ["eof", "lost"]
                return protocol.data

    assert run(main()) == b"more than five bytes"


def test_a_protocol_is_buffered_where_the_loops_own_transport_says_so(run: Run) -> None:
    """asyncio asks for the class, uvloop for get_buffer() of what is no asyncio.Protocol."""

    class ByItsMethods(asyncio.BaseProtocol):
        def __init__(self) -> None:
            self.space, self.told = bytearray(100), ""

        def connection_made(self, transport: Any) -> None:
            made.append(self)

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.space

        def buffer_updated(self, nbytes: int) -> None:
            self.told = f"buffer_updated {bytes(self.space[:nbytes])!r}"

        def data_received(self, data: bytes) -> None:
            self.told = f"data_received {data!r}"

    async def told_by(create: Any) -> str:
        running = await create(ByItsMethods, "127.0.0.1", 0)
        with connect(running.sockets[0].getsockname()) as client:
            client.sendall(b"hello")
            while not (made and made[-1].told):
                await asyncio.sleep(0)
        running.close()
        return str(made.pop().told)

    made: list[ByItsMethods] = []
    ours = run(told_by(aio.create_server))
    theirs = run(told_by(lambda *args: asyncio.get_running_loop().create_server(*args)))
    assert ours == theirs


def test_a_protocol_behind_a_proxy_is_of_its_own_kind(run: Run) -> None:
    behind: list[Any] = []

    class Plain(Notes):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            behind.append(Buffered())
            proxy: Any = weakref.proxy(behind[-1])
            self.transport.set_protocol(proxy)

    def proxied() -> Any:
        behind.append(Plain())
        return weakref.proxy(behind[-1])

    async def main() -> None:
        async with server(proxied) as serving:
            with connect(serving.address) as client:
                await serving.first()
                client.sendall(b"one")
                await behind[0].until(lambda plain: plain.data == b"one")
                client.sendall(b"two")
                await behind[1].until(lambda buffered: buffered.data == b"two")

    run(main())
    assert run.reports == []


class Switches(Buffered):
    """Has another protocol called from within get_buffer()."""

    after: Notes

    def get_buffer(self, sizehint: int) -> Any:
        self.after = Notes()
        self.transport.set_protocol(self.after)
        return super().get_buffer(sizehint)


def test_get_buffer_that_sets_a_protocol_hands_out_nobody_elses_bytes(run: Run) -> None:
    protocols = [Echo, Switches]

    async def main() -> None:
        async with server(lambda: protocols.pop(0)()) as serving:
            with connect(serving.address) as other:
                other.sendall(b"secret")
                assert await in_thread(other.recv, 6) == b"secret"
            with connect(serving.address) as client:
                client.sendall(b"hello")
                while len(serving.made) < 2 or not hasattr(serving.made[1], "after"):
                    await asyncio.sleep(0)
                after = serving.made[1].after
                assert type(await after.lost) is AttributeError  # it has no buffer_updated()
                assert after.data == b""

    run(main())
    assert run.messages() == ["Fatal error: protocol.buffer_updated() call failed."]


def fails(*args: Any) -> Any:
    raise ZeroDivisionError("on purpose")


FAILURES = {
    "connection_made": (Notes, {"connection_made": fails}),
    "data_received": (Notes, {"data_received": fails}),
    "eof_received": (Notes, {"eof_received": fails}),
    "get_buffer": (Buffered, {"get_buffer": fails}),
    "buffer_updated": (Buffered, {"buffer_updated": fails}),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_callback_that_raises_ends_its_connection_and_is_reported_once(run: Run, name: str) -> None:
    base, methods = FAILURES[name]
    protocols = [type("Fails", (base,), methods), Echo, Echo]

    async def main() -> Any:
        async with server(lambda: protocols.pop(0)()) as serving:
            with connect(serving.address) as client:
                client.sendall(b"data")
                client.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):  # who closes over unread data resets
                    assert await in_thread(read_all, client) == b""
            error = await serving.made[0].lost
            for _ in range(2):
                reader, writer = await asyncio.open_connection(*serving.address)
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                writer.close()
                await writer.wait_closed()
            assert serving.server.stats().handler_errors == 1
            return error

    assert type(run(main())) is ZeroDivisionError
    assert run.messages() == [f"Fatal error: protocol.{name}() call failed."]
    assert type(run.reports[0]["exception"]) is ZeroDivisionError


def test_a_factory_that_raises_closes_its_connection_and_is_reported_once(run: Run) -> None:
    factories = [fails, Echo]

    async def main() -> None:
        async with server(lambda: factories.pop(0)()) as serving:
            with connect(serving.address) as client:
                assert await in_thread(client.recv, 1) == b""
            with connect(serving.address) as client:
                client.sendall(b"hello")
                assert await in_thread(client.recv, 5) == b"hello"

    run(main())
    assert run.messages() == ["Error on transport creation for incoming connection"]


def test_connection_lost_that_raises_is_reported(run: Run) -> None:
    class Fails(asyncio.Protocol):
        def connection_lost(self, error: BaseException | None) -> None:
            fails(error)

    async def main() -> None:
        async with server(Fails) as serving:
            connect(serving.address).close()
            while serving.server.stats().handled == 0:
                await asyncio.sleep(0)

    run(main())
    assert run.messages() == ["Fatal error: protocol.connection_lost() call failed."]


@pytest.mark.parametrize("name", ["pause_writing", "resume_writing"])
def test_flow_control_that_raises_is_reported_and_changes_nothing(run: Run, name: str) -> None:
    protocol = type("Fails", (Notes,), {name: fails})

    async def main() -> int:
        async with server(protocol) as serving:
            with connect(serving.address) as client:
                (await serving.first()).transport.write(bytes(BIG))
                serving.made[0].transport.close()
                return len(await in_thread(read_all, client))

    assert run(main()) == BIG
    assert run.messages() == [f"protocol.{name}() failed"]


def test_system_exit_comes_out_and_the_other_clients_are_not_lost() -> None:
    class Leaves(Notes):
        count = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            Leaves.count += 1
            if Leaves.count == 2:
                raise SystemExit(7)

    loop = asyncio.SelectorEventLoop()
    made: list[Leaves] = []

    def factory() -> Leaves:
        made.append(Leaves())
        return made[-1]

    async def serve() -> Any:
        return await aio.create_server(factory, "127.0.0.1", 0)

    try:
        running = loop.run_until_complete(serve())
        clients = [connect(running.sockets[0].getsockname()) for _ in range(5)]
        with pytest.raises(SystemExit):
            loop.run_forever()

        async def rest() -> None:
            while Leaves.count < 5:
                await asyncio.sleep(0)
            for protocol in made:
                protocol.transport.abort()
                await protocol.lost
            running.close()
            await running.wait_closed()

        loop.run_until_complete(asyncio.wait_for(rest(), LIMIT))
        for client in clients:
            client.close()
        assert running.stats().accepted == 5
    finally:
        loop.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_connection_reads_on_after_an_interrupt(loop: str) -> None:
    class Interrupted(Notes):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.data == b"one":
                raise KeyboardInterrupt

        def eof_received(self) -> bool:
            super().eof_received()
            if self.events.count("eof") == 1:
                raise KeyboardInterrupt
            return False

    async def start() -> Any:
        return await aio.create_server(factory, "127.0.0.1", 0)

    def factory() -> Interrupted:
        made.append(Interrupted())
        return made[-1]

    made: list[Interrupted] = []
    running = LOOPS[loop]()
    try:
        serving = running.run_until_complete(start())
        with connect(serving.sockets[0].getsockname()) as client:
            client.sendall(b"one")
            with pytest.raises(KeyboardInterrupt):
                running.run_forever()
            client.sendall(b"two")
            client.shutdown(socket.SHUT_WR)
            with pytest.raises(KeyboardInterrupt):
                running.run_forever()

            async def rest() -> None:
                async with asyncio.timeout(LIMIT):
                    assert await made[0].lost is None
                    serving.close()
                    await serving.wait_closed()

            running.run_until_complete(rest())
            assert made[0].data == b"onetwo"
            assert made[0].events == ["made", "data", "data", "eof", "eof", "lost"]
    finally:
        running.close()


def test_each_connection_has_its_own_context(run: Run) -> None:
    mark: contextvars.ContextVar[int] = contextvars.ContextVar("mark")
    count = iter(range(100))

    class Marks(Notes):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            assert mark.get() == -1  # what it was where the server was made
            self.number = next(count)
            mark.set(self.number)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            assert mark.get() == self.number
            self.transport.close()

        def connection_lost(self, error: Any) -> None:
            assert mark.get() == self.number
            super().connection_lost(error)

    async def main() -> None:
        mark.set(-1)
        async with server(Marks, max_connections=1) as serving:
            for i in range(6):
                with connect(serving.address) as client:
                    if i % 2:
                        client.sendall(b"x")
                    else:
                        while len(serving.made) == i:
                            await asyncio.sleep(0)
                        client.sendall(b"x")
                    assert await in_thread(client.recv, 1) == b""
                assert await serving.made[i].lost is None

    run(main())
    assert run.reports == []
