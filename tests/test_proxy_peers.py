"""Other people's programs that send PROXY headers: HAProxy, nginx and curl, before each way of serving."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastlisten import Admission, Proxy, aio, bind, socketserver
from helpers import (
    LIMIT,
    LOOPBACK,
    connect,
    needs,
    probes,
    read_all,
    serving,
    socketservers,
    wait_until,
)
from helpers.certificates import Pair, client_context
from helpers.internals import listener_of
from helpers.programs import run, running

LOCAL = Proxy(["127.0.0.1"], timeout=LIMIT)
HEAD = b"HTTP/1.0 200 OK\r\n\r\n"


def seen(peer: Any, proxy: Any, data: bytes) -> bytes:
    """Return what a server was told of a client, as JSON behind the head of an answer."""
    ssl = proxy and proxy.ssl
    told = {
        "peer": peer,
        "version": proxy and proxy.version,
        "local": proxy and proxy.local,
        "destination": proxy and proxy.destination,
        "authority": proxy and proxy.authority,
        "id": proxy and (proxy.unique_id or b"").decode(),
        "tls": ssl and ssl.version,
        "data": data.decode(),
    }
    return HEAD + json.dumps(told, default=str).encode()


class Tell(socketserver.BaseRequestHandler):
    """For a drop-in, which knows the client and no more."""

    def handle(self) -> None:
        self.request.sendall(seen(self.client_address, None, self.request.recv(1000)))


class Protocol(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        ask = self.transport.get_extra_info
        self.transport.write(seen(ask("peername"), ask("proxy"), data))
        self.transport.close()


def tell(connection: Any) -> None:
    connection.sendall(seen(connection.peer, connection.proxy, connection.recv(1000)))


Way = Callable[..., Any]


@contextlib.contextmanager
def served(**options: Any) -> Iterator[tuple[int, Callable[[], Any]]]:
    with bind(LOOPBACK) as listener, serving(listener, tell, proxy=LOCAL, **options):
        yield listener.getsockname()[1], listener.stats


@contextlib.contextmanager
def dropped_in(**options: Any) -> Iterator[tuple[int, Callable[[], Any]]]:
    names = {"first_bytes": "first_bytes_timeout", "admission": "admission_control"}
    attributes = {"proxy_protocol": LOCAL} | {names[name]: value for name, value in options.items()}
    kind: Any = type("Server", (socketserver.ThreadingTCPServer,), attributes)
    with kind(("127.0.0.1", 0), Tell) as server, socketservers.serving(server):
        wait_until(lambda: listener_of(server))
        yield server.server_address[1], lambda: listener_of(server).stats()


@contextlib.contextmanager
def awaited(**options: Any) -> Iterator[tuple[int, Callable[[], Any]]]:
    ready, over = threading.Event(), threading.Event()
    made: list[Any] = []

    async def main() -> None:
        async with await aio.create_server(Protocol, "127.0.0.1", 0, proxy=LOCAL, **options) as server:
            made.append(server)
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=[main()])
    thread.start()
    try:
        assert ready.wait(LIMIT)
        yield made[0].sockets[0].getsockname()[1], made[0].stats
    finally:
        over.set()
        thread.join()


WAYS: dict[str, Way] = {
    "serve": served,
    "first bytes": lambda **options: served(first_bytes=LIMIT, **options),
    "threads": lambda **options: served(threads=2, admission=Admission(concurrent=9), **options),
    "asyncio": awaited,
    "drop-in": dropped_in,
}
all_ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def told(answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.removeprefix(HEAD))
    return found


@needs("the curl command")
@all_ways
def test_curl(way: Way) -> None:
    """Version 1, with the address that curl itself has: the same in both."""
    with way() as (port, _):
        for _ in range(3):
            command = ["curl", "-sS", "--http1.0", "--haproxy-protocol", "-w", "\n%{local_port}"]
            answer, own_port = run([*command, f"http://127.0.0.1:{port}/"]).stdout.splitlines()
            found = json.loads(answer)
            assert found["peer"] == ["127.0.0.1", int(own_port)]
            assert found["version"] in (1, None)
            assert found["data"].startswith("GET / HTTP/1.0\r\n")


# --- HAProxy

HAPROXY = """
defaults
    mode tcp
    timeout connect 9s
    timeout client 9s
    timeout server 9s
    unique-id-format id-%%ci
listen v1
    bind fd@%(v1)d
    server s 127.0.0.1:%(port)d send-proxy
listen v2
    bind fd@%(v2)d
    server s 127.0.0.1:%(port)d send-proxy-v2
listen tls
    bind fd@%(tls)d ssl crt %(pem)s
    server s 127.0.0.1:%(port)d send-proxy-v2-ssl-cn proxy-v2-options crc32c,unique-id,authority
listen checks
    bind fd@%(checks)d
    server s 127.0.0.1:%(port)d send-proxy-v2 check inter 20ms
