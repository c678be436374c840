"""fastlisten.socketserver: shutdown, server_close and the end of the process."""

import contextlib
import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastlisten import socketserver as dropin
from helpers import LIMIT, LOOPBACK, connect, exchange, needs, posix_only, wait_until
from helpers.descriptors import out_of_descriptors
from helpers.internals import listener_of, pause_by
from helpers.programs import run
from helpers.socketservers import BOTH, THREADING, Echo, Served, server_class


@BOTH
@THREADING
def test_serve_again_after_shutdown(module: Any, threading_: bool) -> None:
    with server_class(module, threading_)(LOOPBACK, Echo) as server:
        for _ in range(3):
            served = Served(server)
            assert exchange(server.server_address, b"x\n") == b"x\n"
            server.shutdown()
            assert served.wait() is None


@BOTH
@THREADING
def test_shutdown_before_serve_forever(module: Any, threading_: bool) -> None:
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
def test_shutdown_after_a_serve_forever_that_could_not_begin(threading_: bool) -> None:
    """As in the original, whose loop has an end whatever comes out of it."""
    with server_class(dropin, threading_)(LOOPBACK, Echo) as server:
        server.first_bytes_timeout = "soon"
        assert isinstance(Served(server).wait(), TypeError)
        server.shutdown()  # else it waited for ever
        server.first_bytes_timeout = None
        assert Served(server).wait() is None  # that was asked to end
        served = Served(server)
        assert exchange(server.server_address, b"x\n") == b"x\n"
        server.shutdown()
        assert served.wait() is None


@THREADING
@pytest.mark.parametrize("plain", [True, False], ids=["our loop", "a class with a hook"])
def test_shutdown_ends_although_it_is_served_again_before_it_waits(threading_: bool, plain: bool) -> None:
    """Whoever serves in a loop can be so quick; the original's shutdown() waits for ever then."""

    class Late(threading.Event):
        """Waits only when the server serves again."""

        def wait(self, timeout: float | None = None) -> bool:
            wait_until(lambda: times == 2 and server._BaseServer__is_shut_down is not self)
            return super().wait(timeout)

    class Own(server_class(dropin, threading_)):  # type: ignore[misc]
        def get_request(self) -> Any:
            return super().get_request()

    times = 0

    def again() -> None:
        nonlocal times
        for times in (1, 2):  # noqa: B007
            server.serve_forever(0.01)

    with (server_class(dropin, threading_) if plain else Own)(LOOPBACK, Echo) as server:
        server._BaseServer__is_shut_down = Late()
        with ThreadPoolExecutor(2) as pool:
            serving = pool.submit(again)
            assert exchange(server.server_address, b"x\n") == b"x\n"
            pool.submit(server.shutdown).result(LIMIT)
            assert exchange(server.server_address, b"x\n") == b"x\n"
            server.shutdown()
            serving.result(LIMIT)


@THREADING
@pytest.mark.parametrize("by_hand", [False, True], ids=["serve_forever", "handle_request"])
def test_shutdown_in_a_handler(threading_: bool, by_hand: Any) -> None:
    returned = threading.Event()

    class Handler(dropin.BaseRequestHandler):
        def handle(self) -> None:
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
def test_shutdown_in_a_signal_handler(threading_: bool) -> None:
    with server_class(dropin, threading_)(LOOPBACK, Echo) as server:
        before = signal.signal(signal.SIGUSR1, lambda *_: server.shutdown())
        try:

            def client() -> None:
                exchange(server.server_address, b"x\n")
                os.kill(os.getpid(), signal.SIGUSR1)

            thread = threading.Thread(target=client)
            thread.start()
            server.serve_forever()
            thread.join(LIMIT)
        finally:
            signal.signal(signal.SIGUSR1, before)


@BOTH
def test_shutdown_leaves_handlers_at_work(module: Any) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
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
def test_server_close_that_does_not_wait(module: Any, attribute: Any) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            begun.set()
            go_on.wait(LIMIT)

        def finish(self) -> None:
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
def test_server_close_ends_serve_forever(threading_: bool) -> None:
    """The original goes on with a descriptor that is closed."""
    server = server_class(dropin, threading_)(LOOPBACK, Echo)
    served = Served(server)
    assert exchange(server.server_address, b"x\n") == b"x\n"
    server.server_close()
    assert served.wait() is None


