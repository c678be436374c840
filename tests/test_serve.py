"""serve(): its options, several endpoints at once, and connections one by one."""

import contextlib
import queue
import threading
from typing import Any

import pytest

import fastlisten
from fastlisten import Connection, Listener, bind
from helpers import LIMIT, LOOPBACK, Serving, echo, exchange, needs, read_all, serving
from helpers.programs import run
from helpers.serve import THREADS, Queued, answer, number_of

# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"handler": None}, TypeError, "handler must be callable, not NoneType"),
        ({"threads": -1}, ValueError, "threads must be at least 0, not -1"),
        ({"threads": 1.5}, TypeError, "threads must be an int, not float"),
        ({"threads": (4, 2)}, ValueError, "the least, 4, is above the most, 2"),
        ({"threads": (0, 2)}, ValueError, "threads must be at least 1, not 0"),
        ({"threads": (1, 2, 3)}, ValueError, "a number or \\(least, most\\)"),
        ({"threads": "2"}, TypeError, "threads must be an int, not str"),
        ({"max_connections": 0}, ValueError, "max_connections must be at least 1, not 0"),
        ({"max_connections": "9"}, TypeError, "max_connections must be an int"),
        ({"pending": -1}, ValueError, "pending must be at least 0, not -1"),
        ({"busy": "later"}, ValueError, "busy must be 'reset' or bytes, not 'later'"),
        ({"busy": 503}, TypeError, "busy must be 'reset' or bytes, not int"),
        ({"exhausted": "panic"}, ValueError, "exhausted must be 'pause', 'shed' or callable"),
        ({"on_error": "log"}, TypeError, "on_error must be callable, not str"),
        ({"thread": 1}, TypeError, "thread"),
    ],
)
def test_a_bad_option_is_refused_before_a_socket_opens(
    options: dict[str, Any], error: type[Exception], text: str, listener: Listener
) -> None:
    handler = options.pop("handler", echo)
    with pytest.raises(error, match=text):
        listener.serve(handler, **options)
    with pytest.raises(error, match=text):
        # a port in use: if a socket were opened first, this would be an OSError
        fastlisten.serve(handler, listener.endpoint, **options)
    with serving(listener, echo):  # nothing was begun that would have to be ended
        assert exchange(listener, b"fine") == b"fine"


@pytest.mark.parametrize("threads", [4, (1, 4)])
def test_max_connections_stops_accepting_until_one_closes(
    threads: Any, listener: Listener, queued: Queued
) -> None:
    entered: queue.Queue[int] = queue.Queue()
    gate = threading.Semaphore(0)

    def handler(connection: Connection) -> None:
        entered.put(number_of(connection))
        assert gate.acquire(timeout=LIMIT)
        connection.sendall(b"x")

    with serving(listener, handler, threads=threads, max_connections=2):
        clients = queued(listener, 5)
        for inside in range(2, 6):
            entered.get(timeout=LIMIT)
            if inside == 2:
                entered.get(timeout=LIMIT)
            stats = listener.stats()
            assert stats.active == 2
            assert stats.accepted == inside
            if stats.queue_depth is not None:
                assert stats.queue_depth == 5 - inside
            gate.release()
        gate.release(2)
        assert [read_all(client) for client in clients] == [b"x"] * 5


def test_max_connections_counts_connections_that_the_handler_keeps(
    listener: Listener, queued: Queued
) -> None:
    kept: queue.Queue[Any] = queue.Queue()

    def handler(connection: Connection) -> None:
        kept.put(connection.makefile("rb"))  # keeps the descriptor open beyond the handler

    with serving(listener, handler, max_connections=1):
        clients = queued(listener, 2)
        first = kept.get(timeout=LIMIT)
        stats = listener.stats()
        assert (stats.accepted, stats.handled, stats.active) == (1, 0, 1)
        first.close()
        kept.get(timeout=LIMIT).close()
        assert listener.stats().accepted == 2
    assert len(clients) == 2


# --- one connection after the other, by hand ------------------------------------------------------


def test_iterating_gives_connections_until_stop(listener: Listener, queued: Queued) -> None:
    clients = queued(listener, 6)
    numbers = []
    for connection in listener:
        with connection:
            numbers.append(number_of(connection))
            connection.sendall(b"x")
        if len(numbers) == 6:
            listener.stop()
    assert numbers == list(range(6))
    assert [read_all(client) for client in clients] == [b"x"] * 6


