"""A program in which clients come by every way, and have every fate; for those who watch its probes."""

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import fastlisten
from fastlisten import Admission, Listener, aio
from helpers import LIMIT, connect, echo, exchange, refusal, serving, wait_until

DRAIN = 20.0  # seconds


def accept(listener: Listener) -> None:
    with connect(listener):
        listener.accept()[0].close()


def accept_many(listener: Listener) -> None:
    with connect(listener), connect(listener):
        for connection in listener.accept_many():
            connection.close()


def threads(listener: Listener) -> None:
    with serving(listener, echo, threads=2):
        assert exchange(listener) == b"ping"


def denied(listener: Listener) -> None:
    with serving(listener, echo, admission=Admission(deny=["127.0.0.0/8"])):
        refusal(listener)
        wait_until(lambda: listener.stats().refused)


def overload(listener: Listener) -> None:
    """One has the handler, one waits, and the third is refused; the second is handled in a drain."""
    with serving(listener, echo, pending=1, busy=b"") as served:
        with connect(listener), connect(listener) as second:
            wait_until(lambda: listener.stats().pending_connections == 1)
            assert refusal(listener) == "reset"
            listener.stop(drain=DRAIN)
            second.shutdown(socket.SHUT_WR)
        served.wait()


def dropped(listener: Listener) -> None:
    with serving(listener, echo, pending=1, busy=b"") as served, connect(listener), connect(listener):
        wait_until(lambda: listener.stats().pending_connections == 1)
        listener.stop(drain=0)
        served.wait()


def asyncios(listener: Listener, **options: Any) -> None:
    """A server of an event loop, which drains."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    async def main() -> None:
        server = await aio.start_server(handle, sock=listener, **options)
        async with asyncio.timeout(LIMIT):
            await asyncio.to_thread(exchange, listener)
            server.close(drain=DRAIN)
            await server.wait_closed()

    asyncio.run(main())


def asyncios_overload(listener: Listener) -> None:
    asyncios(listener, busy=b"", pending=1)


def main() -> None:
    """Write to the file that is named, for each way to serve, its listener's descriptor and counters.

    The debugger is to be told where before anything is served, so the program stops itself first.
    """
    os.kill(os.getpid(), signal.SIGUSR1)
    ways = (accept, accept_many, threads, denied, overload, dropped, asyncios, asyncios_overload)
    listeners = [fastlisten.bind("127.0.0.1:0") for _ in ways]
    descriptors = [listener.fileno() for listener in listeners]
    told: dict[str, Any] = {}
    for way, listener, fd in zip(ways, listeners, descriptors, strict=True):
        way(listener)
        stats = listener.stats()
        told[way.__name__] = [fd, stats.accepted, stats.handled, dict(stats.refused_for), stats.dropped]
        listener.close()
    Path(sys.argv[1]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
