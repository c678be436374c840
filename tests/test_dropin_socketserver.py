"""fastlisten.socketserver beside socketserver: the same program, the same outcome."""

import contextlib
import contextvars
import os
import signal
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
from helpers import LIMIT, NOBODYS, connect, exchange, needs, posix_only, wait_until

BOTH = pytest.mark.parametrize("module", [socketserver, dropin], ids=["original", "dropin"])
THREADING = pytest.mark.parametrize("threading_", [False, True], ids=["inline", "threads"])
LOOPBACK = ("127.0.0.1", 0)


class Echo(socketserver.StreamRequestHandler):
    """Answers one line with itself."""

    def handle(self):
        self.wfile.write(self.rfile.readline())


def server_class(module, threading_, kind="TCPServer"):
    """The TCPServer or UnixStreamServer of a module, or its threading variant."""
    return getattr(module, ("Threading" if threading_ else "") + kind)


class Served:
    """serve_forever() of a server in a thread, and what came out of it."""

    def __init__(self, server, **arguments):
        self.error = None
        self.server = server
        self.thread = threading.Thread(target=self._run, kwargs=arguments)
        self.thread.start()

    def _run(self, **arguments):
        try:
            self.server.serve_forever(**arguments)
        except BaseException as error:
            self.error = error

    def wait(self):
        """Wait for serve_forever() to end by itself, and return what it raised."""
        self.thread.join(LIMIT)
        assert not self.thread.is_alive(), "serve_forever() has not ended"
        return self.error


@contextlib.contextmanager
def serving(server, **arguments):
    """Serve in a thread; shut down and close at the end."""
    with server:
        served = Served(server, **arguments)
        try:
            yield served
        finally:
            if served.thread.is_alive():
                server.shutdown()
            error = served.wait()
        if error is not None:
            raise error


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


# --- hooks ----------------------------------------------------------------------------------------

HOOKS = (
    "get_request",
    "verify_request",
    "process_request",
    "process_request_thread",
    "finish_request",
    "shutdown_request",
    "close_request",
    "handle_error",
    "server_bind",
    "server_activate",
    "server_close",
)


def recording(base, names, calls):
    """A subclass that notes the calls of the hooks that it overrides."""

    def hook(name):
        def method(self, *arguments):
            calls.append(name)
            return getattr(super(made, self), name)(*arguments)

        return method

    made = type("Server", (base,), {name: hook(name) for name in names if hasattr(base, name)})
    return made


class Fails(socketserver.BaseRequestHandler):
    """Raises."""

    def handle(self):
        self.request.recv(9)
        raise ValueError("no")


@THREADING
@pytest.mark.parametrize("handler", [Echo, Fails])
@pytest.mark.parametrize("names", [*((name,) for name in HOOKS), HOOKS], ids=lambda names: names[-1])
def test_hooks_are_called_as_the_original_calls_them(threading_, handler, names, capsys):
    outcomes = []
    for module in (socketserver, dropin):
        calls = []
        server = recording(server_class(module, threading_), names, calls)(LOOPBACK, handler)
        with serving(server):
            for _ in range(3):
                exchange(server.server_address, b"x\n")
        outcomes.append(calls)
    # Threads may take turns between a handler's end and the next client.
    if threading_:
        outcomes = [sorted(calls) for calls in outcomes]
    assert outcomes[0] == outcomes[1]
    if handler is Fails and "handle_error" not in names:
        assert capsys.readouterr().err.count("ValueError: no") == 6


@BOTH
@THREADING
def test_a_request_that_is_not_verified_is_closed(module, threading_):
    class Server(server_class(module, threading_)):
        def verify_request(self, request, client_address):
            return client_address is None

    with serving(Server(LOOPBACK, Fails)) as served:
        assert exchange(served.server.server_address, b"") == b""


@BOTH
@THREADING
def test_get_request_that_wraps(module, threading_):
    class Wrapped:
        def __init__(self, sock):
            self.sock = sock

        def __getattr__(self, name):
            return getattr(self.sock, name)

    class Handler(module.BaseRequestHandler):
        def handle(self):
            self.request.sendall(type(self.request).__name__.encode())

    class Server(server_class(module, threading_)):
        def get_request(self):
            request, client_address = super().get_request()
            return Wrapped(request), client_address

    with serving(Server(LOOPBACK, Handler)) as served:
        assert exchange(served.server.server_address, b"") == b"Wrapped"


@BOTH
def test_get_request_that_fails_drops_the_error(module):
    class Server(module.TCPServer):
        failures = 3

        def get_request(self):
            if self.failures:
                self.failures -= 1
                raise OSError("not this time")
            return super().get_request()

    with serving(Server(LOOPBACK, Echo)) as served:
        assert exchange(served.server.server_address, b"x\n") == b"x\n"
        assert served.server.failures == 0


