"""A model of a Listener and of an asyncio server: who is owed what, whatever is done with them.

Random serve, stop, pause, resume, fork, close, dup, settimeout and clients.
The model knows each client and where it is: in the kernel's queue, in ours (`pending`), or with a handler,
which it keeps until it speaks.  After each step the counters and what the clients see have to agree with it.
"""

import asyncio
import contextlib
import functools
import itertools
import os
import select
import signal
import socket
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import fastlisten
from fastlisten import aio
from helpers import LIMIT, Serving, connect, posix_only, reset, told, wait_until
from helpers.fuzzing import Fuzz
from helpers.internals import is_served

# How to serve, how many handlers there are then, and how many may wait for one in our queue.
MODES: list[tuple[dict[str, Any], int, int | None]] = [
    ({}, 1, None),
    ({"threads": 1}, 1, None),
    ({"threads": 3}, 3, None),
    ({"threads": (1, 4)}, 4, None),
    ({"max_connections": 1}, 1, None),
    ({"threads": 2, "max_connections": 1}, 1, None),
    ({"exhausted": "shed"}, 1, None),
    ({"busy": "reset", "pending": 2}, 1, 2),
    ({"busy": b"full", "pending": 1, "threads": 2}, 2, 1),
    ({"busy": b"full", "pending": 3, "threads": 3, "max_connections": 1}, 1, 3),
]
Wait = Callable[[Callable[[], Any]], Any]
# Fewer than any listener's queue holds, and enough for each mode to be full.
CROWD = 12


def answer(connection: Any) -> None:
    """Answer the one message of a client; one that hangs up first is no news."""
    connection.settimeout(LIMIT)
    with contextlib.suppress(ConnectionError):
        connection.sendall(connection.recv(100))


class Client:
    """A client: its text, whether it has said it, and whether it has left."""

    numbers = itertools.count()

    def __init__(self, listener: Any) -> None:
        self.text = b"%d" % next(self.numbers)
        self.sock = connect(listener)
        self.spoken = self.gone = False

    @property
    def done(self) -> bool:
        """Whether a handler is through with it at once."""
        return self.spoken or self.gone

    def speak(self) -> None:
        if not self.done:
            with contextlib.suppress(ConnectionError):  # it was refused meanwhile, and will be told
                self.sock.sendall(self.text)
            self.spoken = True

    def leave(self, rst: bool) -> None:
        if rst and self.sock.family != socket.AF_UNIX:
            reset(self.sock)
        else:
            self.sock.close()
        self.gone = True

    def gets(self, expected: bytes, wait: Wait) -> None:
        """Assert that it is told this and then the end; b"" is a reset, too."""
        if self.gone:
            return
        found = b""

        def ended() -> bool:
            nonlocal found
            try:
                data = self.sock.recv(100)
            except BlockingIOError:
                return False
            except ConnectionError:
                data = found = b""
            found += data
            return not data

        self.sock.setblocking(False)
        wait(ended)
        assert found == expected, self.text
        self.sock.close()
        self.gone = True