"""
NAMES = ("v1", "v2", "tls", "checks")


@contextlib.contextmanager
def haproxy(port: int, pair: Pair, folder: Path) -> Iterator[dict[str, Any]]:
    """Run HAProxy before a server, until the block ends; its addresses are given."""
    (folder / "both.pem").write_text(pair.cert.read_text() + pair.key.read_text())
    program = probes.haproxy()
    assert program is not None
    with contextlib.ExitStack() as stack:
        listening = {name: stack.enter_context(socket.create_server(("127.0.0.1", 0))) for name in NAMES}
        numbers = {name: sock.fileno() for name, sock in listening.items()}
        text = HAPROXY % {"port": port, "pem": folder / "both.pem", **numbers}
        (folder / "haproxy.cfg").write_text(text)
        command = [program, "-db", "-f", str(folder / "haproxy.cfg")]
        stack.enter_context(running(command, folder=folder, pass_fds=tuple(numbers.values())))
        yield {name: sock.getsockname() for name, sock in listening.items()}


def told_by(address: Any) -> dict[str, Any]:
    """Come by a proxy; what the server was told is checked for who has come."""
    with connect(address) as client:
        client.sendall(b"hello")
        found = told(read_all(client))
        assert found["peer"] == [*client.getsockname()]
    assert found["data"] == "hello"
    return found


@needs("haproxy", "the openssl command")
@all_ways
def test_haproxy(way: Way, pair: Pair, tmp_path: Path) -> None:
    with way() as (port, stats), haproxy(port, pair, tmp_path) as addresses:
        for name, version in [("v1", 1), ("v2", 2), ("v1", 1)]:
            found = told_by(addresses[name])
            assert found["version"] in (version, None)
            assert found["version"] is None or found["destination"] == [*addresses[name]]
        with (
            connect(addresses["tls"]) as plain,
            client_context(pair).wrap_socket(plain, server_hostname="localhost") as client,
        ):
            client.sendall(b"secret")
            found = told(read_all(client))
            assert (found["peer"], found["data"]) == ([*plain_name(client)], "secret")
            if found["version"] is not None:
                assert (found["authority"], found["id"]) == ("localhost", "id-127.0.0.1")
                assert found["tls"].startswith("TLSv1")
        # Its health checks are connections of its own, LOCAL, which end with a reset before they say a word.
        wait_until(lambda: stats().accepted > 8)
        assert told_by(addresses["checks"])["data"] == "hello"
        assert "invalid PROXY header" not in stats().refused_for


def plain_name(client: Any) -> tuple[str, int]:
    name: tuple[str, int] = client.getsockname()
    return name


@needs("haproxy", "the openssl command")
def test_haproxy_s_clients_are_asked_about(pair: Pair, tmp_path: Path) -> None:
    admission = Admission(concurrent=1)
    with served(threads=4, admission=admission) as (port, stats), haproxy(port, pair, tmp_path) as addresses:
        with connect(addresses["v2"]) as first:
            first.sendall(b"")
            wait_until(lambda: admission.stats().open == 1)
            with connect(addresses["v1"]) as second:
                with contextlib.suppress(OSError):
                    second.sendall(b"hello")
                with contextlib.suppress(ConnectionResetError):
                    assert read_all(second) == b""
            first.sendall(b"hello")
            assert told(read_all(first))["data"] == "hello"
        wait_until(lambda: admission.stats().open == 0)
        assert stats().refused_for["concurrent"] == 1


# --- nginx

NGINX = """
%(module)s
worker_processes 1;
daemon off;
master_process off;
pid nginx.pid;
error_log stderr warn;
events { worker_connections 200; }
stream {
    server {
        listen unix:%(folder)s/s;
        proxy_pass 127.0.0.1:%(port)d;
        proxy_protocol on;
    }
    server {
        listen 127.0.0.1:%(own)d;
        proxy_pass 127.0.0.1:%(port)d;
        proxy_protocol on;
    }
}
"""


@needs("nginx with its stream module")
@all_ways
def test_nginx(way: Way, tmp_path: Path) -> None:
    """Version 1; of a client that came by a unix socket it says UNKNOWN, and it is the peer."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        own = probe.getsockname()
    found_nginx = probes.nginx_stream()
    assert found_nginx is not None
    program, module = found_nginx
    with way() as (port, _):
        text = NGINX % {"module": module, "folder": tmp_path, "port": port, "own": own[1]}
        (tmp_path / "nginx.conf").write_text(text)
        command = [program, "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
        with running(command, folder=tmp_path):
            wait_until((tmp_path / "nginx.pid").exists)
            for _ in range(3):
                assert told_by(own)["version"] in (1, None)
            with connect(str(tmp_path / "s")) as client:
                client.sendall(b"hello")
                found = told(read_all(client))
            assert (found["peer"][0], found["data"]) == ("127.0.0.1", "hello")
