"""fastlisten.aio: admission=, who may come in, before there is a protocol for him."""

import asyncio
import contextlib
import logging
import re
import ssl
from typing import Any

import pytest

from fastlisten import Admission, Proxy, aio
from helpers import CLOSED, LIMIT, connect, exchange, needs, read_all, refusal
from helpers.aio import Echo, Run, in_thread, run, server
from helpers.certificates import Pair, client_context, server_context
from helpers.proxy_headers import inet, v2

__all__ = ["run"]  # a fixture

LOCAL = Proxy(["127.0.0.1", "::1"], timeout=LIMIT)
MODES: dict[str, dict[str, Any]] = {
    "": {},
    "reset": {"busy": "reset", "pending": 10},
    "bytes": {"busy": b"no", "pending": 10},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def answered(target: Any, header: bytes = b"") -> bool:
    try:
        return exchange(target, header + b"ping") == b"ping"
    except OSError:
        return False


@modes
def test_who_is_denied_has_no_protocol(run: Run, mode: dict[str, Any]) -> None:
    async def main() -> None:
        async with server(Echo, admission=Admission(deny=["127.0.0.1"]), **mode) as serving:
            for _ in range(3):
                assert await in_thread(refusal, serving.address) == mode.get("busy", CLOSED)
            await until(lambda: serving.server.stats().refused == 3)
            assert serving.server.stats().refused_for == {"denied": 3}
            assert serving.made == []

    run(main())
    assert run.reports == []


@modes
def test_a_source_s_connections_at_a_time(run: Run, mode: dict[str, Any]) -> None:
    admission = Admission(concurrent=2)

    async def main() -> None:
        async with server(Echo, admission=admission, **mode) as serving:
            with contextlib.ExitStack() as clients:
                inside = [clients.enter_context(connect(serving.address)) for _ in range(2)]
                await until(lambda: len(serving.made) == 2)
                assert await in_thread(refusal, serving.address) == mode.get("busy", CLOSED)
                inside[0].close()
                await until(lambda: admission.stats().open == 1)
                assert await in_thread(answered, serving.address)
                await until(lambda: admission.stats().open == 1)
            await until(lambda: serving.server.stats().active == 0)
            assert admission.stats().open == 0
            assert serving.server.stats().refused_for == {"concurrent": 1}

    run(main())


def test_who_a_transport_s_client_is(run: Run) -> None:
    async def main() -> None:
        async with server(Echo, admission=Admission(concurrent=2)) as serving:
            with connect(serving.address) as client:
                transport = (await serving.first()).transport
                assert transport.get_extra_info("peername") == client.getsockname()
                assert transport.get_extra_info("proxy", "none") == "none"

    run(main())


@modes
def test_behind_a_proxy_the_client_is_asked_about(run: Run, mode: dict[str, Any]) -> None:
    admission = Admission(deny=["127.0.0.1", "192.0.2.9"], rate=0.001, burst=2, concurrent=5)

    async def main() -> None:
        async with server(Echo, proxy=LOCAL, admission=admission, **mode) as serving:
            for client, expected in [("192.0.2.1", [True, True, False]), ("192.0.2.9", [False])]:
                for one in expected:
                    assert await in_thread(answered, serving.address, v2(inet(client))) == one
            await until(lambda: serving.server.stats().active == 0)
            assert serving.server.stats().refused_for == {"denied": 1, "rate": 1}
            assert admission.stats().open == 0

    run(main())


def test_who_waits_for_his_first_bytes_counts(run: Run) -> None:
    admission = Admission(concurrent=1)

    async def main() -> None:
        async with server(Echo, first_bytes=LIMIT, admission=admission) as serving:
            with connect(serving.address) as silent:
                await until(lambda: serving.server.stats().waiting == 1)
                assert await in_thread(refusal, serving.address) == CLOSED
                silent.sendall(b"now")
                assert await in_thread(silent.recv, 3) == b"now"
                assert admission.stats().open == 1
            await until(lambda: admission.stats().open == 0)
            with connect(serving.address):
                await until(lambda: serving.server.stats().waiting == 1)
        assert admission.stats().open == 0  # dropped at the end

    run(main())


def test_over_tls(run: Run, pair: Pair) -> None:
    admission = Admission(concurrent=1)

    def talk(address: Any) -> bytes:
        with (
            connect(address) as plain,
            client_context(pair).wrap_socket(plain, server_hostname="localhost") as client,
        ):
            client.sendall(b"in")
            with pytest.raises((ssl.SSLError, OSError)), connect(address) as second:
                client_context(pair).wrap_socket(second, server_hostname="localhost")
            return client.recv(2)

    async def main() -> None:
        async with server(Echo, ssl=server_context(pair), admission=admission) as serving:
            for _ in range(2):
                assert await in_thread(talk, serving.address) == b"in"
                await until(lambda: admission.stats().open == 0)

    run(main())


def test_for_a_framework_that_knows_nothing_of_it() -> None:
    """By the options of an event loop, as uvicorn's `--loop` takes it."""
    admission = Admission(concurrent=1)

    async def main() -> None:
        made = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
        async with made:
            address = made.sockets[0].getsockname()
            with connect(address) as client:
                await in_thread(client.sendall, b"in")
                assert await in_thread(client.recv, 2) == b"in"
                assert await in_thread(refusal, address) == CLOSED
            await until(lambda: admission.stats().open == 0)
            assert await in_thread(exchange, address) == b"ping"

    aio.run(main(), loop_factory=aio.loop_factory(admission=admission))


@pytest.mark.parametrize("limits", [{}, {"busy": "reset"}], ids=["plain", "busy"])
def test_the_log_gets_one_line_a_minute_and_the_rest_at_the_end(
    run: Run, limits: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastlisten")

    async def main() -> None:
        async with server(Echo, admission=Admission(deny=["127.0.0.1"]), **limits) as serving:
            for _ in range(10):
                await in_thread(refusal, serving.address)
            await until(lambda: serving.server.stats().refused == 10)
            await until(lambda: caplog.records)

    run(main())
    first, rest = caplog.messages
    assert first.startswith("refused: denied ")
    assert re.match(r"refused in \d+\.\d s: denied ", rest)
    counts = [int(number) for number in re.findall(r"; most from 127.0.0.1 \((\d+)\)", first + rest)]
    assert sum(counts) == 10


@needs("Linux")
def test_a_unix_user(run: Run, unix_path: str) -> None:
    async def main() -> None:
        for admission, expected in [(Admission(deny=["unix:"]), b""), (Admission(allow=["unix:"]), b"ping")]:
            made = await aio.create_unix_server(asyncio.Protocol, unix_path, admission=admission)
            async with made:
                with connect(unix_path) as client:
                    if expected:
                        await until(lambda: made.stats().active == 1)  # noqa: B023
                    else:
                        assert await in_thread(read_all, client) == b""

    run(main())
