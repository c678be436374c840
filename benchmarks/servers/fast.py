"""Every way that fastlisten serves."""

from __future__ import annotations

import socket
import threading
from typing import Any, NoReturn

import fastlisten

from .handlers import ADDRESS, BACKLOG, HANDLERS, take_on_demand


def _listen() -> fastlisten.Listener:
    listener = fastlisten.bind(ADDRESS, backlog=BACKLOG)
    print(listener.getsockname()[1], flush=True)
    return listener


def serve(work: str, threads: int) -> None:
    """Listener.serve, inline or with threads."""
    _listen().serve(HANDLERS[work], threads=threads)


def refuse(_: str) -> None:
    """Listener.serve with pending and busy: one handler, which a client of our own keeps for ever."""
    listener = fastlisten.bind(ADDRESS, backlog=BACKLOG)

    def handler(_: fastlisten.Connection) -> NoReturn:
        print(listener.getsockname()[1], flush=True)  # from here on everybody else is refused
        while True:
            threading.Event().wait()

    with socket.create_connection(listener.getsockname()):
        listener.serve(handler, pending=0, busy="reset")


def accept_many_loop(work: str, limit: int) -> None:
    """Listener.accept_many(limit) in a loop."""
    listener = _listen()
    accept_many = listener.accept_many

    def take(count: int) -> list[fastlisten.Connection]:
        clients: list[fastlisten.Connection] = []
        while len(clients) < count:
            clients += accept_many(min(limit, count - len(clients)))
        return clients

    if work == "take":
        take_on_demand(take)
        return
    if work == "hold":
        held: list[Any] = []
        while True:
            held += accept_many(limit)
    handler = HANDLERS[work]
    while True:
        for connection in accept_many(limit):
            handler(connection)
            connection.close()