@BOTH
@THREADING
def test_hook_on_the_instance(module, threading_):
    with server_class(module, threading_)(LOOPBACK, Echo) as server:
        verified = []
        server.verify_request = lambda request, client_address: verified.append(client_address) or True
        served = Served(server)
        assert exchange(server.server_address, b"x\n") == b"x\n"
        server.shutdown()
        served.wait()
    assert len(verified) == 1


@BOTH
@THREADING
def test_service_actions(module, threading_):
    again = threading.Semaphore(0)

    class Server(server_class(module, threading_)):
        def service_actions(self):
            again.release()

    with serving(Server(LOOPBACK, Echo), poll_interval=0.01) as served:
        for _ in range(5):
            assert again.acquire(timeout=LIMIT)
        assert exchange(served.server.server_address, b"x\n") == b"x\n"


@BOTH
def test_process_request_that_hands_on(module):
    """To threads of its own, as process_request_thread() is documented to allow."""
    threads = []

    class Server(module.ThreadingMixIn, module.TCPServer):
        def process_request(self, request, client_address):
            thread = threading.Thread(
                target=self.process_request_thread, args=(request, client_address), name="mine"
            )
            threads.append(thread)
            thread.start()

    with serving(Server(LOOPBACK, Echo)) as served:
        assert exchange(served.server.server_address, b"x\n") == b"x\n"
        threads[0].join(LIMIT)
    assert [thread.name for thread in threads] == ["mine"]


@BOTH
@pytest.mark.parametrize("hook", ["verify_request", "handle_error"])
def test_what_a_hook_raises_comes_out(module, hook):
    def fail(self, request, client_address):
        module.TCPServer.shutdown_request(self, request)
        raise LookupError(hook)

    server = type("Server", (module.TCPServer,), {hook: fail})(LOOPBACK, Fails)
    with server:
        served = Served(server)
        exchange(server.server_address, b"")
        error = served.wait()
    assert isinstance(error, LookupError)
    assert str(error) == hook


@BOTH
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_exits_come_out_of_an_inline_server(module, error):
    class Handler(module.BaseRequestHandler):
        def handle(self):
            raise error(3)

    with module.TCPServer(LOOPBACK, Handler) as server:
        served = Served(server)
        assert exchange(server.server_address, b"") == b""
        assert type(served.wait()) is error


@BOTH
@pytest.mark.filterwarnings("default::pytest.PytestUnhandledThreadExceptionWarning")
def test_exits_end_a_handlers_thread_only(module, monkeypatch):
    hooked = []
    monkeypatch.setattr(threading, "excepthook", lambda args: hooked.append(args.exc_type))

    class Handler(module.BaseRequestHandler):
        def handle(self):
            raise {b"s": SystemExit, b"k": KeyboardInterrupt, b"g": GeneratorExit}[self.request.recv(1)]

    with serving(module.ThreadingTCPServer(LOOPBACK, Handler)) as served:
        for what in (b"s", b"k", b"g"):
            assert exchange(served.server.server_address, what) == b""
    assert set(hooked) == {SystemExit, KeyboardInterrupt, GeneratorExit}  # threads may take turns
    assert len(hooked) == 3


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


# --- stopping ---------------------------------------------------------------------------------------


@BOTH
@THREADING
def test_serve_again_after_shutdown(module, threading_):
    with server_class(module, threading_)(LOOPBACK, Echo) as server:
        for _ in range(3):
            served = Served(server)
            assert exchange(server.server_address, b"x\n") == b"x\n"
            server.shutdown()
            assert served.wait() is None


@BOTH
@THREADING
def test_shutdown_before_serve_forever(module, threading_):
    with server_class(module, threading_)(LOOPBACK, Echo) as server:
        stopper = threading.Thread(target=server.shutdown)
        stopper.start()
        wait_until(lambda: server._BaseServer__shutdown_request)
        assert Served(server).wait() is None
        stopper.join(LIMIT)
        assert not stopper.is_alive()
        served = Served(server)  # the request was answered
        assert exchange(server.server_address, b"x\n") == b"x\n"
        server.shutdown()
        served.wait()


@THREADING
@pytest.mark.parametrize("by_hand", [False, True], ids=["serve_forever", "handle_request"])
def test_shutdown_in_a_handler(threading_, by_hand):
    returned = threading.Event()

    class Handler(dropin.BaseRequestHandler):
        def handle(self):
            self.server.shutdown()
            returned.set()

    with server_class(dropin, threading_)(LOOPBACK, Handler) as server:
        if by_hand:
            with connect(server.server_address):
                server.handle_request()
                assert returned.wait(LIMIT)
        else:
            served = Served(server)
            exchange(server.server_address, b"")
            assert served.wait() is None
            assert returned.wait(LIMIT)


