"""What a server does with one client, for everything that has recv and sendall."""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

BACKLOG = 4096
ADDRESS = ("127.0.0.1", 0)
QUESTION_LIMIT = 4096
HTTP_ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n"
)


class Client(Protocol):
    """The part of a socket that the handlers use."""

    def recv(self, size: int, /) -> bytes: ...

    def sendall(self, data: bytes, /) -> None: ...


Handler = Callable[[Any], None]


def close(connection: Client) -> None:
    """Do nothing: the server closes."""


def echo(connection: Client) -> None:
    """Send back what came."""
    connection.sendall(connection.recv(QUESTION_LIMIT))


def http(connection: Client) -> None:
    """Read a request up to the empty line, and answer it."""
    question = connection.recv(QUESTION_LIMIT)
    while b"\r\n\r\n" not in question:
        more = connection.recv(QUESTION_LIMIT)
        if not more:
            return
        question += more
    connection.sendall(HTTP_ANSWER)


RESET = struct.pack("ii", 1, 0)  # struct linger: on, 0 s


def shed(connection: socket.socket) -> None:
    """Have the close be a reset (SO_LINGER, socket(7))."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


STEPS = 20_000
"""Of a handler that computes: about a millisecond of Python."""


def compute(connection: Client) -> None:
    """Compute for a while, then send back what came."""
    question = connection.recv(QUESTION_LIMIT)
    total = 0
    for number in range(STEPS):
        total += number
    connection.sendall(question)


def messages(connection: Client) -> None:
    """Send back what comes until the client ends."""
    while data := connection.recv(QUESTION_LIMIT):
        connection.sendall(data)


HANDLERS: dict[str, Handler] = {
    "close": close,
    "compute": compute,
    "echo": echo,
    "http": http,
    "shed": shed,
    "tls": messages,
}


def take_on_demand(take: Callable[[int], Sequence[Any]]) -> None:
    """For each line N on standard input: take N queued clients, and print the CPU time in ns.

    `take(n)` returns n clients that were queued already; they are let go after the clock stopped.
    """
    for line in sys.stdin:
        count = int(line)
        start = time.process_time_ns()
        clients = take(count)
        elapsed = time.process_time_ns() - start
        if len(clients) != count:
            raise RuntimeError(f"asked for {count} clients, took {len(clients)}")
        print(elapsed, flush=True)
        for client in clients:
            client.close()
