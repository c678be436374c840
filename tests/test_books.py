"""The counters of stats() agree at every moment, and at the end with what the clients saw.

`active` is what the other counters leave, so that the sum alone would prove little: a thread that reads all
the time also holds them against the clients, who know how many of them have come.
"""

import asyncio
import collections
import contextlib
import itertools
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import fastlisten
from fastlisten import Admission, Listener, aio, bind, socketserver
from helpers import LIMIT, LOOPBACK, connect, posix_only, read_all, reset, serving, wait_until
from helpers.internals import is_served
from helpers.serve import answer

# Wine tells a client of a reset as of an end, and accept() there gives out nobody who has reset.
pytestmark = posix_only("what clients of Wine are told is not what they can be held against")

BUSY = b"no place"
GROW = ("accepted", "handled", "handler_errors", "refused", "dropped")


class Clients:
    """Clients who come in some threads, and what they were told."""

    def __init__(self) -> None:
        self.come = 0
        self.told: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()

    def one(self, address: Any, act: str) -> None:
        with self.lock:
            self.come += 1
        with connect(address) as client:
            if act == "reset":
                reset(client)
                told = "reset it"
            elif act == "leave":
                told = "left"
            else:
                told = self.ask(client)
        with self.lock:
            self.told[told] += 1

    def ask(self, client: socket.socket) -> str:
        try:
            client.sendall(b"ask")
            found = read_all(client)
        except (ConnectionError, TimeoutError) as error:
            return type(error).__name__
        return {b"ask": "answered", BUSY: "refused", b"": "closed"}[found]

    def crowd(self, addresses: list[Any], number: int, acts: list[str]) -> None:
        """Have so many come in each of four threads, each act in turn."""

        def some(first: int) -> None:
            for n in range(number):
                self.one(addresses[n % len(addresses)], acts[(first + n) % len(acts)])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(some, range(4)))


@contextlib.contextmanager
def watched(clients: Clients, *readers: Callable[[], Any]) -> Iterator[None]:
    """Read the stats of each of `readers` in a thread, all the time and once after all, and check them."""
    over = threading.Event()

    def watch() -> int:
        last = [dict.fromkeys(GROW, 0) for _ in readers]
        for reads in itertools.count():
            ends = over.is_set()
            accepted = 0
            for before, stats in zip(last, readers, strict=True):
                now = stats()
                assert now.accepted == now.handled + now.active + now.refused + now.dropped, now
                assert now.active >= 0, now
                for name in GROW:
                    assert getattr(now, name) >= before[name], (name, before, now)
                    before[name] = getattr(now, name)
                accepted += now.accepted
            assert accepted <= clients.come
            if ends:
                return reads
        raise AssertionError("not reached")

    usual = sys.getswitchinterval()
    with ThreadPoolExecutor(1) as pool:
        # It never waits, so that whoever wants the GIL waits this long for it, each time.
        sys.setswitchinterval(1e-4)
        watching = pool.submit(watch)
        try:
            yield
        finally:
            over.set()
            sys.setswitchinterval(usual)
        assert watching.result()


def agree(clients: Clients, *all_stats: Any) -> collections.Counter[str]:
    """Check the totals against the clients, when all is over, and return the totals."""
    totals: collections.Counter[str] = collections.Counter()
    for stats in all_stats:
        assert stats.active == 0
        totals.update({name: getattr(stats, name) for name in GROW})
    told = clients.told
    assert sum(told.values()) == clients.come
    # Nobody can tell what became of those who did not wait for it.
    gone = told["left"] + told["reset it"]
    assert told["TimeoutError"] == 0, told
    assert totals["accepted"] == clients.come
    assert told["refused"] <= totals["refused"] <= told["refused"] + told["ConnectionResetError"] + gone
    assert told["answered"] <= totals["handled"]
    assert totals["dropped"] <= told["closed"] + told["ConnectionResetError"] + told["BrokenPipeError"] + gone
    if not gone:
        assert told["refused"] == totals["refused"]
        assert told["answered"] == totals["handled"]
    return totals


MIXED = ["ask", "ask", "reset", "ask", "leave"]
ACTS = pytest.mark.parametrize("acts", [["ask"], MIXED], ids=["ask", "mixed"])


def lenient(connection: Any) -> None:
    """Answer; a client that has left is none of these tests' business."""
    with contextlib.suppress(ConnectionError):
        answer(connection)


def raises(connection: Any) -> None:
    """Answer, and fail."""
    lenient(connection)
    raise ValueError


# --- serve()

