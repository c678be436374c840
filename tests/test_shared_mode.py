"""A description that is shared is made blocking by another process: whoever accepts can still be told to end.

accept() then sleeps until a client comes, where it was to say that nobody is there; fcntl(2), F_SETFL.
"""

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

from fastlisten import Listener, aio, bind, socketserver
from helpers import LIMIT, LOOPBACK, connect, echo, exchange, needs, read_all, serving, wait_until
from helpers.internals import is_served
from helpers.programs import line_of, running
from helpers.serve import MODES, modes

pytestmark = needs("Linux")
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # 3.12: beside threads

# It takes milliseconds; a machine may be busy.
SOON = 3.0

# Has descriptor argv[1], and makes its description blocking: again and again, or once for each line it reads.
OTHER = """
import select, socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
print("ready", flush=True)
if sys.argv[2] == "always":
    while not select.select([sys.stdin], [], [], 0.0002)[0]:
        listener.setblocking(True)
for _ in sys.stdin:
    listener.setblocking(True)
    print("done", flush=True)
"""


@contextlib.contextmanager
def another(listener: Any, when: str) -> Iterator[Any]:
    """Run another process that makes the listener blocking."""
    fd = listener.fileno()
    with running(OTHER, str(fd), when, pass_fds=[fd]) as process:
        assert line_of(process) == "ready"
        yield process


@pytest.fixture
def flipped(listener: Listener) -> Iterator[Listener]:
    """Give a Listener that another process makes blocking all the time."""
    with another(listener, "always"):
        yield listener


def sleeps_in_accept(process: str = "self") -> bool:
    """Tell whether a thread sleeps in accept(); proc_pid_wchan(5)."""
    for thread in os.listdir(f"/proc/{process}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{process}/task/{thread}/wchan") as function:
            if "accept" in function.read():
                return True
    return False


