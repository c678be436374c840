"""A TLS client whose records a test sees and sends itself: a session in memory beside a blocking socket."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, TypeVar

from helpers.aio import in_thread
from helpers.sockets import connect

T = TypeVar("T")

APPLICATION_DATA = 23  # a record's type: RFC 8446, 5.1


class TlsClient:
    """A client of `address`; close() it, or use it in a `with`.  received: all that the server has sent."""

    def __init__(self, address: Any, context: ssl.SSLContext) -> None:
        self.socket = connect(address)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.session = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self.received = b""

    def __enter__(self) -> "TlsClient":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()

    def flush(self) -> None:
        """Send what is to be sent."""
        data = self.outgoing.read()
        if data:
            self.socket.sendall(data)

    def feed(self) -> None:
        """Receive once; EOFError when the server has ended its side."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise EOFError
        self.received += data
        self.incoming.write(data)

    def until(self, act: Callable[..., T], *arguments: Any) -> T:
        """Do it, with as much sending and receiving as it takes."""
        while True:
            try:
                return act(*arguments)
            except ssl.SSLWantReadError:
                self.flush()
                self.feed()
            finally:
                self.flush()

    def shake_hands(self) -> "TlsClient":
        self.until(self.session.do_handshake)
        return self

    def begin(self) -> None:
        """Send the ClientHello, and wait for no answer."""
        try:
            self.session.do_handshake()
        except ssl.SSLWantReadError:
            self.flush()

    def send(self, data: bytes) -> None:
        self.session.write(data)
        self.flush()

    def read(self, size: int) -> bytes:
        """So many bytes, fewer when the server's close_notify comes before; EOFError for an end without."""
        data = b""
        while len(data) < size:
            try:
                part = self.until(self.session.read, size - len(data))
            except ssl.SSLZeroReturnError:
                break
            if not part:
                break
            data += part
        return data

    def unwrap(self) -> None:
        """Exchange close_notify."""
        self.until(self.session.unwrap)

    def records(self) -> list[tuple[int, int]]:
        """The type and the length of each record that the server has sent."""
        found, at = [], 0
        while at < len(self.received):
            length = int.from_bytes(self.received[at + 3 : at + 5], "big")
            found.append((self.received[at], length))
            at += 5 + length
        return found


@contextlib.asynccontextmanager
async def opened(serving: Any, context: ssl.SSLContext) -> AsyncIterator[TlsClient]:
    """A client of a server whose handshake is through."""
    with TlsClient(serving.address, context) as client:
        await in_thread(client.shake_hands)
        yield client


async def ended(serving: Any) -> None:
    """Wait until a connection was accepted, and none is left."""
    while not (stats := serving.server.stats()).accepted or stats.active:
        await asyncio.sleep(0.001)
