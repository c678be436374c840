"""fastlisten.aio: first_bytes= and proxy=, what a client has to send before there is a protocol for it."""

import asyncio
import contextlib
import ssl
from typing import Any

import pytest

from fastlisten import Proxy, aio
from fastlisten._core.proxy_header import ProxyHeader
from helpers import LIMIT, connect, exchange, needs, read_all
from helpers.aio import Echo, Run, in_thread, run, server, turns
from helpers.certificates import Pair, client_context, server_context
from helpers.faults import Faults
from helpers.proxy_headers import UNIQUE_ID, inet, tlv, unix, v1, v2

__all__ = ["run"]  # a fixture

LOCAL = Proxy(["127.0.0.1", "::1"], timeout=LIMIT)
SOMEBODY = "203.0.113.0/24"  # RFC 5737: nobody has these
MODES: dict[str, dict[str, Any]] = {"": {}, "busy": {"busy": "reset", "pending": 10}}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@modes
def test_a_silent_client_has_no_protocol(run: Run, mode: dict[str, Any]) -> None:
    async def main() -> None:
        async with server(Echo, first_bytes=LIMIT, **mode) as serving:
            with connect(serving.address) as silent:
                await until(lambda: serving.server.stats().waiting == 1)
                assert await in_thread(exchange, serving.address) == b"ping"
                assert len(serving.made) == 1
                silent.sendall(b"late")
                assert await in_thread(silent.recv, 9) == b"late"
                assert len(serving.made) == 2
                assert serving.server.stats().waiting == 0

    run(main())
    assert run.reports == []


@modes
def test_a_client_is_closed_when_its_time_is_over(run: Run, mode: dict[str, Any]) -> None:
    async def main() -> None:
        async with server(Echo, first_bytes=0.1, **mode) as serving:
            with connect(serving.address) as silent, connect(serving.address) as gone:
                gone.close()
                assert await in_thread(read_all, silent) == b""
            await until(lambda: serving.server.stats().active == 0)
            assert serving.server.stats().refused_for == {"silent": 1, "left": 1}
            assert serving.made == []
            assert await in_thread(exchange, serving.address) == b"ping"

    run(main())


@modes
@pytest.mark.parametrize("first_bytes", [None, LIMIT], ids=["", "first bytes"])
def test_the_client_is_whom_the_header_names(run: Run, mode: dict[str, Any], first_bytes: Any) -> None:
    headers = [
        (v1(), ("192.0.2.1", 1000)),
        (v2(inet("2001:db8::1") + tlv(UNIQUE_ID, b"7"), 0x21), ("2001:db8::1", 1000, 0, 0)),
        (v2(unix(), 0x31), "/client"),
    ]

    async def main() -> None:
        async with server(Echo, proxy=LOCAL, first_bytes=first_bytes, **mode) as serving:
            for header, peer in headers:
                assert await in_thread(exchange, serving.address, header + b"at once") == b"at once"
                with connect(serving.address) as client:
                    client.sendall(header[:9])
                    await until(lambda: serving.server.stats().waiting == 1)
                    client.sendall(header[9:])
                    await turns()
                    client.sendall(b"late")
                    assert await in_thread(client.recv, 9) == b"late"
                for protocol in serving.made[-2:]:
                    assert protocol.transport.get_extra_info("peername") == peer
                    found = protocol.transport.get_extra_info("proxy")
                    assert isinstance(found, ProxyHeader)
                    assert (found.source, found.length) == (peer, len(header))
                    assert protocol.data in (b"at once", b"late")

    run(main())
    assert run.reports == []


def test_a_proxy_that_speaks_for_itself(run: Run) -> None:
    async def main() -> None:
        async with server(Echo, proxy=LOCAL) as serving:
            with connect(serving.address) as client:
                client.sendall(v2(b"", 0, 0x20))
                protocol = await serving.first()
                assert protocol.transport.get_extra_info("peername") == client.getsockname()
                assert protocol.transport.get_extra_info("proxy").local

    run(main())


@modes
def test_who_is_no_proxy(run: Run, mode: dict[str, Any]) -> None:
    async def main() -> None:
        async with server(Echo, proxy=Proxy([SOMEBODY]), **mode) as serving:
            with connect(serving.address) as client:
                assert await in_thread(read_all, client) == b""
            assert serving.server.stats().refused_for == {"untrusted": 1}
        async with server(Echo, proxy=Proxy([SOMEBODY], required=False), **mode) as serving:
            assert await in_thread(exchange, serving.address, v1()) == v1()
            assert serving.made[0].transport.get_extra_info("proxy") is None

    run(main())


@modes
def test_what_is_no_header(run: Run, mode: dict[str, Any]) -> None:
    async def main() -> None:
        async with server(Echo, proxy=Proxy(["127.0.0.1"], timeout=0.2), **mode) as serving:
            with connect(serving.address) as mute, connect(serving.address) as wrong:
                wrong.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert await in_thread(read_all, mute) == b""
                with contextlib.suppress(ConnectionError):
                    assert await in_thread(read_all, wrong) == b""
            assert serving.server.stats().refused_for == {"no PROXY header": 1, "invalid PROXY header": 1}
            assert serving.made == []

    run(main())


