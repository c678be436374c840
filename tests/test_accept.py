"""accept() and accept_many(): what is waited for, how many are taken, and at what cost."""

import collections
import contextlib
import errno
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fastlisten import Connection, Listener, bind
from helpers import LOOPBACK, Serving, connect, echo, exchange, needs, read_all, serving, wait_until
from helpers.programs import run, sanitizers


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Give a Listener on the loopback address, closed at the end."""
    with bind(LOOPBACK) as listener:
        yield listener


@pytest.fixture
def queued(listener: Listener) -> Iterator[list[socket.socket]]:
    """Give ten clients that wait in the listener's queue, each has sent its number."""
    clients = [connect(listener) for _ in range(10)]
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    yield clients
    for client in clients:
        client.close()


def answer(connections: list[Connection]) -> list[bytes]:
    """Answer and close the connections; returns what their clients had sent."""
    got = []
    for connection in connections:
        with connection:
            got.append(connection.recv(100))
            connection.sendall(got[-1])
    return got


def numbers(first: int, last: int) -> list[bytes]:
    return [b"%d" % number for number in range(first, last)]


# --- accept_many: how many ------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 5.0, 0.0])
def test_it_takes_all_that_are_queued(
    timeout: float | None, listener: Listener, queued: list[socket.socket]
) -> None:
    listener.settimeout(timeout)
    connections = listener.accept_many()
    assert all(type(connection) is Connection for connection in connections)
    assert [connection.peer for connection in connections] == [c.getsockname() for c in queued]
    assert listener.stats().active == 10
    assert answer(connections) == numbers(0, 10)
    assert [read_all(client) for client in queued] == numbers(0, 10)
    stats = listener.stats()
    assert (stats.accepted, stats.active) == (10, 0)
    assert listener.gettimeout() == timeout


@pytest.mark.parametrize("limit", [1, 3, 10, 11])
def test_the_limit_leaves_the_others_queued(
    limit: int, listener: Listener, queued: list[socket.socket]
) -> None:
    taken: list[bytes] = []
    while len(taken) < 10:
        some = answer(listener.accept_many(limit))
        assert len(some) == min(limit, 10 - len(taken))
        taken += some
    assert taken == numbers(0, 10)


def test_the_default_limit_is_64(listener: Listener) -> None:
    clients = [connect(listener) for _ in range(70)]
    try:
        for expected in (64, 6):
            connections = listener.accept_many()
            assert len(connections) == expected
            for connection in connections:
                connection.close()
    finally:
        for client in clients:
            client.close()


@pytest.mark.usefixtures("queued")
def test_what_it_leaves_is_for_accept_and_for_serve(listener: Listener) -> None:
    assert answer(listener.accept_many(2)) == numbers(0, 2)
    third, address = listener.accept()
    with third:
        assert third.recv(100) == b"2"
        assert third.getpeername() == address
        assert third.gettimeout() is None
    handled = []

    def handler(connection: Connection) -> None:
        handled.append(connection.recv(100))
        if len(handled) == 7:
            listener.stop()

    listener.serve(handler)
    assert handled == numbers(3, 10)


@pytest.mark.parametrize("limit", [0, -1, -(2**31)])
@pytest.mark.usefixtures("queued")
def test_a_limit_below_one_takes_nobody(limit: int, listener: Listener) -> None:
    with pytest.raises(ValueError, match=f"limit must be at least 1, not {limit}"):
        listener.accept_many(limit)
    assert answer(listener.accept_many()) == numbers(0, 10)


@pytest.mark.parametrize(("limit", "error"), [("5", TypeError), (1.5, TypeError), (2**40, OverflowError)])
def test_a_limit_that_is_no_number(limit: Any, error: type[Exception], listener: Listener) -> None:
    with pytest.raises(error):
        listener.accept_many(limit)


# --- accept_many: how long ------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_it_waits_for_the_first(timeout: float | None, listener: Listener) -> None:
    listener.settimeout(timeout)
    waiting = Serving(listener.accept_many)
    with connect(listener) as client:
        connections = waiting.wait()
        client.sendall(b"x")
        assert answer(connections) == [b"x"]


def test_a_time_that_is_over_is_timeouterror(listener: Listener) -> None:
    listener.settimeout(0.05)
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^timed out$"):
        listener.accept_many()
    assert 0.05 <= time.monotonic() - begin < 5


def test_nobody_there_is_blockingioerror(listener: Listener) -> None:
    listener.setblocking(False)
    with pytest.raises(BlockingIOError) as told:
        listener.accept_many()
    assert told.value.errno in (errno.EAGAIN, errno.EWOULDBLOCK)
    assert listener.stats().accepted == 0


def test_several_threads_take_each_client_once(listener: Listener) -> None:
    taken: list[bytes] = []
    listener.settimeout(0.2)

    def take() -> None:
        try:
            while True:
                taken.extend(answer(listener.accept_many(3)))
        except TimeoutError:
            return

    takers = [Serving(take) for _ in range(4)]
    for number in range(60):
        assert exchange(listener, b"%d" % number) == b"%d" % number
    for taker in takers:
        taker.wait()
    assert sorted(taken, key=int) == numbers(0, 60)