MODES: dict[str, dict[str, Any]] = {
    "inline": {},
    "inline limit": {"max_connections": 1},
    "threads": {"threads": 3},
    "range": {"threads": (1, 4)},
    "limit": {"threads": (1, 4), "max_connections": 2},
    "busy": {"busy": BUSY, "pending": 1},
    "busy without a place": {"busy": BUSY, "pending": 0},
    "busy threads": {"threads": 2, "busy": BUSY, "pending": 1},
    "busy range": {"threads": (1, 2), "busy": BUSY, "pending": 1},
    "busy limit": {"threads": 3, "max_connections": 1, "busy": BUSY, "pending": 1},
    "shed": {"exhausted": "shed"},
    "first bytes": {"first_bytes": LIMIT},
    "first bytes threads": {"first_bytes": LIMIT, "threads": (1, 4), "max_connections": 2},
    "first bytes busy": {"first_bytes": LIMIT, "threads": 2, "busy": BUSY, "pending": 1},
    "admission": {"threads": (1, 4), "admission": Admission(concurrent=100)},
    "admission busy": {"threads": 2, "busy": BUSY, "pending": 1, "admission": Admission(concurrent=2)},
    "all": {"first_bytes": LIMIT, "busy": BUSY, "pending": 9, "admission": Admission(concurrent=3)},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def assert_nobody_counts(mode: dict[str, Any]) -> None:
    """Check that admission has let everybody go, too."""
    if "admission" in mode:
        assert mode["admission"].stats().open == 0


class ServedAgain:
    """serve() in a thread, again after each stop, until end(); counts the stops that were answered."""

    def __init__(self, serve: Callable[[], Any], listener: Listener) -> None:
        self.serve, self.listener = serve, listener
        self.over = threading.Event()
        self.results: list[Any] = []
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while not self.over.is_set():
            self.results.append(self.serve())

    def end(self) -> None:
        """End, with all who are queued handled or refused."""
        self.over.set()
        self.listener.stop(drain=LIMIT)
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def served(serve: Callable[[], Any], listener: Listener) -> Iterator[ServedAgain]:
    """Serve again and again, until the end of the block."""
    again = ServedAgain(serve, listener)
    try:
        yield again
    finally:
        again.end()


def disturb(listener: Listener, again: ServedAgain, how: list[Callable[[], Any]]) -> Callable[[], None]:
    """Return a function that does these one after another, each when a serve() runs, a few times over."""

    def run() -> None:
        for act in how * 8:
            wait_until(lambda: is_served(listener) or again.over.is_set())
            act()

    return run


@ACTS
@modes
def test_serve(mode: dict[str, Any], acts: list[str], listener: Listener) -> None:
    clients = Clients()
    handler = raises if acts == MIXED else lenient
    with (
        watched(clients, listener.stats),
        served(lambda: listener.serve(handler, on_error=lambda *_: None, **mode), listener),
    ):
        clients.crowd([listener], 60, acts)
    totals = agree(clients, listener.stats())
    unseen = clients.told["left"] + clients.told["reset it"]  # before they sent anything, at the end
    assert totals["dropped"] <= (unseen if "first_bytes" in mode else 0)
    assert_nobody_counts(mode)
    assert totals["handler_errors"] == (totals["handled"] if acts == MIXED else 0)


@pytest.mark.parametrize("drain", [0, 0.05])
@pytest.mark.parametrize("mode", [{}, {"threads": 1}, {"threads": 3, "max_connections": 1}], ids=str)
def test_who_waits_for_a_handler_when_connections_are_cut_is_dropped(
    mode: dict[str, Any], drain: float, listener: Listener
) -> None:
    """He was counted as handled when he was closed in a handler's place."""
    handled = threading.Event()

    def handler(connection: Any) -> None:
        handled.set()
        connection.recv(1)

    with contextlib.ExitStack() as clients:
        with serving(listener, handler, busy="reset", pending=3, **mode) as served:
            for _ in range(3):
                clients.enter_context(connect(listener))
            assert handled.wait(LIMIT)
            wait_until(lambda: listener.stats().accepted == 3)
            listener.stop(drain)
            assert served.wait() == (0, 3)
        stats = listener.stats()
        assert (stats.handled, stats.active, stats.refused, stats.dropped) == (1, 0, 0, 2)


@modes
@pytest.mark.parametrize("how", ["pause", "stop", "drain", "cut"])
def test_serve_that_is_disturbed(how: str, mode: dict[str, Any], listener: Listener) -> None:
    """Pauses, stops and drains while clients come; who is queued then is served by the next serve()."""
    clients = Clients()
    acts: dict[str, list[Callable[[], Any]]] = {
        "pause": [listener.pause, listener.resume],
        "stop": [listener.stop],
        "drain": [lambda: listener.stop(drain=LIMIT)],
        "cut": [lambda: listener.stop(drain=0)],
    }
    with (
        watched(clients, listener.stats),
        served(lambda: listener.serve(lenient, **mode), listener) as again,
        ThreadPoolExecutor(1) as pool,
    ):
        disturbing = pool.submit(disturb(listener, again, acts[how]))
        clients.crowd([listener], 60, ["ask"])
        disturbing.result()
    stats = listener.stats()
    assert stats.active == 0
    assert_nobody_counts(mode)
    told = clients.told
    assert sum(told.values()) == stats.accepted == clients.come
    assert told["refused"] == stats.refused
    # who was cut or dropped got an end, or a reset when he had been heard
    lost = told["closed"] + told["ConnectionResetError"] + told["BrokenPipeError"]
    assert told["answered"] + lost == stats.handled + stats.dropped
    assert stats.dropped <= lost
    cut = sum(result.cut for result in again.results)
    if how != "pause" and "first_bytes" in mode:
        # who had sent nothing yet was dropped
        assert lost <= cut + stats.dropped if how == "cut" else cut <= stats.dropped == lost
    elif how == "cut":
        assert lost <= cut
    elif "busy" not in mode or how == "pause":
        assert (lost, cut, stats.dropped) == (0, 0, 0)
    else:
        assert lost == cut == stats.dropped  # who waited in our queue when it was stopped


@pytest.mark.parametrize("options", [{}, {"threads": 3}, {"busy": BUSY, "pending": 1}], ids=str)
def test_two_listeners_of_one_serve(options: dict[str, Any], listener: Listener) -> None:
    clients = Clients()
    with bind(LOOPBACK) as other:
        with (
            watched(clients, listener.stats, other.stats),
            served(lambda: fastlisten.serve(lenient, listener, other, **options), listener),
        ):
            clients.crowd([listener, other], 60, ["ask"])
        agree(clients, listener.stats(), other.stats())


# --- whoever accepts by himself


def iterates(listener: Listener) -> None:
    for connection in listener:
        with connection:
            lenient(connection)


def accepts_many(listener: Listener) -> None:
    for connection in listener.accept_many(8):
        with connection:
            lenient(connection)


def accepts(listener: Listener) -> None:
    connection, _ = listener.accept()
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(connection.recv(100))


async def awaited(loop: asyncio.AbstractEventLoop, connection: Any) -> None:
    with connection, contextlib.suppress(ConnectionError):
        await loop.sock_sendall(connection, await loop.sock_recv(connection, 100))


async def iterates_async(listener: Listener, tasks: asyncio.TaskGroup) -> None:
    async for connection in listener:
        tasks.create_task(awaited(asyncio.get_running_loop(), connection))


async def accepts_async(listener: Listener, tasks: asyncio.TaskGroup) -> None:
    while True:
        connection, _ = await listener.accept_async()
        tasks.create_task(awaited(asyncio.get_running_loop(), connection))


@contextlib.contextmanager
def in_loop(listener: Listener, accept: Any) -> Iterator[None]:
    """Run a coroutine on a loop in another thread until the end of the block, and its tasks to their ends."""
    started = threading.Event()
    at_work: list[Any] = []

    async def main() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            async with asyncio.timeout(3 * LIMIT), asyncio.TaskGroup() as tasks:
                accepting = tasks.create_task(accept(listener, tasks))
                at_work.extend((asyncio.get_running_loop(), accepting))
                started.set()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asyncio.run, main())
        assert started.wait(LIMIT)
        try:
            yield
        finally:
            wait_until(lambda: not listener.stats().active)
            loop, accepting = at_work
            loop.call_soon_threadsafe(accepting.cancel)
        running.result(LIMIT)