def test_leaving_the_iteration_leaves_the_others_queued(listener: Listener, queued: Queued) -> None:
    clients = queued(listener, 6)
    for connection in listener:
        with connection:
            answer(connection)
        break
    with serving(listener, answer):
        assert [read_all(client) for client in clients] == [b"%d" % n for n in range(6)]
    assert listener.stats().accepted == 6


def test_connections_of_an_iteration_are_the_caller_s(listener: Listener, queued: Queued) -> None:
    clients = queued(listener, 3)
    each = iter(listener)
    connections = [next(each) for _ in range(3)]
    listener.stop()
    assert list(each) == []
    assert [connection.closed for connection in connections] == [False] * 3
    for connection in connections:
        with connection:
            answer(connection)
    assert [read_all(client) for client in clients] == [b"0", b"1", b"2"]


# A thread that keeps the GIL has a signal noted while the loop waits for the GIL with a client in hand.
ITERATES = """
import _thread, signal, socket, sys, threading, time
import fastlisten

class Came(Exception):
    pass

def come(*args):
    raise Came

def connect():
    with socket.create_connection(listener.getsockname()):
        until = time.monotonic() + 0.1
        while not listener.stats().accepted:
            if time.monotonic() > until:  # the loop needs the GIL before it comes to its poll()
                time.sleep(0.001)
        _thread.interrupt_main()
        came.wait()

signal.signal(signal.SIGINT, come)
sys.setswitchinterval(100)
for _ in range(20):
    with fastlisten.bind("127.0.0.1:0") as listener:
        came = threading.Event()
        thread = threading.Thread(target=connect)
        thread.start()
        connection = None
        try:
            for connection in listener:
                while True:
                    time.sleep(0.001)
        except Came:
            came.set()
        thread.join()
        assert connection is not None
        connection.close()
"""


def test_a_signal_handler_does_not_come_between_an_iteration_s_client_and_the_caller() -> None:
    assert run(ITERATES).stderr == ""


# --- several endpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("threads", THREADS)
def test_several_endpoints_share_one_loop(threads: Any, unix_path: str) -> None:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(bind(LOOPBACK))]
        if needs("the IPv6 loopback address").args[0] is False:
            listeners.append(stack.enter_context(bind(f"[::1]:{listeners[0].getsockname()[1]}")))
        if needs("unix sockets").args[0] is False:
            listeners.append(stack.enter_context(bind(f"unix:{unix_path}")))
        served = Serving(lambda: fastlisten.serve(echo, *listeners, threads=threads))
        for round_ in range(3):
            for listener in listeners:
                text = f"{round_} {listener.endpoint}".encode()
                assert exchange(listener, text) == text
        listeners[-1].stop()  # of any ends all
        assert served.wait().cut == 0
        assert [listener.stats().accepted for listener in listeners] == [3] * len(listeners)
        assert all(listener.fileno() != -1 for listener in listeners)


@pytest.mark.parametrize("threads", [0, 1])
def test_several_listeners_take_turns(threads: int, queued: Queued) -> None:
    with bind(LOOPBACK) as one, bind(LOOPBACK) as two:
        clients = queued(one, 5) + queued(two, 5, first=5)
        order = []

        def handler(connection: Connection) -> None:
            order.append(number_of(connection))
            connection.sendall(b"x")
            if len(order) == 10:
                one.stop()

        fastlisten.serve(handler, one, two, threads=threads)
        assert [read_all(client) for client in clients] == [b"x"] * 10
    assert order == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]


def test_serve_binds_what_it_serves_and_closes_it() -> None:
    ports: queue.Queue[int] = queue.Queue()
    with bind(LOOPBACK) as listener:
        served = Serving(
            lambda: fastlisten.serve(
                lambda c: ports.put(c.getsockname()[1]), listener, "127.0.0.1:0", backlog=5
            )
        )
        exchange(listener, b"")
        assert ports.get(timeout=LIMIT) == listener.getsockname()[1]
        listener.stop()
        served.wait()
        assert listener.fileno() != -1