def test_another_process_s_accept_still_blocks(listener: Listener) -> None:
    # accept_many() and serve() make the description non-blocking, which all its descriptors share.
    with listener.dup() as other, connect(listener), connect(listener):
        for connection in listener.accept_many():
            connection.close()
        waiting = Serving(other.accept)
        waiting.thread.join(0.05)
        assert waiting.thread.is_alive()
        with connect(listener) as client:
            server, address = waiting.wait()
            with server:
                assert address == client.getsockname()


def test_accept_still_blocks_after_serve(listener: Listener) -> None:
    with serving(listener, echo):
        assert exchange(listener, b"x") == b"x"
    assert listener.gettimeout() is None
    waiting = Serving(listener.accept)
    waiting.thread.join(0.05)
    assert waiting.thread.is_alive()
    with connect(listener):
        server, _ = waiting.wait()
        server.close()


def test_the_default_timeout_is_the_connections(listener: Listener) -> None:
    socket.setdefaulttimeout(7.5)
    try:
        with connect(listener), listener.accept_many()[0] as connection:
            assert connection.gettimeout() == 7.5
    finally:
        socket.setdefaulttimeout(None)


@pytest.mark.usefixtures("queued")
def test_a_listener_that_is_closed_leaves_its_connections_open(listener: Listener) -> None:
    connections = listener.accept_many(10)
    listener.close()
    assert answer(connections) == numbers(0, 10)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        listener.accept_many()
    assert caught.value.errno == (errno.EBADF if os.name == "posix" else errno.ENOTSOCK)


# --- cost -----------------------------------------------------------------------------------------

COUNTED = """
import logging, os, socket, sys, threading  # the first serve() would import logging
import fastlisten
listener = fastlisten.bind(("127.0.0.1", 0))
address = listener.getsockname()
def clients(n):
    made = []
    for _ in range(n):
        client = socket.socket()
        client.connect(address)
        made.append(client)
    return made
def handler(connection):
    global left
    left -= 1
    if not left:
        listener.stop()
kept = [listener.accept() for _ in clients(1)]
for what in ("accept", "accept_many", "serve"):
    left = 20
    waiting = clients(left)
    os.access("begin-" + what, 0)
    if what == "accept":
        kept.append([listener.accept() for _ in range(left)])
    elif what == "accept_many":
        kept.append(listener.accept_many(left))
    else:
        listener.serve(handler)
    os.access("end-" + what, 0)
for connection in kept[-1]:
    connection.close()
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, collections.Counter[str]]:
    """Give the system calls that accept(), accept_many() and serve() make for 20 clients."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    log = tmp_path_factory.mktemp("strace") / "log"
    if run([strace, "-o", "/dev/null", "true"], status=None).returncode:
        pytest.skip("needs the right to trace processes")
    variables = [f"--env={name}={value}" for name, value in sanitizers().items()]
    run([strace, "-f", "-o", log, *variables, sys.executable, "-c", COUNTED], limit=50)
    found: dict[str, collections.Counter[str]] = {}
    for part in re.finditer(r"\"begin-(\w+)\".*?\n(.*?)\n[^\n]*\"end-", log.read_text(), re.DOTALL):
        lines = re.findall(r"^\d+ +(\w+)\(.*= (-?\d+)", part[2], re.MULTILINE)
        found[part[1]] = collections.Counter(
            name + (" failed" if result == "-1" else "")
            for name, result in lines
            if name not in ("brk", "mmap", "munmap", "madvise", "futex")  # the allocator's
        )
    return found


@needs("Linux")
def test_accept_is_two_system_calls(calls: dict[str, collections.Counter[str]]) -> None:
    # The other is socket.socket()'s own, when it is made of a descriptor.
    assert calls["accept"] == {"accept4": 20, "getsockname": 20}


@needs("Linux")
def test_accept_many_is_one_system_call_each(calls: dict[str, collections.Counter[str]]) -> None:
    # and one for all of them, that makes the listener non-blocking
    assert calls["accept_many"] == {"accept4": 20, "ioctl": 1}


@needs("Linux")
def test_serve_accepts_with_one_system_call(calls: dict[str, collections.Counter[str]]) -> None:
    counted = calls["serve"]
    assert counted.pop("accept4") == 20
    assert counted.pop("close") == 20 + 2  # the two ends of the wake-up
    assert counted["accept4 failed"] == counted["poll"] == 0
    # What is left is for serve() as a whole: the wake-up, the signals.
    assert sum(counted.values()) < 15, counted


# --- a wait that ends otherwise -------------------------------------------------------------------


def test_serve_takes_who_comes_while_another_thread_waits_in_accept(listener: Listener) -> None:
    accepted = threading.Event()

    def one() -> None:
        listener.accept()[0].close()
        accepted.set()

    waiting = Serving(one)
    with serving(listener, echo):
        # Whoever is quicker takes a client; accept() wants one only.
        def tried() -> bool:
            with contextlib.suppress(OSError):  # of accept()'s client: it is closed at once
                exchange(listener, b"x")
            return accepted.is_set()

        wait_until(tried)
        waiting.wait()
        assert exchange(listener, b"y") == b"y"