@contextlib.contextmanager
def in_turns(listener: Listener, accept: Callable[[Listener], None]) -> Iterator[None]:
    """Accept in a thread, again and again until the end of the block."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                accept(listener)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            yield
        finally:
            over.set()
            listener.stop()
        running.result(LIMIT)


@ACTS
@pytest.mark.parametrize("accept", [iterates, accepts_many, accepts], ids=lambda f: f.__name__)
def test_whoever_takes_them(accept: Any, acts: list[str], listener: Listener) -> None:
    listener.settimeout(0.05)
    clients = Clients()
    with watched(clients, listener.stats), in_turns(listener, accept):
        clients.crowd([listener], 60, acts)
        wait_until(lambda: listener.stats().accepted == clients.come)
    agree(clients, listener.stats())


@ACTS
@pytest.mark.parametrize("accept", [iterates_async, accepts_async], ids=lambda f: f.__name__)
def test_whoever_awaits_them(accept: Any, acts: list[str], listener: Listener) -> None:
    clients = Clients()
    with watched(clients, listener.stats), in_loop(listener, accept):
        clients.crowd([listener], 60, acts)
        wait_until(lambda: listener.stats().accepted == clients.come)
    agree(clients, listener.stats())


# --- asyncio's servers

LIMITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "limit": {"max_connections": 2},
    "busy": {"busy": BUSY, "pending": 2},
    "busy limit": {"busy": BUSY, "pending": 1, "max_connections": 2},
}


class Answer(asyncio.Protocol):
    """Sends back what comes first, and hangs up."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        self.transport.close()