def wait_until_it_sleeps(target: Any, process: str = "self") -> None:
    """Be served until whoever accepts sleeps in accept(): it asks poll() first now and then."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        assert exchange(target) == b"ping"
        with contextlib.suppress(AssertionError):
            wait_until(lambda: sleeps_in_accept(process), 0.05)
            return
    raise AssertionError("nobody sleeps in accept()")


@pytest.mark.parametrize("drain", [None, 0, 5])
@modes
def test_stop(mode: dict[str, Any], drain: float | None, flipped: Listener) -> None:
    with serving(flipped, echo, **mode) as served:
        wait_until_it_sleeps(flipped)
        flipped.stop(drain)
        served.wait(SOON)


@modes
def test_close(mode: dict[str, Any], flipped: Listener) -> None:
    with serving(flipped, echo, **mode) as served:
        wait_until_it_sleeps(flipped)
        closing = threading.Thread(target=flipped.close)
        closing.start()
        closing.join(SOON)
        assert not closing.is_alive()
        served.wait(SOON)


@modes
def test_pause(mode: dict[str, Any], flipped: Listener) -> None:
    with serving(flipped, echo, **mode):
        wait_until_it_sleeps(flipped)
        flipped.pause()
        before = flipped.stats().accepted
        wait_until(lambda: not sleeps_in_accept())
        with connect(flipped) as client:
            client.sendall(b"later")
            client.shutdown(socket.SHUT_WR)
            wait_until(lambda: flipped.stats().queue_depth == 1)
            assert flipped.stats().accepted == before
            flipped.resume()
            assert read_all(client) == b"later"


@modes
def test_a_client_that_is_accepted_meanwhile_is_handled(mode: dict[str, Any], flipped: Listener) -> None:
    """The interrupted accept loses nobody."""
    for number in range(20):
        with serving(flipped, echo, **mode) as served, connect(flipped) as client:
            wait_until(lambda: is_served(flipped))
            flipped.stop(drain=LIMIT)
            client.shutdown(socket.SHUT_WR)
            served.wait(LIMIT)
            assert read_all(client) == b""
            assert flipped.stats().accepted == number + 1
    assert flipped.stats().dropped == 0


def test_an_iteration(flipped: Listener) -> None:
    def run() -> None:
        for connection in flipped:
            with connection:
                echo(connection)

    iterating = threading.Thread(target=run)
    iterating.start()
    wait_until_it_sleeps(flipped)
    flipped.stop()
    iterating.join(SOON)
    assert not iterating.is_alive()


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        echo(self.request)


@pytest.mark.parametrize("end", ["shutdown", "server_close"])
@pytest.mark.parametrize("kind", [socketserver.TCPServer, socketserver.ThreadingTCPServer])
def test_a_dropin_server(kind: Any, end: str) -> None:
    with kind(LOOPBACK, Handler) as server, another(server.socket, "always"):
        serve = threading.Thread(target=server.serve_forever)
        serve.start()
        wait_until_it_sleeps(server.server_address)
        began = time.monotonic()
        getattr(server, end)()
        serve.join(SOON)
        assert not serve.is_alive()
        assert time.monotonic() - began < SOON


SERVES = """
import json, signal, sys, fastlisten
from helpers import echo
listener = fastlisten.Listener(fileno=int(sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: listener.stop())
try:
    listener.serve(echo, **eval(sys.argv[2]))
except KeyboardInterrupt:
    print("KeyboardInterrupt", flush=True)
else:
    print("stopped", flush=True)
listener.detach()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@modes
def test_a_signal(mode: dict[str, Any], number: int, flipped: Listener) -> None:
    """Ctrl-C, and a handler that calls stop()."""
    fd = flipped.fileno()
    with running(SERVES, str(fd), repr(mode), pass_fds=[fd]) as process:
        wait_until_it_sleeps(flipped, str(process.pid))
        process.send_signal(number)
        assert process.wait(SOON) == 0
        assert line_of(process) == ("KeyboardInterrupt" if number == signal.SIGINT else "stopped")


@FORKS
def test_a_fork_waits_for_nobody(flipped: Listener) -> None:
    """Whoever sleeps in accept() has no client."""
    with serving(flipped, echo, threads=2):
        for _ in range(10):
            wait_until_it_sleeps(flipped)
            began = time.monotonic()
            if (child := os.fork()) == 0:
                os._exit(0)
            took = time.monotonic() - began
            os.waitpid(child, 0)
            assert took < SOON


# --- event loops


class Echo(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def eof_received(self) -> None:
        self.transport.close()


def flip(process: Any) -> None:
    process.stdin.write("\n")
    process.stdin.flush()
    assert line_of(process) == "done"


@pytest.mark.parametrize("limits", [{}, {"busy": "reset", "pending": 5}], ids=["plain", "busy"])
def test_an_asyncio_server(limits: dict[str, Any]) -> None:
    """The loop never sleeps in accept(), and close() ends the thread that refuses."""

    async def main() -> None:
        server = await aio.create_server(Echo, *LOOPBACK, **limits)
        address = server.sockets[0].getsockname()
        with another(server.sockets[0], "always" if limits else "once") as process:
            for _ in range(5):
                if not limits:
                    flip(process)
                async with asyncio.timeout(LIMIT):
                    assert await asyncio.to_thread(exchange, address) == b"ping"
                    await asyncio.sleep(0)  # the loop has looked for one more
            if limits:
                await asyncio.to_thread(wait_until_it_sleeps, address)
            began = time.monotonic()
            server.close()
            await server.wait_closed()
            assert time.monotonic() - began < SOON

    asyncio.run(main())


@pytest.mark.parametrize("how", ["accept_async", "async for"])
def test_who_awaits_clients(how: str, listener: Listener) -> None:
    async def iterate() -> None:
        async for connection in listener:
            with connection:
                await answer(connection)

    async def accept() -> None:
        while True:
            connection, _ = await listener.accept_async()
            with connection:
                await answer(connection)

    async def answer(connection: Any) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(connection, 100):
            await loop.sock_sendall(connection, data)

    async def main() -> None:
        awaiting = asyncio.create_task(iterate() if how == "async for" else accept())
        with another(listener, "once") as process:
            for _ in range(5):
                flip(process)
                async with asyncio.timeout(LIMIT):
                    assert await asyncio.to_thread(exchange, listener) == b"ping"
            flip(process)
            async with asyncio.timeout(SOON):
                if how == "async for":
                    listener.stop()
                else:
                    awaiting.cancel()
                await asyncio.wait([awaiting])

    asyncio.run(main())


# --- what we do to a description that others share


def blocking(listener: socket.socket) -> bool:
    return os.get_blocking(listener.fileno())


def detached(listener: Listener) -> None:
    os.close(listener.detach())


def sent(listener: Listener) -> None:
    """As to another process."""
    pickle.loads(ForkingPickler.dumps(listener)).close()
    resource_sharer.stop(timeout=LIMIT)


@pytest.mark.parametrize("act", [detached, sent])
def test_a_listener_that_never_served_leaves_the_mode_alone(
    act: Callable[[Listener], None], listener: Listener
) -> None:
    """As the standard library's socket does: another process may serve the same description."""
    with listener.dup() as twin:
        assert isinstance(twin, Listener)
        os.set_blocking(listener.fileno(), False)  # as another's serve() does
        act(twin)
        assert not blocking(listener)


def test_who_served_restores_the_mode(listener: Listener) -> None:
    """What was given away behaves as its timeout says."""
    with bind(LOOPBACK) as served:
        with serving(served, echo):
            assert exchange(served) == b"ping"
        assert not blocking(served)
        with socket.socket(fileno=served.detach()) as sock:
            assert blocking(sock)


@needs("fork")
@FORKS
def test_a_child_that_detaches_leaves_its_parent_s_loop_alone(listener: Listener) -> None:
    with serving(listener, echo, **MODES["threads"]):
        assert exchange(listener) == b"ping"
        if (child := os.fork()) == 0:
            os.close(listener.detach())
            os._exit(0)
        os.waitpid(child, 0)
        assert not blocking(listener)
