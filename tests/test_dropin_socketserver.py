"""fastlisten.socketserver beside the original: names, serving, requests by hand, misuse."""

import contextvars
import os
import socket
import socketserver
import subprocess
import sys
import threading
import wsgiref.simple_server
import xmlrpc.client
import xmlrpc.server
from pathlib import Path

import pytest

import fastlisten
from fastlisten import socketserver as dropin
from helpers import LIMIT, LOOPBACK, NOBODYS, connect, exchange, needs
from helpers.socketservers import BOTH, THREADING, Echo, Served, server_class, serving

# --- names ----------------------------------------------------------------------------------------


def test_every_name_is_there_and_what_is_not_a_server_is_the_original():
    assert dropin.__all__ == socketserver.__all__
    ours = {name for name in dir(socketserver) if vars(dropin).get(name, socketserver) is not socketserver}
    for name in dir(socketserver):
        theirs = getattr(socketserver, name)
        if isinstance(theirs, type) and issubclass(theirs, socketserver.TCPServer):
            assert issubclass(getattr(dropin, name), theirs)
            assert repr(getattr(dropin, name)) == repr(theirs)
        elif name not in ours:
            assert getattr(dropin, name) is theirs
        assert name in dir(dropin)
    with pytest.raises(AttributeError):
        _ = dropin.no_such_name


def test_classes_stand_to_each_other_as_the_originals_do():
    names = [n for n in socketserver.__all__ if issubclass(getattr(socketserver, n), socketserver.BaseServer)]
    for one in names:
        for other in names:
            theirs = issubclass(getattr(socketserver, one), getattr(socketserver, other))
            assert issubclass(getattr(dropin, one), getattr(dropin, other)) == theirs, (one, other)


def test_a_changed_original_is_seen(monkeypatch):
    monkeypatch.setattr(socketserver, "BaseRequestHandler", Echo)
    assert dropin.BaseRequestHandler is Echo


# --- serving --------------------------------------------------------------------------------------


@THREADING
def test_tcp(threading_):
    with serving(server_class(dropin, threading_)(LOOPBACK, Echo)) as served:
        assert type(served.server.socket) is fastlisten.Listener
        for _ in range(20):
            assert exchange(served.server.server_address, b"hello\n") == b"hello\n"
        assert served.server.socket.stats().accepted == 20


@needs("unix sockets")
@THREADING
def test_unix(threading_, unix_path):
    with serving(server_class(dropin, threading_, "UnixStreamServer")(unix_path, Echo)):
        for _ in range(5):
            assert exchange(unix_path, b"hello\n") == b"hello\n"


@BOTH
@THREADING
def test_what_a_handler_gets(module, threading_):
    seen = []

    class Handler(module.BaseRequestHandler):
        def handle(self):
            seen.append((type(self.request), self.request.gettimeout(), self.client_address, self.server))
            self.request.sendall(b".")

    with serving(server_class(module, threading_)(LOOPBACK, Handler)) as served:
        with connect(served.server.server_address) as client:
            assert client.recv(10) == b"."
            assert client.recv(10) == b""
            address = client.getsockname()
        assert seen == [(socket.socket, None, address, served.server)]


def test_threads_are_kept_and_grow():
    met = threading.Barrier(9)
    threads = []

    class Handler(dropin.BaseRequestHandler):
        def handle(self):
            threads.append(threading.get_ident())
            if self.request.recv(1) == b"b":
                met.wait(LIMIT)

    with serving(dropin.ThreadingTCPServer(LOOPBACK, Handler)) as served:
        for _ in range(20):
            exchange(served.server.server_address, b"a")
        assert len(set(threads)) < 20
        clients = [connect(served.server.server_address) for _ in range(8)]
        for client in clients:
            client.sendall(b"b")
        met.wait(LIMIT)  # all eight at once
        for client in clients:
            assert client.recv(1) == b""
            client.close()


@BOTH
@pytest.mark.parametrize("daemon", [False, True])
def test_a_handlers_thread_is_what_it_would_be(module, daemon):
    variable = contextvars.ContextVar("variable", default=0)
    seen = []

    class Handler(module.BaseRequestHandler):
        def handle(self):
            seen.append((threading.current_thread().daemon, variable.get()))
            variable.set(variable.get() + 1)

    class Server(module.ThreadingTCPServer):
        daemon_threads = daemon

    with serving(Server(LOOPBACK, Handler)) as served:
        for _ in range(5):
            exchange(served.server.server_address, b"")
    assert seen == [(daemon, 0)] * 5