@ACTS
@pytest.mark.parametrize("disturbed", [False, True], ids=["", "paused"])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_an_asyncio_server(limits: dict[str, Any], disturbed: bool, acts: list[str]) -> None:
    clients = Clients()

    async def pauses(server: aio.Server, over: asyncio.Event) -> None:
        while not over.is_set():
            server.pause()
            await asyncio.sleep(0)
            server.resume()
            for _ in range(20):
                await asyncio.sleep(0)

    async def main() -> Any:
        server = await aio.create_server(Answer, *LOOPBACK, **limits)
        address = server.sockets[0].getsockname()
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        with watched(clients, server.stats):
            async with asyncio.timeout(3 * LIMIT), asyncio.TaskGroup() as tasks:
                if disturbed:
                    tasks.create_task(pauses(server, over))
                await loop.run_in_executor(None, clients.crowd, [address], 60, acts)
                over.set()
            async with asyncio.timeout(LIMIT):
                while server.stats().accepted < clients.come or server.stats().active:
                    await asyncio.sleep(0)
            server.close()
            await server.wait_closed()
        return server.stats()

    totals = agree(clients, asyncio.run(main()))
    assert totals["dropped"] == 0
    if "busy" not in limits:
        assert totals["refused"] == 0


@pytest.mark.parametrize("drain", [None, LIMIT], ids=["", "drain"])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_an_asyncio_server_that_is_closed_under_load(limits: dict[str, Any], drain: float | None) -> None:
    """Who is connected then ends well; who waits in our queue is dropped, in a drain served; who is in the
    kernel's is reset, unless he was there when a drain began."""
    clients = Clients()
    listener = bind(LOOPBACK)

    def come(address: Any) -> None:
        with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
            clients.crowd([address], 1000, ["ask"])

    async def main() -> None:
        server = await aio.create_server(Answer, sock=listener, **limits)
        loop, address = asyncio.get_running_loop(), server.sockets[0].getsockname()
        with watched(
            clients,
            server.stats,
        ):
            coming = loop.run_in_executor(None, come, address)
            async with asyncio.timeout(LIMIT):
                while server.stats().handled < 100:
                    await asyncio.sleep(0)
            server.close(drain)
            await server.wait_closed()
            await coming
            async with asyncio.timeout(LIMIT):
                while server.stats().active:
                    await asyncio.sleep(0)

    asyncio.run(main())
    stats, told = listener.stats(), clients.told
    assert (stats.active, told["TimeoutError"]) == (0, 0)
    assert told["refused"] == stats.refused
    assert told["answered"] == stats.handled
    assert stats.dropped <= told["closed"] + told["ConnectionResetError"] + told["BrokenPipeError"]
    if drain is not None:
        assert stats.dropped == 0


# --- the drop-in servers


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            self.request.sendall(self.request.recv(100))


@ACTS
@pytest.mark.parametrize("kind", [socketserver.TCPServer, socketserver.ThreadingTCPServer])
def test_a_dropin_server(kind: Any, acts: list[str]) -> None:
    clients = Clients()
    with kind(LOOPBACK, Handler) as server:
        listener = server.socket
        with watched(clients, listener.stats), ThreadPoolExecutor(1) as pool:
            serving = pool.submit(server.serve_forever)
            try:
                clients.crowd([server.server_address], 60, acts)
                wait_until(lambda: listener.stats().accepted == clients.come and not listener.stats().active)
            finally:
                server.shutdown()
            serving.result(LIMIT)
        agree(clients, listener.stats())


@pytest.mark.parametrize("kind", [socketserver.TCPServer, socketserver.ThreadingTCPServer])
def test_a_dropin_server_that_is_shut_down_under_load(kind: Any) -> None:
    """serve_forever() again after each shutdown(): who came in between was in the kernel's queue."""
    clients = Clients()
    over = threading.Event()

    def again(server: Any) -> None:
        while not over.is_set():
            server.serve_forever()

    with kind(LOOPBACK, Handler) as server:
        listener = server.socket
        with watched(clients, listener.stats), ThreadPoolExecutor(2) as pool:
            serving = pool.submit(again, server)
            try:
                coming = pool.submit(clients.crowd, [server.server_address], 60, ["ask"])
                for _ in range(10):
                    wait_until(lambda: is_served(listener))
                    server.shutdown()
                coming.result(3 * LIMIT)
                wait_until(lambda: is_served(listener) and not listener.stats().active)
            finally:  # or the thread that serves would be waited for without an end
                over.set()
                listener.stop()
            serving.result(LIMIT)
        agree(clients, listener.stats())
