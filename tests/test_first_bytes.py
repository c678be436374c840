"""serve(first_bytes=): who has sent nothing costs no thread, holds nobody up, and is closed in time."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import fastlisten
from fastlisten import Listener, ListenerStats, bind
from helpers import (
    LIMIT,
    LOOPBACK,
    connect,
    echo,
    exchange,
    needs,
    posix_only,
    read_all,
    refusal,
    reset,
    serving,
    under_wine,
    wait_until,
)
from helpers.descriptors import out_of_descriptors
from helpers.faults import Faults
from helpers.programs import python
from helpers.serve import answer, modes

SHORT = 0.1  # seconds: a time that a test waits for
Silent = Callable[..., list[socket.socket]]


@pytest.fixture
def silent() -> Iterator[Silent]:
    """Give a function that connects some clients who send nothing, and sees them wait."""
    with contextlib.ExitStack() as clients:

        def some(listener: Listener, number: int = 1) -> list[socket.socket]:
            before = listener.stats().waiting
            made = [clients.enter_context(connect(listener)) for _ in range(number)]
            wait_until(lambda: listener.stats().waiting == before + number)
            return made

        yield some


def balanced(stats: ListenerStats) -> bool:
    """Tell whether nobody is left, with each client in one of the books and a reason for each refusal."""
    assert stats.accepted == stats.handled + stats.active + stats.refused + stats.dropped
    if stats.active or stats.waiting:
        return False
    assert sum(stats.refused_for.values()) == stats.refused
    return True


@modes
def test_a_silent_client_holds_nobody_up(listener: Listener, silent: Silent, mode: dict[str, Any]) -> None:
    with serving(listener, answer, first_bytes=LIMIT, **mode):
        first, second = silent(listener, 2)
        for _ in range(5):
            assert exchange(listener) == b"ping"
        second.sendall(b"late")
        assert read_all(second) == b"late"
        assert listener.stats().waiting == 1
        first.sendall(b"later")
        assert read_all(first) == b"later"
        wait_until(lambda: balanced(listener.stats()))
    assert listener.stats().handled == 7


@modes
def test_a_client_is_closed_when_its_time_is_over(
    listener: Listener, silent: Silent, mode: dict[str, Any]
) -> None:
    with serving(listener, answer, first_bytes=SHORT, **mode):
        began = time.monotonic()
        with connect(listener) as client:
            assert read_all(client) == b""
        assert time.monotonic() - began > SHORT * 0.9
        wait_until(lambda: listener.stats().refused == 1)
        assert exchange(listener) == b"ping"
        wait_until(lambda: balanced(listener.stats()))
    assert listener.stats().refused_for == {"silent": 1}


@modes
def test_one_byte_is_enough(listener: Listener, silent: Silent, mode: dict[str, Any]) -> None:
    """From the first byte on the handler has the client, and its own timeout counts."""
    handled = threading.Event()

    def handler(connection: Any) -> None:
        data = connection.recv(1)
        handled.set()
        connection.sendall(data + connection.recv(100))

    with serving(listener, handler, first_bytes=LIMIT, **mode):
        (client,) = silent(listener)
        client.sendall(b"1")
        assert handled.wait(LIMIT)
        client.sendall(b"2")
        assert read_all(client) == b"12"


@modes
def test_who_leaves_first_is_not_handled(listener: Listener, silent: Silent, mode: dict[str, Any]) -> None:
    handled: list[Any] = []
    with serving(listener, handled.append, first_bytes=LIMIT, **mode):
        first, second, third = silent(listener, 3)
        first.close()
        reset(second)
        third.shutdown(socket.SHUT_WR)
        assert read_all(third) == b""
        wait_until(lambda: balanced(listener.stats()))
    assert listener.stats().refused_for == {"left": 3}
    assert handled == []


@posix_only("Windows has no unix sockets")
def test_on_several_listeners_and_families(unix_path: str) -> None:
    with bind(LOOPBACK) as tcp, bind(f"unix:{unix_path}") as unix, bind(LOOPBACK) as other:
        listeners = tcp, unix, other
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(fastlisten.serve, answer, *listeners, first_bytes=LIMIT)
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(connect(listener)) for listener in listeners]
                wait_until(lambda: [listener.stats().waiting for listener in listeners] == [1, 1, 1])
                for client in reversed(clients):
                    client.sendall(b"here")
                    assert read_all(client) == b"here"
            tcp.stop()
            done.result(LIMIT)
        for listener in listeners:
            assert balanced(listener.stats())


# --- limits


def test_who_waits_is_no_connection(listener: Listener, silent: Silent) -> None:
    """max_connections counts a client from its first byte on."""
    with serving(listener, echo, threads=4, max_connections=1, first_bytes=LIMIT):
        clients = silent(listener, 3)
        clients[0].sendall(b"one")
        assert clients[0].recv(3) == b"one"
        clients[1].sendall(b"two")
        clients[2].close()
        wait_until(lambda: listener.stats().refused_for == {"left": 1})
        wait_until(lambda: listener.stats().waiting == 0)  # it has spoken, and waits for a place
        assert select.select([clients[1]], [], [], SHORT)[0] == []
        clients[0].shutdown(socket.SHUT_WR)
        assert clients[1].recv(3) == b"two"
        clients[1].shutdown(socket.SHUT_WR)
        wait_until(lambda: balanced(listener.stats()))


def test_who_waits_for_a_place_is_not_closed(listener: Listener, silent: Silent) -> None:
    """Once a client has spoken its time is its own, also while there is no place for it."""
    with (
        serving(listener, echo, threads=2, max_connections=1, first_bytes=SHORT),
        connect(listener) as first,
        connect(listener) as second,
    ):
        first.sendall(b"one")
        assert first.recv(3) == b"one"
        second.sendall(b"two")
        assert select.select([second], [], [], 3 * SHORT)[0] == []
        first.shutdown(socket.SHUT_WR)
        assert second.recv(3) == b"two"
        second.shutdown(socket.SHUT_WR)
        wait_until(lambda: balanced(listener.stats()))
    assert listener.stats().refused_for == {}


@pytest.mark.parametrize("threads", [0, 2], ids=str)
def test_who_waits_has_no_place_in_the_queue(listener: Listener, silent: Silent, threads: int) -> None:
    """busy= refuses who has spoken and finds no place; who is silent takes none."""
    most = max(threads, 1)
    with serving(listener, echo, threads=threads, pending=1, busy="reset", first_bytes=LIMIT):
        clients = silent(listener, most + 5)
        for client in clients[:most]:
            client.sendall(b"me")
            assert client.recv(2) == b"me"
        clients[most].sendall(b"pending")
        wait_until(lambda: listener.stats().waiting == 4)
        clients[most + 1].sendall(b"too many")
        with pytest.raises(ConnectionResetError) if not under_wine() else contextlib.nullcontext():
            assert clients[most + 1].recv(1) == b""  # as Wine reads a reset
        assert listener.stats().refused_for == {"busy": 1}
        for client in clients:
            client.close()
        wait_until(lambda: balanced(listener.stats()))
    assert listener.stats().refused_for == {"busy": 1, "left": 3}


@needs("Linux")
def test_for_want_of_descriptors_who_has_waited_longest_makes_way(listener: Listener, silent: Silent) -> None:
    with serving(listener, answer, first_bytes=LIMIT):
        old, new = silent(listener, 2)
        with socket.socket() as client:
            client.settimeout(LIMIT)
            with out_of_descriptors():
                client.connect(listener.getsockname())
                client.sendall(b"ping")
                assert read_all(client) == b"ping"
        assert read_all(old) == b""
        assert listener.stats().refused_for == {"made way": 1}
        new.sendall(b"ping")
        assert read_all(new) == b"ping"


# --- stop, pause, fork


@modes
@pytest.mark.parametrize("drain", [None, 0.2])
def test_a_stop_drops_who_waits_and_a_drain_at_its_end(
    listener: Listener, silent: Silent, mode: dict[str, Any], drain: float | None
) -> None:
    with serving(listener, answer, first_bytes=LIMIT, **mode) as served:
        (client,) = silent(listener)
        listener.stop(drain)
        served.wait()
        assert read_all(client) == b""
        assert balanced(listener.stats())
        assert listener.stats().dropped == 1


@modes
def test_a_stop_handles_who_has_spoken(listener: Listener, silent: Silent, mode: dict[str, Any]) -> None:
    with serving(listener, answer, first_bytes=LIMIT, **mode) as served:
        (client,) = silent(listener)
        listener.pause()
        client.sendall(b"spoken")
        wait_until(lambda: listener.stats().waiting == 0)
        listener.stop()
        assert read_all(client) == b"spoken"
        served.wait()
        assert balanced(listener.stats())
        assert (listener.stats().handled, listener.stats().dropped) == (1, 0)


@modes
def test_a_drain_lets_everybody_speak_who_is_here(
    listener: Listener, silent: Silent, mode: dict[str, Any]
) -> None:
    """What a client has sent may be on its way: a restart would lose it."""
    with serving(listener, answer, first_bytes=LIMIT, **mode) as served:
        (waiting,) = silent(listener)
        listener.pause()
        with connect(listener) as queued, connect(listener) as late:
            wait_until(lambda: listener.stats().queue_depth in (2, None))
            listener.stop(drain=LIMIT)
            for client in (queued, waiting, late):
                client.sendall(b"heard")
                assert read_all(client) == b"heard"
            served.wait()
        assert balanced(listener.stats())
        assert (listener.stats().handled, listener.stats().dropped) == (3, 0)


@modes
def test_a_drain_waits_for_the_silent_as_long_as_they_have(
    listener: Listener, silent: Silent, mode: dict[str, Any]
) -> None:
    with serving(listener, answer, first_bytes=0.3, **mode) as served:
        (client,) = silent(listener)
        listener.stop(drain=LIMIT)
        served.wait()
        assert read_all(client) == b""
        assert listener.stats().refused_for == {"silent": 1}


@modes
def test_a_pause_keeps_who_waits(listener: Listener, silent: Silent, mode: dict[str, Any]) -> None:
    with serving(listener, answer, first_bytes=LIMIT, **mode):
        first, second = silent(listener, 2)
        listener.pause()
        first.sendall(b"paused")
        wait_until(lambda: listener.stats().waiting == 1)
        assert select.select([first], [], [], SHORT)[0] == []
        listener.resume()
        assert read_all(first) == b"paused"
        second.sendall(b"resumed")
        assert read_all(second) == b"resumed"
        wait_until(lambda: balanced(listener.stats()))


@modes
def test_a_close_drops_who_waits(silent: Silent, mode: dict[str, Any]) -> None:
    with bind(LOOPBACK) as listener, serving(listener, answer, first_bytes=LIMIT, **mode) as served:
        (client,) = silent(listener)
        listener.close()
        served.wait()
        assert read_all(client) == b""


FORK = """
import os, sys, threading, warnings, fastlisten
from helpers import LIMIT, connect, exchange, read_all, serving, wait_until
from helpers.serve import answer
warnings.simplefilter("ignore", DeprecationWarning)
with fastlisten.bind("127.0.0.1:0") as listener:
    with serving(listener, answer, first_bytes=LIMIT, threads=2), connect(listener) as client:
        wait_until(lambda: listener.stats().waiting == 1)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            stats = listener.stats()
            ok = (stats.waiting, stats.dropped) == (0, 1)
            os.read(reader, 1)  # until the parent is through
            os._exit(0 if ok else 1)
        os.close(reader)
        assert listener.stats().waiting == 1
        assert exchange(listener) == b"ping"
        client.sendall(b"late")
        assert read_all(client) == b"late"  # a child that kept it would keep it open
        os.close(writer)
        assert os.waitpid(child, 0)[1] == 0
