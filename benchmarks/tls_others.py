"""``python -m benchmarks.tls_others PORT``: how long a server of TLS makes one client wait, beside others.

It says ready on a line, with a connection that it keeps. Then each line asks for something, and is answered
with a line of JSON, the times in seconds:

- ``echo N``: 64 bytes there and back on that connection, N times.
- ``new N``: a handshake, 64 bytes there and back, and a close, N times.
- ``storm N``: so many others send their first message at once, while the echo goes on, for STORM_SECONDS.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import sys
import time

from .tls_load import certificate

MESSAGE = bytes(64)
STORM_SECONDS = 0.12
"""A storm of 64 lasts about 0.1 s on one core, with an RSA key of 2,048 bits."""


class Client:
    """A client of a port of 127.0.0.1, with a connection that it keeps."""

    def __init__(self, port: int) -> None:
        self.address = "127.0.0.1", port
        self.context = ssl.create_default_context(cafile=str(certificate()[0]))
        self.kept = self.connect()

    def connect(self) -> ssl.SSLSocket:
        """Return a connection whose handshake is through; the caller closes it."""
        plain = socket.create_connection(self.address)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.context.wrap_socket(plain, server_hostname="localhost")

    def ask(self, connection: ssl.SSLSocket) -> None:
        """Send the message and have it back."""
        connection.sendall(MESSAGE)
        left = len(MESSAGE)
        while left:
            left -= len(connection.recv(left)) or sys.exit("the server has closed")

    def echo(self, count: int) -> list[float]:
        """Return how long each took."""
        times = []
        for _ in range(count):
            begun = time.perf_counter()
            self.ask(self.kept)
            times.append(time.perf_counter() - begun)
        return times

    def new(self, count: int) -> list[float]:
        """Return how long each took."""
        times = []
        for _ in range(count):
            begun = time.perf_counter()
            with self.connect() as connection:
                self.ask(connection)
            times.append(time.perf_counter() - begun)
        return times

    def first_message(self) -> bytes:
        """Return what a client sends first."""
        outgoing = ssl.MemoryBIO()
        session = self.context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
        with contextlib.suppress(ssl.SSLWantReadError):
            session.do_handshake()
        return outgoing.read()

    def storm(self, count: int) -> list[float]:
        """Return how long each echo took that began while the storm went on."""
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(socket.create_connection(self.address)) for _ in range(count)]
            messages = [self.first_message() for _ in others]
            self.echo(10)  # by now all are accepted
            for other, message in zip(others, messages, strict=True):
                other.sendall(message)
            times, end = [], time.perf_counter() + STORM_SECONDS
            while time.perf_counter() < end:
                times += self.echo(1)
        return times


def main(port: int) -> None:
    """Do what is asked for, until there is nothing more."""
    client = Client(port)
    print("ready", flush=True)
    for line in sys.stdin:
        act, count = line.split()
        print(json.dumps(getattr(client, act)(int(count))), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