@posix_only("a signal that a test sends itself")
@THREADING
def test_shutdown_in_a_signal_handler(threading_):
    with server_class(dropin, threading_)(LOOPBACK, Echo) as server:
        before = signal.signal(signal.SIGUSR1, lambda *_: server.shutdown())
        try:

            def client():
                exchange(server.server_address, b"x\n")
                os.kill(os.getpid(), signal.SIGUSR1)

            thread = threading.Thread(target=client)
            thread.start()
            server.serve_forever()
            thread.join(LIMIT)
        finally:
            signal.signal(signal.SIGUSR1, before)


@BOTH
def test_shutdown_leaves_handlers_at_work(module):
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    class Handler(module.BaseRequestHandler):
        def handle(self):
            begun.set()
            go_on.wait(LIMIT)
            self.request.sendall(b"done")
            done.set()

    with module.ThreadingTCPServer(LOOPBACK, Handler) as server:
        served = Served(server)
        with connect(server.server_address) as client:
            assert begun.wait(LIMIT)
            server.shutdown()
            assert served.wait() is None
            assert not done.is_set()
            closer = threading.Thread(target=server.server_close)
            closer.start()
            closer.join(0.05)
            assert closer.is_alive()  # it waits for the handler
            go_on.set()
            closer.join(LIMIT)
            assert not closer.is_alive()
            assert done.is_set()
            assert client.recv(9) == b"done"


@BOTH
@pytest.mark.parametrize("attribute", ["block_on_close", "daemon_threads"])
def test_server_close_that_does_not_wait(module, attribute):
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    class Handler(module.BaseRequestHandler):
        def handle(self):
            begun.set()
            go_on.wait(LIMIT)

        def finish(self):
            self.request.close()  # not later, in a thread that nobody joins
            done.set()

    server = type("Server", (module.ThreadingTCPServer,), {attribute: attribute == "daemon_threads"})(
        LOOPBACK, Handler
    )
    served = Served(server)
    with connect(server.server_address):
        assert begun.wait(LIMIT)
        server.shutdown()
        served.wait()
        server.server_close()
        assert not done.is_set()
        go_on.set()
        assert done.wait(LIMIT)


@THREADING
def test_server_close_ends_serve_forever(threading_):
    """The original goes on with a descriptor that is closed."""
    server = server_class(dropin, threading_)(LOOPBACK, Echo)
    served = Served(server)
    assert exchange(server.server_address, b"x\n") == b"x\n"
    server.server_close()
    assert served.wait() is None


@BOTH
def test_several_threads_serve(module):
    class Server(module.TCPServer):
        timeout = None

    with Server(LOOPBACK, Echo) as server:
        several = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for _ in range(3)]
        for thread in several:
            thread.start()
        for _ in range(10):
            assert exchange(server.server_address, b"x\n") == b"x\n"
        for thread in several:  # each loop's end is one shutdown's, and one may wait for a client
            while thread.is_alive():
                server._BaseServer__shutdown_request = True
                if module is dropin and server._listener is not None:
                    server.shutdown()
                with contextlib.suppress(OSError):
                    connect(server.server_address).close()
                thread.join(0.02)


AT_EXIT = """
import sys, threading, time
from {module} import ThreadingTCPServer, BaseRequestHandler
from socket import create_connection
begun = threading.Event()
class Handler(BaseRequestHandler):
    def handle(self):
        begun.set()
        while self.request.recv(1):
            pass
        print("handler done", flush=True)
server = ThreadingTCPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = create_connection(server.server_address)
begun.wait(10)
threading.Timer(0.05, client.close).start()
print("main done", flush=True)
"""


@pytest.mark.parametrize("module", ["socketserver", "fastlisten.socketserver"])
def test_exit_waits_for_handlers_and_not_for_idle_threads(module):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AT_EXIT.format(module=module)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout.split("\n"), done.stderr) == (["main done", "handler done", ""], "")


# A thread that is started early: from Python 3.12 on none can be when the main thread has ended.
STOPPER = """
handled = threading.Event()
def stop():
    handled.wait(10)
    print("handler done", flush=True)
    server.shutdown()
threading.Thread(target=stop).start()
begun.wait(10)
"""


@pytest.mark.parametrize("module", ["socketserver", "fastlisten.socketserver"])
def test_a_process_lives_while_a_thread_serves(module):
    """serve_forever() in a thread that is no daemon outlives the main thread."""
    program = AT_EXIT.format(module=module).replace(", daemon=True", "")
    program = program.replace('print("handler done", flush=True)', "handled.set()")
    program = program.replace("begun.wait(10)", STOPPER)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout.split("\n"), done.stderr) == (["main done", "handler done", ""], "")


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