class Books:
    """Where the clients are, by the model.

    wait: waits until something is true; for an event loop it has to run.
    """

    def __init__(self, wait: Wait = wait_until) -> None:
        self.wait = wait
        self.kernel: list[Client] = []
        self.queue: list[Client] = []
        self.handlers: list[Client] = []
        self.handled = self.refused = self.dropped = 0
        self.begun = 0  # clients that got a handler
        # while it serves
        self.places = 0
        self.pending: int | None = None
        self.full = b""

    def told(self, client: Client, expected: bytes) -> None:
        client.gets(expected, self.wait)

    def clients(self) -> list[Client]:
        return self.kernel + self.queue + self.handlers

    def begin(self, client: Client) -> None:
        """A handler gets it."""
        self.begun += 1
        self.handle(client)

    def handle(self, client: Client) -> None:
        """A handler has it: it is answered if it has spoken."""
        if client.done:
            self.told(client, client.text)
            self.handled += 1
        else:
            self.handlers.append(client)

    def take(self) -> None:
        """All that goes by itself while it serves and is not paused."""
        while self.kernel:
            if self.pending is None:
                if len(self.handlers) >= self.places:
                    return
                self.begin(self.kernel.pop(0))
            elif len(self.queue) < self.pending + self.places - len(self.handlers):
                self.queue.append(self.kernel.pop(0))
                self.serve_queue()
            else:
                self.told(self.kernel.pop(0), self.full)
                self.refused += 1

    def serve_queue(self) -> None:
        while self.queue and len(self.handlers) < self.places:
            self.begin(self.queue.pop(0))

    def finish(self) -> None:
        """Handlers whose client has spoken, or has left, come to their end."""
        ended = [client for client in self.handlers if client.done]
        self.handlers = [client for client in self.handlers if not client.done]
        for client in ended:
            self.handle(client)
        self.serve_queue()

    def end(self) -> None:
        """Nobody is served any more: who waits in our queue is dropped."""
        for client in self.queue:
            self.told(client, b"")
        self.dropped += len(self.queue)
        self.queue.clear()
        self.places, self.pending = 0, None

    def fits(self, crowd: int) -> bool:
        """Whether so many have a place at once: who is refused else depends on how fast the handlers are."""
        return self.pending is None or crowd + len(self.queue) <= self.pending

    def come(self, listener: Any, speaks: bool, paused: bool) -> None:
        """Another client, unless there are many."""
        if len(self.clients()) >= CROWD or (paused and not self.fits(len(self.kernel) + 1)):
            return
        try:
            client = Client(listener)
        except ConnectionResetError:  # a refusal can be quicker than the end of connect()
            assert self.full == b""
            assert len(self.queue) == self.pending
            self.refused += 1
            return
        if speaks:
            client.speak()
        self.kernel.append(client)

    def silent(self) -> list[Client]:
        return [client for client in self.clients() if not client.done]

    def one(self, which: int, act: str) -> None:
        """One of those who have not spoken speaks, leaves or resets."""
        client = self.silent()[which % len(self.silent())]
        if act == "speak":
            client.speak()
        else:
            client.leave(act == "reset")

    def agree(self, listener: Any) -> None:
        """Assert that the counters become what they have to be; they follow what clients are told."""
        try:
            self.wait(lambda: self.agrees(listener.stats()))
        except (AssertionError, TimeoutError) as error:
            raise AssertionError(f"{listener.stats()}, not {self.counts()}") from error

    def counts(self) -> tuple[int, int, int, int]:
        return self.handled, len(self.queue) + len(self.handlers), self.refused, self.dropped

    def balance(self, stats: Any) -> None:
        assert stats.accepted == stats.handled + stats.active + stats.refused + stats.dropped
        assert stats.active >= 0

    def agrees(self, stats: Any) -> bool:
        self.balance(stats)
        assert dict(stats.accept_errors) == {}
        assert stats.handler_errors == 0
        return bool((stats.handled, stats.active, stats.refused, stats.dropped) == self.counts())


