"""Every way that fastlisten serves."""

from __future__ import annotations

import asyncio
import importlib
import socket
import threading
from typing import Any, NoReturn

import fastlisten

from .handlers import ADDRESS, BACKLOG, HANDLERS, QUESTION_LIMIT, take_on_demand

TLS_PATIENCE = 60.0
"""Seconds for a handshake, as asyncio's servers have it: a sample ends before."""


def _listen() -> fastlisten.Listener:
    listener = fastlisten.bind(ADDRESS, backlog=BACKLOG)
    print(listener.getsockname()[1], flush=True)
    return listener


def serve(work: str, least: int, most: int | None = None) -> None:
    """Listener.serve, inline, or with so many threads, or with threads between two numbers."""
    options: dict[str, Any] = {}
    if work == "tls":
        context = importlib.import_module("benchmarks.tls_load").server_context()
        options.update(ssl=context, handshake_timeout=TLS_PATIENCE)
    _listen().serve(HANDLERS[work], threads=least if most is None else (least, most), **options)


def iterate(work: str) -> None:
    """for connection in listener."""
    if work == "hold":
        held = []
        for connection in _listen():
            held.append(connection)
    handler = HANDLERS[work]
    for connection in _listen():
        handler(connection)
        connection.close()


def iterate_async(work: str) -> None:
    """async for connection in listener."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        connection: Any  # what the loop's sock_ methods take, for which asyncio's stubs ask for a socket
        async for connection in _listen():
            if work == "echo":
                await loop.sock_sendall(connection, await loop.sock_recv(connection, QUESTION_LIMIT))
            connection.close()

    asyncio.run(main())


def refuse(_: str) -> None:
    """Listener.serve with pending and busy: one handler, which a client of our own keeps for ever."""
    listener = fastlisten.bind(ADDRESS, backlog=BACKLOG)

    def handler(_: fastlisten.Connection) -> NoReturn:
        print(listener.getsockname()[1], flush=True)  # from here on everybody else is refused
        while True:
            threading.Event().wait()

    with socket.create_connection(listener.getsockname()):
        listener.serve(handler, pending=0, busy="reset")


def admit(_: str) -> None:
    """Listener.serve with admission: of the clients, one source, hardly anybody may come in."""
    _listen().serve(fastlisten.Connection.close, admission=fastlisten.Admission(rate=1, burst=1))


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
