"""TLS of asyncio servers whose handshakes run in threads: handshake_threads=."""

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fastlisten import aio
from fastlisten.aio._tls import TlsTransport
from helpers import LIMIT, needs, read_all
from helpers.aio import LOOPS, Echo, Notes, Run, in_thread, server, turns
from helpers.tls_client import TlsClient, ended

pytestmark = needs("the openssl command")


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    """Run on each loop; how descriptors are watched, TLS does not know."""
    return Run(request.param)


@pytest.fixture
def slow(tls: Any) -> Iterator[Any]:
    """Give what makes handshakes of the server's context wait until it is let go, and counts who waits."""

    class Slow:
        def __init__(self) -> None:
            self.waiting: list[str] = []
            self.go_on = threading.Event()

        def hold(self, ssl_object: Any, name: Any, context: Any) -> None:
            self.waiting.append(threading.current_thread().name)
            assert self.go_on.wait(LIMIT)

    made = Slow()
    tls[0].sni_callback = made.hold
    yield made
    made.go_on.set()
    tls[0].sni_callback = None


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def echoed(client: TlsClient) -> None:
    """Have the server be through with the handshake, too."""
    client.send(b"hello")
    assert await in_thread(client.read, 5) == b"hello"


def test_handshakes_run_in_so_many_threads_and_the_loop_goes_on(run: Run, tls: Any, slow: Any) -> None:
    async def main() -> None:
        async with server(Echo, ssl=tls[0], handshake_threads=2) as serving, server(Echo) as other:
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(TlsClient(serving.address, tls[1])) for _ in range(3)]
                shaking = [asyncio.ensure_future(in_thread(client.shake_hands)) for client in clients]
                await until(lambda: len(slow.waiting) == 2)
                assert all(name.startswith("fastlisten-handshake") for name in slow.waiting)
                reader, writer = await asyncio.open_connection(*other.address)
                writer.write(b"hello")  # the event loop is free
                assert await reader.readexactly(5) == b"hello"
                writer.close()
                slow.go_on.set()
                await asyncio.gather(*shaking)
                for client in clients:
                    await echoed(client)
                assert all(type(protocol.transport) is TlsTransport for protocol in serving.made)

    run(main())
    assert run.reports == []


def test_a_handshake_in_a_thread_has_its_deadline(run: Run, tls: Any, slow: Any) -> None:
    async def main() -> None:
        async with server(Notes, ssl=tls[0], handshake_threads=1, ssl_handshake_timeout=0.1) as serving:
            with TlsClient(serving.address, tls[1]) as client:
                client.begin()
                await until(lambda: slow.waiting)
                client.socket.sendall(bytes(1 << 20))  # meanwhile nobody may touch the session
                with contextlib.suppress(ConnectionError):
                    await in_thread(read_all, client.socket)
            await ended(serving)
            slow.go_on.set()
            assert serving.made[0].events == []

    run(main())
    assert run.reports == []


def test_what_comes_while_a_thread_has_the_session_is_kept(run: Run, tls: Any, slow: Any) -> None:
    """A second record, of which the first has the beginning of the hello only, or all of it."""

    async def main() -> None:
        async with server(Notes, ssl=tls[0], handshake_threads=1) as serving:
            with TlsClient(serving.address, tls[1]) as client:
                client.begin()
                await until(lambda: slow.waiting)
                client.socket.sendall(b"\x17\x03\x03\x00\x05wrong")
                await asyncio.sleep(0.02)
                slow.go_on.set()
                with pytest.raises(ssl.SSLError, match="ALERT"):  # the record was looked at, in its turn
                    await in_thread(lambda: client.shake_hands().read(1))
            await ended(serving)
            assert serving.made[0].events == []

    run(main())


def test_a_server_that_closes_lets_its_handshakes_end(run: Run, tls: Any, slow: Any) -> None:
    """Those that wait for a thread, too."""

    async def main() -> None:
        async with server(Echo, ssl=tls[0], handshake_threads=1) as serving:
            with TlsClient(serving.address, tls[1]) as first, TlsClient(serving.address, tls[1]) as second:
                first.begin()
                second.begin()
                await until(lambda: slow.waiting and serving.server.stats().active == 2)
                await turns()
                serving.server.close()
                slow.go_on.set()
                for client in (first, second):
                    await in_thread(client.shake_hands)
                    await echoed(client)
                assert len(slow.waiting) == 2

    run(main())


def test_a_thread_goes_on_when_the_loop_has_taken_what_it_did(run: Run, tls: Any, slow: Any) -> None:
    """On one core the event loop would have to wait for all who are queued, but for the scheduler's tick."""

    async def main() -> None:
        async with server(Echo, ssl=tls[0], handshake_threads=1) as serving:
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(TlsClient(serving.address, tls[1])) for _ in range(3)]
                for client in clients:
                    client.begin()
                await until(lambda: slow.waiting and serving.server.stats().active == 3)
                await turns()
                slow.go_on.set()
                threading.Event().wait(0.05)  # in which the event loop does nothing
                assert len(slow.waiting) == 1
                for client in clients:
                    await in_thread(client.shake_hands)
                    await echoed(client)
                assert len(slow.waiting) == 3
            await ended(serving)

    run(main())


def test_who_has_gone_before_a_thread_was_free_gets_none(run: Run, tls: Any, slow: Any) -> None:
    async def main() -> None:
        async with server(Echo, ssl=tls[0], handshake_threads=1, ssl_handshake_timeout=0.1) as serving:
            with TlsClient(serving.address, tls[1]) as first, TlsClient(serving.address, tls[1]) as second:
                first.begin()
                await until(lambda: slow.waiting)
                second.begin()
                await ended(serving)
                slow.go_on.set()
                with TlsClient(serving.address, tls[1]) as third:
                    await in_thread(third.shake_hands)
                    await echoed(third)
            await ended(serving)
            assert len(slow.waiting) == 2
            stats = serving.server.stats()
            assert (stats.tls_handshakes, stats.tls_failures) == (1, {"timeout": 2})

    run(main())
    assert run.reports == []


@pytest.mark.parametrize(("value", "kind"), [(-1, ValueError), ("2", TypeError)])
def test_handshake_threads_is_a_number(run: Run, tls: Any, value: Any, kind: Any) -> None:
    async def main() -> None:
        with pytest.raises(kind, match="handshake_threads"):
            await aio.create_server(Notes, "127.0.0.1", 0, ssl=tls[0], handshake_threads=value)

    run(main())