# --- attributes and handle_request ------------------------------------------------------------------


@BOTH
def test_handle_request_and_its_timeout(module):
    class Server(module.TCPServer):
        timeout = 0.01
        timeouts = 0

        def handle_timeout(self):
            self.timeouts += 1

    with Server(LOOPBACK, Echo) as server:
        assert server.handle_request() is None
        assert server.timeouts == 1
        with connect(server.server_address) as client:
            client.sendall(b"x\n")
            server.timeout = None
            assert server.handle_request() is None
            assert client.recv(9) == b"x\n"
        server.socket.settimeout(0.01)
        server.handle_request()
        assert server.timeouts == 2


@BOTH
def test_threaded_handle_request(module):
    with module.ThreadingTCPServer(LOOPBACK, Echo) as server, connect(server.server_address) as client:
        client.sendall(b"x\n")
        server.handle_request()
        assert client.recv(9) == b"x\n"


@needs("TCP_INFO of a listener")
def test_request_queue_size():
    class Server(dropin.TCPServer):
        request_queue_size = 17

    with dropin.TCPServer(LOOPBACK, Echo) as server:
        # 5 for many years; SOMAXCONN since CPython 3.15
        most = int(Path("/proc/sys/net/core/somaxconn").read_text())
        assert server.socket.stats().queue_limit == min(dropin.TCPServer.request_queue_size, most)
        assert dropin.TCPServer.request_queue_size == socketserver.TCPServer.request_queue_size
    with Server(LOOPBACK, Echo) as server:
        assert server.socket.stats().queue_limit == 17


@BOTH
@pytest.mark.parametrize("reuse", [False, True])
def test_reuse_options(module, reuse):
    class Server(module.TCPServer):
        allow_reuse_address = reuse
        allow_reuse_port = reuse

    with Server(LOOPBACK, Echo) as server:
        assert bool(server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)) == reuse
        if hasattr(socket, "SO_REUSEPORT"):
            assert bool(server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)) == reuse


@THREADING
@pytest.mark.parametrize(
    "act",
    [
        lambda server: server.serve_forever("soon"),
        lambda server: server.serve_forever(float("nan")),
        lambda server: server.serve_forever(1e30),
        lambda server: (server.server_close(), server.serve_forever()),
        lambda server: (server.server_close(), server.handle_request()),
        lambda server: server.server_bind(),
    ],
    ids=["str", "nan", "huge", "closed", "closed-once", "bind-twice"],
)
def test_misuse(threading_, act):
    outcomes = []
    for module in (socketserver, dropin):
        with server_class(module, threading_)(LOOPBACK, Echo) as server:
            with pytest.raises(Exception) as caught:  # noqa: PT011
                act(server)
            text = str(caught.value).replace(repr(server), "SERVER")
            outcomes.append((type(caught.value), getattr(caught.value, "errno", None), text))
    assert outcomes[0] == outcomes[1]


@THREADING
@pytest.mark.parametrize(
    "address",
    [
        *[("127.0.0.1", "80"), ("127.0.0.1", 70000), ["127.0.0.1", 0], None],
        pytest.param((NOBODYS, 0), marks=needs("addresses of others that cannot be bound")),
    ],
)
def test_addresses_that_cannot_be_bound(threading_, address):
    outcomes = []
    for module in (socketserver, dropin):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            server_class(module, threading_)(address, Echo)
        outcomes.append((type(caught.value), getattr(caught.value, "errno", None), str(caught.value)))
    assert outcomes[0] == outcomes[1]


# --- out of descriptors -------------------------------------------------------------------------------


EMFILE = """
import logging, os, resource, socket, sys, threading, time
from fastlisten import socketserver
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline())
class Server(socketserver.{base}):
    {body}
with Server(("127.0.0.1", 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    clients = [socket.socket() for _ in range(2)]
    clients[0].connect(server.server_address)
    clients[0].sendall(b"x\\n")
    assert clients[0].recv(9) == b"x\\n"
    assert clients[0].recv(9) == b""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    full = max(map(int, os.listdir("/proc/self/fd"))) + 1
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (full, hard))
    for _ in range(10):  # the server may not have closed its end of the first client yet
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            threading.Event().wait(0.02)
    clients[1].settimeout(20)
    clients[1].connect(server.server_address)
    clients[1].sendall(b"y\\n")
    start, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - start < 0.5:
        threading.Event().wait(0.1)
    print("cpu", time.process_time() - cpu)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert clients[1].recv(9) == b"y\\n"
    server.shutdown()
    thread.join()
"""