@BOTH
def test_several_threads_serve(module: Any) -> None:
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
                if module is dropin and listener_of(server) is not None:
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
def test_exit_waits_for_handlers_and_not_for_idle_threads(module: Any) -> None:
    done = run(AT_EXIT.format(module=module), options=["-W", "ignore"])
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
def test_a_process_lives_while_a_thread_serves(module: Any) -> None:
    """serve_forever() in a thread that is no daemon outlives the main thread."""
    program = AT_EXIT.format(module=module).replace(", daemon=True", "")
    program = program.replace('print("handler done", flush=True)', "handled.set()")
    program = program.replace("begun.wait(10)", STOPPER)
    done = run(program, options=["-W", "ignore"])
    assert (done.stdout.split("\n"), done.stderr) == (["main done", "handler done", ""], "")


PACKAGE = os.path.dirname(dropin.__file__)


@pytest.mark.parametrize("plain", [False, True], ids=["Listener", "socket.socket"])
@THREADING
def test_server_close_comes_at_each_line_of_serve_forever(threading_: bool, plain: bool) -> None:
    """It said "Invalid file descriptor: -1" before it served."""

    class Handler(dropin.BaseRequestHandler):
        def handle(self) -> None:
            self.server.shutdown()

    def closes_at(step: int) -> bool:
        """Serve, and close at the step-th line; returns whether that line was reached."""
        server = server_class(dropin, threading_)(LOOPBACK, Handler)
        server.block_on_close = False  # for a handler that waits for this thread
        if plain:
            server.socket = socket.socket(fileno=server.socket.detach())

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal step
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            if event == "line":
                step -= 1
                if step == 0:
                    sys.settrace(None)
                    server.server_close()
            return trace

        with server, connect(server.socket):
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                server.serve_forever()
            finally:
                sys.settrace(before)
            server.shutdown()  # it is over, and nobody is waited for
        return step <= 0

    steps = 2  # whoever closes before the first one has closed before it began, which is a ValueError
    while closes_at(steps):
        steps += 1
    assert steps > 30


@THREADING
def test_server_close_comes_at_whatever_moment_of_serving(threading_: bool) -> None:
    """Also between the start of serve_forever() and its first accept, and while a thread is being started: it
    ends serving and waits for the handlers; it said "cannot join thread before it is started"."""
    at_work = threading.Semaphore(0)

    class Handler(dropin.BaseRequestHandler):
        def handle(self) -> None:
            at_work.release()
            self.request.recv(1)

    for clients in range(60):
        server = server_class(dropin, threading_)(LOOPBACK, Handler)
        with contextlib.ExitStack() as stack:
            for _ in range(clients % 6):
                stack.enter_context(connect(server.socket)).sendall(b"x")
            served = Served(server)
            if clients % 2 and clients % 6:
                assert at_work.acquire(timeout=LIMIT)
            server.server_close()
            error = served.wait()
            if not (clients % 2 and clients % 6) and isinstance(error, ValueError):
                continue  # it came before serve_forever(), which says so then, as the original's
            assert error is None


@needs("Linux")
@pytest.mark.parametrize(
    ("act", "end"),
    [("serve_forever", "shutdown"), ("handle_request", "shutdown"), ("handle_request", "server_close")],
)
def test_a_pause_of_get_request_is_cut_short(act: str, end: str) -> None:
    """It slept through shutdown(): up to 100 ms; here it is a minute, so that the test can tell."""
    pauses = threading.Event()

    def a_minute(error: OSError, attempt: int) -> float:
        pauses.set()
        return 60

    class Server(dropin.TCPServer):
        def service_actions(self) -> None:
            """What the original's loop is needed for, which calls get_request()."""

    with Server(LOOPBACK, Echo) as server, connect(server.server_address), ThreadPoolExecutor(1) as pool:
        pause_by(server, a_minute)
        pool.submit(int).result()  # the thread is there now
        with out_of_descriptors():
            acting = pool.submit(getattr(server, act))
            assert pauses.wait(LIMIT)
        getattr(server, end)()
        assert acting.result(LIMIT) is None
