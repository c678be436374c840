"""serve(): Ctrl-C at any step, and an interpreter that exits meanwhile."""

import _thread
import contextlib
import signal
import time
from typing import Any

import pytest

from fastlisten import Listener
from helpers import LIMIT, Serving, connect, echo, exchange, needs, serving, wait_until
from helpers.programs import line_of, running, wait_until_asleep
from helpers.serve import THREADS


@pytest.mark.parametrize("threads", THREADS)
def test_an_interrupt_ends_an_idle_serve_at_once(threads: Any, listener: Listener) -> None:
    """In the main thread, as Ctrl-C on every system: the interpreter's own wake-up is what counts."""

    def client() -> None:
        assert exchange(listener, b"up") == b"up"
        wait_until(lambda: listener.stats().active == 0)
        _thread.interrupt_main()

    clients = Serving(client)
    with pytest.raises(KeyboardInterrupt):
        listener.serve(echo, threads=threads)
    clients.wait()
    assert listener.stats().active == 0
    with serving(listener, echo, threads=threads):
        assert exchange(listener, b"again") == b"again"


INTERRUPTED = """
import fastlisten, sys
listener = fastlisten.bind(("127.0.0.1", 0))
kind, threads = sys.argv[1], int(sys.argv[2])
def handler(connection):
    connection.sendall(connection.recv(100))
    if kind == "computing":
        while True:
            pass
    if kind == "receiving":
        connection.recv(100)
print(listener.getsockname()[1], flush=True)
try:
    listener.serve(handler, threads=threads)
except KeyboardInterrupt:
    print("KeyboardInterrupt", listener.stats().handled, flush=True)
listener.close()
"""


@needs("signals between processes")
@pytest.mark.parametrize("threads", [0, 4])
@pytest.mark.parametrize("kind", ["idle", "receiving", "computing"])
def test_ctrl_c_ends_serve_whatever_the_handlers_do(kind: str, threads: int) -> None:
    with running(INTERRUPTED, kind, str(threads)) as process:
        with connect(("127.0.0.1", int(line_of(process)))) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            if kind != "computing":
                wait_until_asleep(process)
            begin = time.perf_counter()
            process.send_signal(signal.SIGINT)
            told = line_of(process)
            took = time.perf_counter() - begin
        out, err = process.communicate(timeout=LIMIT)
    assert told.startswith("KeyboardInterrupt"), (out, err)
    assert took < LIMIT, took
    assert process.returncode == 0
    if kind != "computing":  # a thread that computes still does so when the interpreter ends
        assert "Traceback" not in err


INTERRUPTED_AT = """
import ast, os, signal, sys, threading, fastlisten
options = ast.literal_eval(sys.argv[1])

def serve_interrupted_at(step):
    def count(frame, event, argument):
        nonlocal step
        # What a weak reference's callback raises is told and dropped, by Python itself.
        if event not in ("call", "c_return") or frame.f_code.co_name == "_remove":
            return
        step -= 1
        if step == 0:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    with fastlisten.bind(("127.0.0.1", 0)) as listener:
        listener.stop()  # so that it ends where no signal comes
        sys.setprofile(count)
        try:
            listener.serve(print, **options)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        assert listener.stats().threads == 0
        for thread in {*threading.enumerate()} - {threading.main_thread()}:
            thread.join()  # whose join() was interrupted
        listener.stop()
        listener.serve(print, **options)
    return step <= 0

def lowest_free_descriptor():
    free = os.dup(0)
    os.close(free)
    return free

steps, free = 1, lowest_free_descriptor()
while serve_interrupted_at(steps):
    assert lowest_free_descriptor() == free, steps
    steps += 1
print(steps)
"""


@pytest.mark.parametrize(
    "options", [{}, {"threads": 3}, {"threads": (1, 3)}, {"threads": 2, "busy": "reset"}], ids=str
)
def test_ctrl_c_may_come_at_any_step_of_serve(options: Any) -> None:
    """Where Python looks for signals: at the call of each function, and when one of C returns."""
    with running(INTERRUPTED_AT, repr(options)) as process:
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (0, "")
    assert int(out) > 20


EXITING = """
import fastlisten, sys, threading
listener = fastlisten.bind(("127.0.0.1", 0))
threads = eval(sys.argv[1])
def handler(connection):
    while data := connection.recv(100):
        connection.sendall(data)
threading.Thread(
    target=listener.serve, args=(handler,), kwargs={"threads": threads}, daemon=True
).start()
print(listener.getsockname()[1], flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("clients", [0, 3])
def test_the_interpreter_exits_while_a_daemon_thread_serves(clients: int, threads: Any) -> None:
    with running(EXITING, repr(threads)) as process, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", int(line_of(process)))
        assert exchange(address, b"up") == b"up"
        for _ in range(clients):
            client = stack.enter_context(connect(address))
            client.sendall(b"x")
        out, err = process.communicate("end\n", timeout=LIMIT)
    assert (process.returncode, out, err) == (0, "", "")