def in_child(act: Callable[[], None]) -> None:
    """Do this in a forked process, and assert that it worked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    try:
        wait_until(lambda: os.waitpid(child, os.WNOHANG) == (child, 0))
    except (AssertionError, ChildProcessError):  # it hangs, or has failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        raise


ACTS = st.sampled_from(["speak", "leave", "reset"])


class Crowd(RuleBasedStateMachine):
    """What clients do, whoever serves them."""

    listener: fastlisten.Listener
    books: Books
    paused: bool

    def settle(self) -> None:
        """Compare what is with the Books."""
        raise NotImplementedError

    @rule(count=st.integers(1, 4), speaks=st.booleans())
    def come(self, count: int, speaks: bool) -> None:
        for _ in range(count):
            self.books.come(self.listener, speaks, self.paused)
            self.settle()

    @precondition(lambda self: self.books.silent())
    @rule(which=st.integers(0, CROWD), act=ACTS)
    def one(self, which: int, act: str) -> None:
        self.books.one(which, act)


class ListenerMachine(Crowd):
    """A Listener beside its Books, and whether it is served, is paused, has a stop to answer."""

    def __init__(self) -> None:
        super().__init__()
        self.threads = threading.active_count()
        self.spare = os.dup(0)
        os.close(self.spare)
        self.served: Serving | None = None
        self.paused = self.stopped = False
        self.timeout: float | None = None
        self.books = Books()

    @initialize(unix=st.booleans())
    def bind(self, unix: bool) -> None:
        self.unix = unix
        self.begin()

    def begin(self) -> None:
        name: Any = f"unix:@fastlisten-model-{os.getpid()}" if self.unix else ("127.0.0.1", 0)
        self.listener = fastlisten.bind(name, backlog=500)
        self.books = Books()
        self.paused = self.stopped = False
        self.timeout = None
        self.begun: list[Any] = []  # of the handlers, each

    # --- serving

    def handler(self, connection: Any) -> None:
        self.begun.append(connection.fileno())
        answer(connection)

    def ends(self, finished: int, cut: int) -> None:
        """Assert that serve() ends by itself, and what it tells; who waits in our queue is cut, too."""
        assert self.served is not None
        assert self.served.wait() == (finished, cut + len(self.books.queue))
        self.served = None
        self.books.end()

    @precondition(lambda self: self.served is None)
    @rule(mode=st.sampled_from(MODES))
    def serve(self, mode: tuple[dict[str, Any], int, int | None]) -> None:
        options, places, pending = mode
        if pending is not None and len(self.books.kernel) > pending:
            return  # see fits()
        self.served = Serving(lambda: self.listener.serve(self.handler, **options))
        if self.stopped:
            self.stopped = False
            self.ends(0, 0)
            return
        # Not before it has begun: a stop then would be for it, which the model calls stopped.
        wait_until(lambda: is_served(self.listener))
        self.books.places, self.books.pending = places, pending
        self.books.full = options["busy"] if options.get("busy") not in (None, "reset") else b""

    @precondition(lambda self: self.served is not None)
    @rule(how=st.sampled_from(["serve", "iterate", "await", "await all"]))
    def take_twice(self, how: str) -> None:
        acts: dict[str, Callable[[], Any]] = {
            "serve": lambda: self.listener.serve(answer),
            "iterate": lambda: next(iter(self.listener)),
            "await": lambda: asyncio.run(self.listener.accept_async()),
            "await all": lambda: asyncio.run(self.awaited(1)),
        }
        assert told(acts[how])[0] is RuntimeError

    @precondition(lambda self: self.served is not None)
    @rule()
    def stop(self) -> None:
        """Whoever was accepted is handled and waited for; the others stay in the kernel's queue."""
        accepted = self.books.handlers + self.books.queue
        self.listener.stop()
        for client in accepted:
            client.speak()
        assert self.served is not None
        assert self.served.wait() == (len(accepted), 0)
        self.served = None
        self.books.finish()
        self.books.end()

    @precondition(lambda self: self.served is not None)
    @rule()
    def drain(self) -> None:
        """Whoever is queued is answered, also when it is paused."""
        for client in self.books.clients():
            client.speak()
        self.listener.stop(drain=LIMIT)
        assert self.served is not None
        assert self.served.wait().cut == 0
        self.served = None
        self.books.places = max(self.books.places, 1)
        self.books.finish()
        self.books.take()
        self.books.end()

    @precondition(lambda self: self.served is not None)
    @rule()
    def cut(self) -> None:
        with_handlers = [*self.books.handlers]
        self.listener.stop(drain=0)
        self.ends(0, len(with_handlers))
        self.cut_off(with_handlers)

    def cut_off(self, clients: list[Client]) -> None:
        for client in clients:
            self.books.told(client, b"")
        self.books.handled += len(clients)
        self.books.handlers.clear()

    @precondition(lambda self: self.served is None)
    @rule(times=st.integers(1, 2), drain=st.sampled_from([None, 0]))
    def stop_before_serve(self, times: int, drain: float | None) -> None:
        for _ in range(times):
            self.listener.stop(drain)
        self.stopped = True

    @rule()
    def pause(self) -> None:
        self.listener.pause()
        self.paused = True

    @rule()
    def resume(self) -> None:
        if self.books.fits(len(self.books.kernel)):
            self.listener.resume()
            self.paused = False

    @rule()
    def close(self) -> None:
        """A serve() that runs ends as by stop(drain=0); all that can be asked then is told EBADF."""
        with_handlers = [*self.books.handlers]
        self.listener.close()
        if self.served is not None:
            self.ends(0, len(with_handlers))
        self.cut_off(with_handlers)
        for client in self.books.kernel:
            self.books.told(client, b"")
        self.books.kernel.clear()
        self.books.agree(self.listener)
        for act in (
            self.listener.accept,
            self.listener.accept_many,
            lambda: self.listener.serve(answer),
            self.listener.dup,
            lambda: self.listener.settimeout(1),
            lambda: self.listener.settimeout(None),
            lambda: asyncio.run(self.listener.accept_async()),
        ):
            assert told(act)[0] is OSError, act
        self.listener.close()
        self.listener.stop()
        self.begin()

    # --- accepting by hand

    @precondition(lambda self: self.served is None)
    @rule(
        how=st.sampled_from(["accept", "accept_many", "iterate", "await", "await all", "duplicate"]),
        count=st.integers(1, 5),
    )
    def accept(self, how: str, count: int) -> None:
        queued = self.books.kernel
        iterates = how in ("iterate", "await all")
        if not queued or (self.paused and (iterates or how == "await")):
            self.nobody(how)
            return
        count = min(count, len(queued))
        if iterates and self.stopped:
            self.stopped, count = False, 0  # a stop ends an iteration that begins after it
        elif how in ("accept", "await", "duplicate"):
            count = 1
        mine = how != "duplicate"  # which has counters of its own
        with contextlib.ExitStack() as accepted:
            for connection in [accepted.enter_context(one) for one in self.taken(how, count)]:
                client = queued.pop(0)
                client.speak()
                connection.settimeout(LIMIT)
                answer(connection)
                connection.close()
                self.books.told(client, client.text)
                self.books.handled += mine
                count -= 1
        assert count == 0

    def taken(self, how: str, count: int) -> list[Any]:
        listener = self.listener
        if how == "accept":
            return [listener.accept()[0]]
        if how == "accept_many":
            return listener.accept_many(count)
        if how == "await":
            return [asyncio.run(listener.accept_async())[0]]
        if how == "await all":
            return asyncio.run(self.awaited(count))
        if how == "iterate":
            return list(itertools.islice(listener, count or None))
        with listener.dup() as twin:
            return [twin.accept()[0]]

    async def awaited(self, count: int) -> list[Any]:
        found: list[Any] = []
        async for connection in self.listener:
            found.append(connection)
            if len(found) == count:
                break
        return found

    def nobody(self, how: str) -> None:
        """Nobody is there for whoever looks and does not wait."""
        if how in ("accept", "accept_many") and not self.books.kernel:
            self.listener.settimeout(0)
            assert told(getattr(self.listener, how))[0] is BlockingIOError
            self.listener.settimeout(0.001)
            assert told(getattr(self.listener, how))[0] is TimeoutError
            self.listener.settimeout(self.timeout)

    # --- what must not disturb

    @rule(timeout=st.sampled_from([None, 0, 5]))
    def settimeout(self, timeout: float | None) -> None:
        self.listener.settimeout(timeout)
        # A client that has come is there at once, so that 0 is time enough, too.
        self.timeout = timeout

    @rule(timeout=st.sampled_from([None, 0, 5]), detach=st.booleans())
    def duplicate(self, timeout: float | None, detach: bool) -> None:
        with self.listener.dup() as twin:
            assert twin.gettimeout() == self.timeout
            twin.settimeout(timeout)
            twin.settimeout(self.timeout)
            if detach:
                os.close(twin.detach())

    @rule(act=st.sampled_from(["nothing", "close", "stop", "pause", "drain 0", "accept"]))
    def fork(self, act: str) -> None:
        """Whatever a child does with the listener, the model here does not change."""
        if act == "accept" and (self.books.kernel or self.served is not None):
            return

        def look() -> None:
            self.books.balance(self.listener.stats())
            if act == "stop":
                self.listener.stop()
            elif act == "pause":
                self.listener.pause()
            elif act == "drain 0":
                self.listener.stop(drain=0)
            elif act == "accept":
                with connect(self.listener) as client, self.listener.accept_many()[0] as connection:
                    client.sendall(b"child")
                    assert connection.recv(5) == b"child"
            if act != "nothing":
                self.listener.close()

        in_child(look)

    # --- what clients do

    @precondition(lambda self: any(not client.gone for client in self.books.kernel))
    @rule(which=st.integers(0, CROWD), rst=st.booleans())
    def one_gives_up(self, which: int, rst: bool) -> None:
        """It stays in the kernel's queue, and the handler meets a dead client."""
        there = [client for client in self.books.kernel if not client.gone]
        there[which % len(there)].leave(rst)

    # --- what holds after every step

    @invariant()
    def settle(self) -> None:
        if not hasattr(self, "listener"):
            return
        self.books.finish()
        if not self.paused:
            self.books.take()
        self.books.agree(self.listener)
        # Who has a place may wait for the handler's thread yet, and a cut would drop him.
        wait_until(lambda: len(self.begun) == self.books.begun)
        stats = self.listener.stats()
        assert stats.paused == self.paused
        assert stats.queue_depth in (None, len(self.books.kernel))
        assert self.listener.gettimeout() == self.timeout
        waiting = [client.sock for client in self.books.clients() if not client.gone]
        assert select.select(waiting, [], [], 0)[0] == []

    def teardown(self) -> None:
        if not hasattr(self, "listener"):
            return
        self.close()
        self.listener.close()
        wait_until(lambda: threading.active_count() == self.threads)
        free = os.dup(0)
        os.close(free)
        assert free == self.spare


