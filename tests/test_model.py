"""A model of a Listener: random serve, stop, pause, fork, close, dup and clients, and who is owed what.

The model knows each client and where it is: in the kernel's queue, in ours (`pending`), or with a handler,
which it keeps until it speaks.  After each step the counters and what the clients see have to agree with it.
"""

import asyncio
import contextlib
import itertools
import os
import select
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
from helpers import LIMIT, Serving, connect, posix_only, read_all, reset, told, wait_until
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

    def gets(self, *expected: bytes) -> None:
        """Assert that it was told one of these and then the end; b"" is a reset, too."""
        if self.gone:
            return
        try:
            found = read_all(self.sock)
        except ConnectionError:
            found = b""
        assert found in expected, (self.text, found, expected)
        self.sock.close()
        self.gone = True


class Books:
    """Where the clients are, by the model."""

    def __init__(self) -> None:
        self.kernel: list[Client] = []
        self.queue: list[Client] = []
        self.handlers: list[Client] = []
        self.handled = self.refused = self.dropped = 0
        # while it serves
        self.places = 0
        self.pending: int | None = None
        self.full = b""

    def clients(self) -> list[Client]:
        return self.kernel + self.queue + self.handlers

    def handle(self, client: Client) -> None:
        """A handler has it: it is answered if it has spoken."""
        if client.done:
            client.gets(client.text)
            self.handled += 1
        else:
            self.handlers.append(client)

    def take(self) -> None:
        """All that goes by itself while it serves and is not paused."""
        while self.kernel:
            if self.pending is None:
                if len(self.handlers) >= self.places:
                    return
                self.handle(self.kernel.pop(0))
            elif len(self.queue) < self.pending + self.places - len(self.handlers):
                self.queue.append(self.kernel.pop(0))
                self.serve_queue()
            else:
                self.kernel.pop(0).gets(self.full)
                self.refused += 1

    def serve_queue(self) -> None:
        while self.queue and len(self.handlers) < self.places:
            self.handle(self.queue.pop(0))

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
            client.gets(b"")
        self.dropped += len(self.queue)
        self.queue.clear()
        self.places, self.pending = 0, None

    def agree(self, listener: Any) -> None:
        """Assert that the counters become what they have to be; they follow what clients are told."""
        try:
            wait_until(lambda: self.agrees(listener.stats()))
        except AssertionError as error:
            raise AssertionError(f"{listener.stats()}, not {self.counts()}") from error

    def counts(self) -> tuple[int, int, int, int]:
        return self.handled, len(self.queue) + len(self.handlers), self.refused, self.dropped

    def agrees(self, stats: Any) -> bool:
        assert stats.accepted == stats.handled + stats.active + stats.refused + stats.dropped
        assert stats.active >= 0
        assert dict(stats.accept_errors) == {}
        assert stats.handler_errors == 0
        return bool((stats.handled, stats.active, stats.refused, stats.dropped) == self.counts())


class ListenerMachine(RuleBasedStateMachine):
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

    # --- serving

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
        self.served = Serving(lambda: self.listener.serve(answer, **options))
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
        """Whoever is with a handler is waited for; the others stay in the kernel's queue."""
        with_handlers = [*self.books.handlers]
        self.listener.stop()
        for client in with_handlers:
            client.speak()
        self.ends(len(with_handlers), 0)
        self.books.finish()

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
            client.gets(b"")
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
        if self.fits(len(self.books.kernel)):
            self.listener.resume()
            self.paused = False

    def fits(self, crowd: int) -> bool:
        """Whether so many have a place at once: who is refused else depends on how fast the handlers are."""
        return self.books.pending is None or crowd + len(self.books.queue) <= self.books.pending

    @rule()
    def close(self) -> None:
        """A serve() that runs ends as by stop(drain=0); all that can be asked then is told EBADF."""
        with_handlers = [*self.books.handlers]
        self.listener.close()
        if self.served is not None:
            self.ends(0, len(with_handlers))
        self.cut_off(with_handlers)
        for client in self.books.kernel:
            client.gets(b"")
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
                client.gets(client.text)
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads
            child = os.fork()
        if child == 0:
            status = 1
            try:
                stats = self.listener.stats()
                assert stats.accepted == stats.handled + stats.active + stats.refused + stats.dropped
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
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0

    # --- what clients do

    @rule(count=st.integers(1, 4), speaks=st.booleans())
    def come(self, count: int, speaks: bool) -> None:
        for _ in range(count):
            waiting = len(self.books.kernel)
            if len(self.books.clients()) >= CROWD:
                return
            if self.paused and not self.fits(waiting + 1):
                return
            try:
                client = Client(self.listener)
            except ConnectionResetError:  # a refusal can be quicker than the end of connect()
                assert self.books.full == b""
                assert len(self.books.queue) == self.books.pending
                self.books.refused += 1
                continue
            if speaks:
                client.speak()
            self.books.kernel.append(client)
            self.settle()

    @precondition(lambda self: any(not client.done for client in self.books.clients()))
    @rule(which=st.integers(0, CROWD), act=st.sampled_from(["speak", "leave", "reset"]))
    def one(self, which: int, act: str) -> None:
        silent = [client for client in self.books.clients() if not client.done]
        client = silent[which % len(silent)]
        if act == "speak":
            client.speak()
        else:
            client.leave(act == "reset")

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


@pytest.mark.timeout(120)
@posix_only("uses unix names and fork")
def test_a_listener(fuzz: Fuzz) -> None:
    fuzz.machine(ListenerMachine, examples=30, steps=25)