print("true")
"""


@needs("fork", "Linux")
def test_a_forked_child_has_nobody_who_waits() -> None:
    assert python(FORK) is True


# --- what can fail, and what is refused


@pytest.mark.parametrize("mode", [{}, {"threads": 2}, {"busy": "reset", "pending": 100}], ids=str)
def test_without_a_poller(faults: Faults, mode: dict[str, Any]) -> None:
    """All are polled every now and then where the system has no poller, or none is to be had."""
    program = f"""
import contextlib, fastlisten
from helpers import LIMIT, connect, exchange, read_all, serving, wait_until
from helpers.faults import given
from helpers.serve import answer
with fastlisten.bind("127.0.0.1:0", backlog=200) as listener, contextlib.ExitStack() as stack:
    with serving(listener, answer, first_bytes=LIMIT, **{mode!r}):
        clients = [stack.enter_context(connect(listener)) for _ in range(150)]
        wait_until(lambda: listener.stats().waiting == 150)
        assert given("poller")
        assert exchange(listener) == b"ping"
        for client in clients[::2]:
            client.sendall(b"late")
        for client in clients[::2]:
            assert read_all(client) == b"late"
        for client in clients[1::2]:
            client.close()
        wait_until(lambda: listener.stats().active == 0)
    assert listener.stats().refused_for == {{"left": 75}}, listener.stats()
    with serving(listener, answer, first_bytes=0.1, **{mode!r}), connect(listener) as client:
        assert read_all(client) == b""
