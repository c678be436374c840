"""``python -m benchmarks.tls_load PORT CLIENTS ANSWERS REQUESTS SIZE``: the clients of a server of TLS.

Each sends `size` bytes and waits until they are back, again and again: so many times on a connection as
`requests` says, on one for all with 0. It says ready on a line, with the connections that are kept already
made, waits for a line, and prints how many answers it got. What it costs itself is not counted.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

from ._build import cache_folder

DAYS = 3650


def certificate() -> tuple[Path, Path]:
    """Return the files of a certificate for localhost and of its key, made once."""
    folder = cache_folder() / "certificate"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", str(DAYS))
        files = ("-keyout", str(unfinished / "key.pem"), "-out", str(unfinished / "cert.pem"))
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files]
        subprocess.run(command, check=True, capture_output=True)
        unfinished.rename(folder)
    return folder / "cert.pem", folder / "key.pem"


def server_context() -> ssl.SSLContext:
    """Return the context that every server of TLS has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate())
    return context


class Client:
    """A client, on one connection after the other."""

    def __init__(self, port: int, requests: int, size: int) -> None:
        self.port, self.requests, self.message = port, requests, bytes(size)
        self.asked = 0
        self.context = ssl.create_default_context(cafile=str(certificate()[0]))
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter | None = None

    async def connect(self) -> asyncio.StreamWriter:
        """Return what to write to, on a new connection if there is none."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(
                "127.0.0.1", self.port, ssl=self.context, server_hostname="localhost"
            )
            self.asked = 0
        return self.writer

    async def ask(self, count: int) -> None:
        """Send the message so often and have it back; close after `requests` on a connection."""
        for _ in range(count):
            writer = await self.connect()
            writer.write(self.message)
            await self.reader.readexactly(len(self.message))
            self.asked += 1
            if self.asked == self.requests:
                writer.close()
                await writer.wait_closed()
                self.writer = None


async def main(port: int, clients: int, answers: int, requests: int, size: int) -> None:
    """Run the clients."""
    crowd = [Client(port, requests, size) for _ in range(clients)]
    if not requests:
        await asyncio.gather(*(client.connect() for client in crowd))
    print("ready", flush=True)
    sys.stdin.readline()
    each = max(1, answers // clients)
    await asyncio.gather(*(client.ask(each) for client in crowd))
    print(each * clients, flush=True)
    sys.stdin.readline()  # its end comes when the server's clock was read
    for client in crowd:
        if client.writer is not None:
            client.writer.transport.abort()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
