"""What the tests of serve() share."""

import itertools
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastlisten import Connection, Listener
from helpers import exchange, wait_until

# Inline, a fixed number and a range: where nothing else is said, all three do the same.
THREADS = [0, 1, 4, (1, 4)]
Queued = Callable[..., list[socket.socket]]


def number_of(connection: Connection) -> int:
    return int(connection.recv(100))


def answer(connection: Connection) -> None:
    connection.sendall(connection.recv(100))


def answered_once(target: Any, number: int, clients: int = 4) -> None:
    """Have some clients make `number` exchanges and check each answer."""

    def some(first: int) -> list[bytes]:
        return [exchange(target, b"%d" % n) for n in range(first, number, clients)]

    with ThreadPoolExecutor(clients) as pool:
        for first, answers in enumerate(pool.map(some, range(clients))):
            assert answers == [b"%d" % n for n in range(first, number, clients)]


def answered_until(enough: threading.Event, target: Any, clients: int = 4) -> int:
    """Have some clients make exchanges, each answer checked, until it is enough; return how many."""

    def some(first: int) -> int:
        for made in itertools.count():
            if enough.is_set():
                return made
            assert exchange(target, b"%d %d" % (first, made)) == b"%d %d" % (first, made)
        raise AssertionError("not reached")

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(some, range(clients)))


def one_more_is_accepted(listener: Listener) -> None:
    before = listener.stats().accepted
    wait_until(lambda: listener.stats().accepted > before)


# Each way in which serve() takes its clients.
MODES: dict[str, dict[str, Any]] = {
    "inline": {},
    "threads": {"threads": 2},
    "growing threads": {"threads": (1, 4)},
    "busy": {"busy": "reset", "pending": 10},
    "busy threads": {"busy": b"full", "pending": 10, "threads": 2},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