@modes
def test_who_has_spoken_waits_for_a_place(run: Run, mode: dict[str, Any]) -> None:
    async def main() -> None:
        async with server(Echo, first_bytes=LIMIT, max_connections=1, **mode) as serving:
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(connect(serving.address)) for _ in range(4)]
                await until(lambda: serving.server.stats().waiting == 4)
                for client in clients:
                    client.sendall(b"hello")
                for client in clients:
                    assert await in_thread(client.recv, 9) == b"hello"
                    assert serving.server.stats().active <= 4
                    client.close()
            await until(lambda: serving.server.stats().active == 0)
            assert len(serving.made) == 4

    run(main())
    assert run.reports == []


@modes
@pytest.mark.parametrize("drain", [None, 0.2])
def test_a_close_drops_who_waits_and_a_drain_at_its_end(
    run: Run, mode: dict[str, Any], drain: float | None
) -> None:
    async def main() -> None:
        async with server(Echo, first_bytes=LIMIT, proxy=Proxy([SOMEBODY], False), **mode) as serving:
            with connect(serving.address) as silent:
                await until(lambda: serving.server.stats().waiting == 1)
                serving.server.close(drain)
                assert await in_thread(read_all, silent) == b""
                stats = serving.server.stats()
                assert (stats.dropped, stats.active, stats.waiting) == (1, 0, 0)
            await serving.server.wait_closed()
            assert serving.server.stats().handled == 0

    run(main())


def test_a_close_serves_who_has_spoken(run: Run) -> None:
    async def main() -> None:
        async with server(Echo, first_bytes=LIMIT) as serving:
            with connect(serving.address) as client:
                await until(lambda: serving.server.stats().waiting == 1)
                client.sendall(b"spoken")  # and the loop has not yet looked
                serving.server.close()
                assert await in_thread(client.recv, 9) == b"spoken"
            await until(lambda: serving.server.stats().handled == 1)
            assert serving.server.stats().dropped == 0

    run(main())


@modes
def test_a_drain_lets_everybody_speak_who_is_here(run: Run, mode: dict[str, Any]) -> None:
    async def main() -> None:
        async with server(Echo, first_bytes=LIMIT, **mode) as serving:
            with connect(serving.address) as waiting:
                await until(lambda: serving.server.stats().waiting == 1)
                serving.server.pause()
                with connect(serving.address) as queued:
                    serving.server.close(drain=LIMIT)
                    for client in (queued, waiting):
                        client.sendall(b"heard")
                        assert await in_thread(client.recv, 9) == b"heard"
            await serving.server.wait_closed()
            stats = serving.server.stats()
            assert (stats.handled, stats.dropped) == (2, 0)

    run(main())


def test_a_pause_keeps_who_waits(run: Run) -> None:
    async def main() -> None:
        async with server(Echo, first_bytes=LIMIT) as serving:
            with connect(serving.address) as silent:
                await until(lambda: serving.server.stats().waiting == 1)
                serving.server.pause()
                silent.sendall(b"paused")
                await until(lambda: serving.server.stats().waiting == 0)
                await turns()
                assert serving.made == []
                serving.server.resume()
                assert await in_thread(silent.recv, 9) == b"paused"

    run(main())


@needs("the openssl command")
def test_before_tls(run: Run, pair: Pair) -> None:
    async def main() -> None:
        async with server(Echo, proxy=LOCAL, first_bytes=LIMIT, ssl=server_context(pair)) as serving:

            def ask() -> bytes:
                with connect(serving.address) as plain:
                    plain.sendall(v1())
                    with client_context(pair).wrap_socket(plain, server_hostname="localhost") as client:
                        client.sendall(b"secret")
                        answer = client.recv(9)
                        with contextlib.suppress(ssl.SSLError, OSError):
                            client.unwrap()
                        return answer

            assert await in_thread(ask) == b"secret"
            transport = serving.made[0].transport
            assert transport.get_extra_info("peername") == ("192.0.2.1", 1000)
            assert transport.get_extra_info("proxy").source == ("192.0.2.1", 1000)

    run(main())


def test_as_an_option_of_the_loop() -> None:
    async def main() -> Any:
        running = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
        async with running:
            address = running.sockets[0].getsockname()
            with connect(address) as silent:
                assert await in_thread(read_all, silent) == b""
            return running.stats()  # type: ignore[attr-defined]

    stats = aio.run(main(), loop_factory=aio.loop_factory(first_bytes=0.1, proxy=Proxy([SOMEBODY], False)))
    assert stats.refused_for == {"silent": 1}


def test_options_that_cannot_be_meant() -> None:
    for options, error in (({"first_bytes": 0}, ValueError), ({"proxy": "10.0.0.0/8"}, TypeError)):
        with pytest.raises(error, match="must be"):
            aio.loop_factory(**options)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_without_a_poller(faults: Faults, mode: dict[str, Any]) -> None:
    program = f"""
import asyncio
from fastlisten import aio
from helpers import LIMIT, connect, read_all
from helpers.aio import Echo, in_thread, server
from helpers.faults import FASTLISTENS, change_plan, given, meant_for
async def main():
    meant_for(FASTLISTENS)
    change_plan(poller=[("EMFILE", 9)])
    async with server(Echo, first_bytes=LIMIT, **{mode!r}) as serving:
        with connect(serving.address) as silent:
            while serving.server.stats().waiting != 1:
                await asyncio.sleep(0)
            silent.sendall(b"late")
            assert await in_thread(silent.recv, 9) == b"late"
    async with server(Echo, first_bytes=0.1, **{mode!r}) as serving:
        with connect(serving.address) as silent:
            assert await in_thread(read_all, silent) == b""
    assert given("poller") == 4
aio.run(main())
print("true")
"""
    assert faults.python(program) is True
