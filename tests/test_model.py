"""Random sequences of serve, stop, pause, resume, close, fork and clients, against a model."""

import contextlib
import os
import select
import socket
import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import fastlisten
from helpers import LIMIT, Serving, connect, reset, told, wait_until
from helpers.internals import is_served

MODES: list[dict[str, Any]] = [
    {},
    {"threads": 1},
    {"threads": 3},
    {"threads": (1, 4)},
    {"max_connections": 1},
    {"threads": 2, "max_connections": 1},
    {"busy": "reset", "pending": 200},
    {"busy": b"full", "pending": 200, "threads": 2},
    {"exhausted": "shed"},
]


def answer(connection: Any) -> None:
    """Answer the one message of a client; one that hangs up first is no news."""
    connection.settimeout(LIMIT)
    with contextlib.suppress(ConnectionError):
        connection.sendall(connection.recv(100))


class ListenerMachine(RuleBasedStateMachine):
    """The model: whether it serves, is paused, has a stop to answer, and who waits for an answer.

    A client sends its number when it connects and is owed an echo as soon as the listener serves
    and is not paused, or drains. Whoever is not owed one has to be left waiting, not be refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[bytes, socket.socket]] = []
        self.number = 0
        self.served: Serving | None = None
        self.paused = False
        self.stop_pending = False
        self.gone: set[bytes] = set()

    @initialize(unix=st.booleans())
    def bind(self, unix: bool) -> None:
        name = f"unix:@fastlisten-random-{os.getpid()}"
        self.listener = fastlisten.bind(name if unix else ("127.0.0.1", 0), backlog=500)
        self.unix = unix

    # --- what the listener does

    def ends(self) -> None:
        """Assert that serve() ends by itself and forget about it."""
        assert self.served is not None
        result = self.served.wait()
        assert result.cut == 0
        self.served = None

    def answers_all(self) -> None:
        for text, client in self.waiting:
            assert client.recv(100) == text
            assert client.recv(100) == b""
            client.close()
        self.waiting.clear()

    @precondition(lambda self: self.served is None)
    @rule(mode=st.sampled_from(MODES))
    def serve(self, mode: dict[str, Any]) -> None:
        self.served = Serving(lambda: self.listener.serve(answer, **mode))
        if self.stop_pending:
            self.stop_pending = False
            self.ends()
        else:
            # Not before it has begun: a stop then would be for it, which the model calls pending.
            wait_until(lambda: is_served(self.listener))

    @precondition(lambda self: self.served is not None)
    @rule()
    def serve_twice(self) -> None:
        outcome = told(self.listener.serve, answer)
        assert outcome[0] is RuntimeError

    @precondition(lambda self: self.served is not None)
    @rule()
    def stop(self) -> None:
        """Whoever was accepted has been answered before; the others stay in the kernel's queue."""
        self.listener.stop()
        self.ends()

    @precondition(lambda self: self.served is None)
    @rule(times=st.integers(1, 2))
    def stop_before_serve(self, times: int) -> None:
        for _ in range(times):
            self.listener.stop()
        self.stop_pending = True

    @precondition(lambda self: self.served is not None)
    @rule()
    def drain(self) -> None:
        self.listener.stop(drain=LIMIT)
        self.ends()
        self.answers_all()

    @rule()
    def pause(self) -> None:
        self.settle()
        self.listener.pause()
        self.paused = True

    @rule()
    def resume(self) -> None:
        self.listener.resume()
        self.paused = False

    @precondition(lambda self: self.served is None)
    @rule(limit=st.integers(1, 100))
    def accept_many(self, limit: int) -> None:
        self.listener.settimeout(0)
        outcome = told(self.listener.accept_many, limit)
        self.listener.settimeout(None)
        if outcome[0] is BlockingIOError:
            assert self.waiting == []
            return
        connections = outcome[1]
        assert 1 <= len(connections) <= limit
        for connection in connections:
            with connection:
                self.took(connection)
        if len(connections) < limit:
            assert self.waiting == []

    @precondition(lambda self: self.served is None)
    @rule()
    def accept(self) -> None:
        self.listener.settimeout(0)
        try:
            accepted, _ = self.listener.accept()
        except BlockingIOError:
            assert self.waiting == []
        else:
            with accepted:
                self.took(accepted)
        finally:
            self.listener.settimeout(None)

    def took(self, accepted: Any) -> None:
        """Answer a client that was accepted by hand: the first that waits, or one that has gone."""
        accepted.settimeout(LIMIT)
        try:
            data = accepted.recv(100)
        except ConnectionError:
            return
        if not self.waiting or data != self.waiting[0][0]:
            assert data == b"" or data in self.gone
            return
        accepted.sendall(data)
        accepted.close()
        text, client = self.waiting.pop(0)
        assert client.recv(100) == text
        client.close()

    @rule()
    def look(self) -> None:
        stats = self.listener.stats()
        assert stats.paused == self.paused
        assert stats.handled <= stats.accepted
        assert stats.refused == 0
        assert dict(stats.accept_errors) == {}
        assert repr(self.listener)

    @precondition(lambda self: hasattr(os, "fork"))
    @rule(act=st.sampled_from(["nothing", "close", "stop", "pause", "drain 0"]))
    def fork(self, act: str) -> None:
        """Whatever a child does with the listener, the model here does not change."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads
            child = os.fork()
        if child == 0:
            status = 1
            try:
                if act == "stop":
                    self.listener.stop()
                elif act == "pause":
                    self.listener.pause()
                elif act == "drain 0":
                    self.listener.stop(drain=0)
                if act != "nothing":
                    self.listener.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0

    # --- what clients do

    @rule(count=st.integers(1, 10))
    def come(self, count: int) -> None:
        for _ in range(count):
            client = connect(self.listener)
            text = b"%d" % self.number
            self.number += 1
            client.sendall(text)
            self.waiting.append((text, client))

    @precondition(lambda self: self.waiting and (self.served is None or self.paused))
    @rule(rst=st.booleans(), first=st.booleans())
    def one_gives_up(self, rst: bool, first: bool) -> None:
        """It stays in the kernel's queue, and the handler meets a dead client."""
        text, client = self.waiting.pop(0 if first else -1)
        self.gone.add(text)
        if rst and not self.unix:
            reset(client)
        else:
            client.close()

    @rule(rst=st.booleans(), count=st.integers(1, 5))
    def come_and_go(self, rst: bool, count: int) -> None:
        for _ in range(count):
            client = connect(self.listener)
            if rst and not self.unix:
                reset(client)
            else:
                client.close()

    # --- what holds after every step

    def settle(self) -> None:
        if self.served is not None and not self.paused:
            self.answers_all()

    @invariant()
    def who_is_owed_an_answer_has_it(self) -> None:
        self.settle()

    @invariant()
    def who_is_not_owed_one_waits(self) -> None:
        if self.served is None or self.paused:
            ready, _, _ = select.select([client for _, client in self.waiting], [], [], 0)
            assert ready == []

    def teardown(self) -> None:
        if not hasattr(self, "listener"):
            return
        listener, served = self.listener, self.served
        listener.close()
        if served is not None:
            served.wait()
        for _, client in self.waiting:
            with contextlib.suppress(ConnectionError):
                assert client.recv(100) == b""
            client.close()
        assert told(listener.accept)[0] is OSError
        assert told(listener.serve, answer)[0] is OSError


@pytest.mark.timeout(300)
@pytest.mark.skipif(not hasattr(socket, "AF_UNIX") or os.name == "nt", reason="uses unix names")
def test_random_sequences() -> None:
    run_state_machine_as_test(
        ListenerMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