@needs("Linux")
@pytest.mark.parametrize("base", ["TCPServer", "ThreadingTCPServer"])
@pytest.mark.parametrize("body", ["pass", "def service_actions(self): pass"], ids=["loop", "original's loop"])
def test_out_of_descriptors_it_pauses(base, body):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EMFILE.format(base=base, body=body)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if "pauses" in line] == [
        "accepting pauses: [Errno 24] Too many open files"
    ]
    cpu = float(next(line for line in lines if line.startswith("cpu")).split()[1])
    assert cpu < 0.1, "the server spins"  # a spin would take all of 0.5 s


# --- datagrams and processes ---------------------------------------------------------------------------


@BOTH
@THREADING
def test_datagrams(module, threading_):
    class Handler(module.DatagramRequestHandler):
        def handle(self):
            self.wfile.write(self.rfile.read().upper())

    server = server_class(module, threading_, "UDPServer")(LOOPBACK, Handler)
    with (
        serving(server, poll_interval=0.01),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(LIMIT)
        client.sendto(b"hello", server.server_address)
        assert client.recv(99) == b"HELLO"


@needs("fork")
@BOTH
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_processes(module):
    with serving(module.ForkingTCPServer(LOOPBACK, Echo), poll_interval=0.01) as served:
        assert exchange(served.server.server_address, b"x\n") == b"x\n"


# --- classes written elsewhere --------------------------------------------------------------------------


@THREADING
def test_xmlrpc(threading_):
    bases = (dropin.AcceptMixIn, xmlrpc.server.SimpleXMLRPCServer)
    server = type("Server", ((socketserver.ThreadingMixIn,) if threading_ else ()) + bases, {})(
        LOOPBACK, logRequests=False
    )
    server.register_function(pow)
    with serving(server):
        with xmlrpc.client.ServerProxy("http://{}:{}/".format(*server.server_address)) as proxy:
            assert proxy.pow(2, 10) == 1024
        assert server._listener is not None  # the loop serves
    assert type(server.socket) is socket.socket


@THREADING
def test_wsgiref(threading_):
    def application(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [environ["PATH_INFO"].encode()]

    class Quiet(wsgiref.simple_server.WSGIRequestHandler):
        def log_message(self, *arguments):
            pass

    bases = (dropin.AcceptMixIn, wsgiref.simple_server.WSGIServer)
    server = type("Server", ((socketserver.ThreadingMixIn,) if threading_ else ()) + bases, {})(
        LOOPBACK, Quiet
    )
    server.set_app(application)
    with serving(server):
        answer = exchange(server.server_address, b"GET /hello HTTP/1.0\r\n\r\n")
        assert answer.endswith(b"\r\n\r\n/hello")
        assert server._listener is not None


def test_a_socket_of_a_strange_class_is_served_by_the_original():
    class Strange(socket.socket):
        def accept(self):
            sock, address = super().accept()
            sock.sendall(b"strange ")
            return sock, address

    with dropin.TCPServer(LOOPBACK, Echo, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = Strange(socket.AF_INET, socket.SOCK_STREAM)
        server.server_bind()
        server.server_activate()
        served = Served(server, poll_interval=0.01)
        assert exchange(server.server_address, b"x\n") == b"strange x\n"
        server.shutdown()
        assert served.wait() is None


def test_a_borrowed_descriptor_is_given_back_as_it_was():
    with socket.create_server(LOOPBACK) as listener:
        server = type("Server", (dropin.AcceptMixIn, socketserver.TCPServer), {})(LOOPBACK, Echo, False)
        server.socket.close()
        server.socket = listener
        served = Served(server)
        assert exchange(listener, b"x\n") == b"x\n"
        server.shutdown()
        assert served.wait() is None
        assert listener.fileno() >= 0
        if os.name == "posix":
            assert os.get_blocking(listener.fileno())
        with connect(listener):
            listener.accept()[0].close()
