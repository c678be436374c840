"""fastlisten.socketserver calls the hooks of a server as the original does."""

import socketserver
import threading

import pytest

from fastlisten import socketserver as dropin
from helpers import LIMIT, LOOPBACK, exchange
from helpers.socketservers import BOTH, THREADING, Echo, Served, server_class, serving

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