class Answers(asyncio.Protocol):
    """Answers the one message of a client and hangs up."""

    def __init__(self, begun: list[Any]) -> None:
        self.begun = begun

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.begun.append(transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        self.transport.close()


# Limits of an asyncio server, how many connections there may be, and how many may wait for one.
LIMITS: list[tuple[dict[str, Any], int, int | None]] = [
    ({}, CROWD, None),
    ({"max_connections": 2}, 2, None),
    ({"max_connections": 1, "exhausted": "shed"}, 1, None),
    ({"max_connections": 1, "busy": b"full", "pending": 2}, 1, 2),
    ({"max_connections": 2, "busy": "reset", "pending": 1}, 2, 1),
]


class ServerMachine(Crowd):
    """An asyncio server beside its Books; the event loop runs until they agree."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)
        self.books = Books(self.turns)

    def turns(self, condition: Callable[[], Any]) -> None:
        """Run the event loop until the condition is true."""

        async def until() -> None:
            async with asyncio.timeout(LIMIT):
                while not condition():
                    await asyncio.sleep(0)

        self.runner.run(until())

    @initialize(limits=st.sampled_from(LIMITS), unix=st.booleans())
    def bind(self, limits: tuple[dict[str, Any], int, int | None], unix: bool) -> None:
        options, self.books.places, self.books.pending = limits
        self.books.full = options["busy"] if options.get("busy") not in (None, "reset") else b""
        self.listener = fastlisten.bind(f"unix:@fastlisten-model-{os.getpid()}" if unix else ("127.0.0.1", 0))
        self.create = aio.create_unix_server if unix else aio.create_server
        self.begun: list[Any] = []
        answers = functools.partial(Answers, self.begun)
        self.server = self.runner.run(self.create(answers, sock=self.listener, **options))
        self.paused = False

    @rule()
    def start_again(self) -> None:
        self.runner.run(self.server.start_serving())

    @rule()
    def pause(self) -> None:
        self.server.pause()
        self.paused = True

    @rule()
    def resume(self) -> None:
        if self.books.fits(len(self.books.kernel)):
            self.server.resume()
            self.paused = False

    @rule(how=st.sampled_from(["serve", "iterate", "await"]))
    def take_twice(self, how: str) -> None:
        acts: dict[str, Callable[[], Any]] = {
            "serve": lambda: self.listener.serve(answer),
            "iterate": lambda: next(iter(self.listener)),
            "await": lambda: self.runner.run(self.listener.accept_async()),
        }
        assert told(acts[how])[0] is RuntimeError

    @rule(timeout=st.sampled_from([None, 0, 5]))
    def settimeout(self, timeout: float | None) -> None:
        """The event loop must not wait inside accept()."""
        self.listener.settimeout(timeout)
        with self.listener.dup() as twin:
            twin.settimeout(5)
            twin.settimeout(None)

    @rule(closes=st.booleans())
    def fork(self, closes: bool) -> None:
        def look() -> None:
            self.books.balance(self.server.stats())
            if closes:
                self.listener.close()

        in_child(look)

    @invariant()
    def settle(self) -> None:
        if hasattr(self, "server"):
            self.books.finish()
            if not self.paused:
                self.books.take()
            self.books.agree(self.server)
            # Who has a place may wait for the event loop yet, and close() would drop him.
            self.turns(lambda: len(self.begun) == self.books.begun)
            assert self.server.stats().paused == self.paused
            assert self.server.is_serving()

    def teardown(self) -> None:
        """Connections go on after close(); who waits in a queue is closed."""
        if hasattr(self, "server"):
            self.server.close()
            self.server.close()
            self.books.end()
            for client in self.books.kernel:
                self.books.told(client, b"")
            assert self.listener.fileno() == -1
            assert told(lambda: self.runner.run(self.server.start_serving()))[0] is RuntimeError
            for client in self.books.handlers:
                client.speak()
            self.books.finish()
            self.books.agree(self.server)
            self.runner.run(self.server.wait_closed())
        self.runner.close()


@pytest.mark.timeout(120)
@posix_only("uses unix names and fork")
def test_a_listener(fuzz: Fuzz) -> None:
    fuzz.machine(ListenerMachine, examples=25, steps=25)


@pytest.mark.timeout(120)
@posix_only("uses unix names and fork")
def test_an_asyncio_server(fuzz: Fuzz) -> None:
    fuzz.machine(ServerMachine, examples=25, steps=25)