print("true")
"""
    assert faults.python(program, poller=[("EMFILE", 2)]) is True


@pytest.mark.parametrize("mode", [{}, {"threads": 2}, {"busy": "reset", "pending": 10}], ids=str)
def test_who_cannot_be_watched_is_dropped(faults: Faults, mode: dict[str, Any]) -> None:
    program = f"""
import fastlisten
from helpers import LIMIT, connect, exchange, read_all, serving, wait_until
from helpers.serve import answer
with fastlisten.bind("127.0.0.1:0") as listener:
    with serving(listener, answer, first_bytes=LIMIT, **{mode!r}):
        with connect(listener) as client:
            assert read_all(client) == b""
        assert exchange(listener) == b"ping"
        with connect(listener) as client:
            wait_until(lambda: listener.stats().waiting == 1)
            client.sendall(b"late")
            assert read_all(client) == b"late"
    assert listener.stats().dropped == 1
print("true")
"""
    assert faults.python(program, watch=[("ENOSPC", 1)]) is True


@needs("2,500 descriptors", "a backlog of 2,500", "Linux")
@pytest.mark.parametrize("mode", [{}, {"threads": 2}], ids=str)
def test_a_thousand_silent_clients_cost_no_thread(mode: dict[str, Any], thousands: None) -> None:
    with bind(LOOPBACK, backlog=2000) as listener, serving(listener, answer, first_bytes=LIMIT, **mode):
        threads = listener.stats().threads
        with contextlib.ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(connect(listener))
            wait_until(lambda: listener.stats().waiting == 1000)
            for _ in range(10):
                assert exchange(listener) == b"ping"
            assert listener.stats().threads <= max(threads, mode.get("threads", 0))
        wait_until(lambda: balanced(listener.stats()))
        assert listener.stats().refused_for == {"left": 1000}


def test_times_that_are_none(listener: Listener) -> None:
    for value, error in ((0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="first_bytes must be"):
            listener.serve(answer, first_bytes=value)  # type: ignore[arg-type]


@modes
def test_who_speaks_late_and_who_speaks_at_once(listener: Listener, mode: dict[str, Any]) -> None:
    """Neither keeps the other waiting."""
    with serving(listener, answer, first_bytes=LIMIT, **mode):

        def some(number: int) -> None:
            for n in range(20):
                with connect(listener) as client:
                    if number % 2:
                        wait_until(lambda: listener.stats().waiting)
                    client.sendall(b"%d %d" % (number, n))
                    assert read_all(client) == b"%d %d" % (number, n)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(some, range(6)))
        wait_until(lambda: balanced(listener.stats()))
    assert (listener.stats().handled, listener.stats().refused) == (120, 0)


def test_it_is_off_by_default(listener: Listener) -> None:
    """Then a handler gets its client at once, as it must where the server speaks first."""
    with serving(listener, lambda connection: connection.sendall(b"220 hello")):
        assert refusal(listener) == b"220 hello"
