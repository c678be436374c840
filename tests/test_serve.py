"""serve(): handlers inline and in threads, limits, several endpoints, shared sockets, stop and signals."""

import _thread
import asyncio
import contextlib
import itertools
import logging
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import fastlisten
from fastlisten import Connection, Listener, ServeResult, bind
from helpers import (
    LIMIT,
    Serving,
    connect,
    echo,
    exchange,
    needs,
    posix_only,
    read_all,
    reset,
    serving,
    under_wine,
    wait_until,
)

LOOPBACK = ("127.0.0.1", 0)
# Inline, a fixed number and a range: where nothing else is said, all three do the same.
THREADS = [0, 1, 4, (1, 4)]

Queued = Callable[..., list[socket.socket]]


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Give a Listener on the loopback address, closed at the end."""
    with bind(LOOPBACK) as listener:
        yield listener


@pytest.fixture
def queued() -> Iterator[Queued]:
    """Give a function that connects `n` clients, each sends its number; all are closed at the end."""
    with contextlib.ExitStack() as clients:

        def some(target: Any, n: int, first: int = 0) -> list[socket.socket]:
            made = [clients.enter_context(connect(target)) for _ in range(n)]
            for number, client in enumerate(made, first):
                client.sendall(b"%d" % number)
            return made

        yield some


def number_of(connection: Connection) -> int:
    return int(connection.recv(100))


def answer(connection: Connection) -> None:
    connection.sendall(connection.recv(100))


@contextlib.contextmanager
def child(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code in a process of its own; it is killed at the end if it has not ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """Read the next line that the process prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


# --- handlers -------------------------------------------------------------------------------------


def test_an_inline_handler_runs_in_the_calling_thread(listener: Listener) -> None:
    ran_in = []

    def handler(connection: Connection) -> None:
        ran_in.append(threading.current_thread())
        echo(connection)

    with serving(listener, handler) as served:
        assert exchange(listener, b"first") == b"first"
        assert exchange(listener, b"second") == b"second"
    assert ran_in == [served.thread] * 2
    assert served.result.cut == 0  # a handler that was at its end when stop() came counts as finished


@pytest.mark.parametrize("threads", [1, 3, (1, 3)])
def test_handlers_run_side_by_side_up_to_the_most_threads(
    threads: Any, listener: Listener, queued: Queued
) -> None:
    most = threads if isinstance(threads, int) else threads[1]
    ran_in: list[threading.Thread] = []
    gate = threading.Semaphore(0)

    def handler(connection: Connection) -> None:
        ran_in.append(threading.current_thread())
        assert gate.acquire(timeout=LIMIT)
        answer(connection)

    with serving(listener, handler, threads=threads) as served:
        clients = queued(listener, most + 1)
        wait_until(lambda: len(ran_in) == most, what="all threads in the handler")
        stats = listener.stats()
        assert (stats.threads, stats.idle_threads, stats.active) == (most, 0, most)
        gate.release()
        wait_until(lambda: len(ran_in) == most + 1, what="the one too many in the handler")
        gate.release(most)
        assert sorted(read_all(client) for client in clients) == [b"%d" % n for n in range(most + 1)]
    assert len(set(ran_in)) == most
    assert served.thread not in ran_in


@pytest.mark.parametrize("threads", THREADS)
def test_the_connection_is_closed_when_the_handler_returns(
    threads: Any, listener: Listener, queued: Queued
) -> None:
    seen: list[Connection] = []
    with serving(listener, seen.append, threads=threads):
        (client,) = queued(listener, 1)
        with contextlib.suppress(ConnectionResetError):  # its number was never read
            assert read_all(client) == b""
        assert wait_until(lambda: seen and seen[0].closed)
    assert seen[0].fileno() == -1
    assert seen[0].peer == client.getsockname()


@pytest.mark.parametrize("threads", THREADS)
def test_what_the_handler_takes_over_stays_open(threads: Any, listener: Listener, queued: Queued) -> None:
    taken: queue.Queue[socket.socket] = queue.Queue()
    with serving(listener, lambda c: taken.put(c.socket()), threads=threads):
        (client,) = queued(listener, 1)
        with taken.get(timeout=LIMIT) as sock:
            wait_until(lambda: listener.stats().handled == 1)
            assert listener.stats().active == 0
            answer_to = sock.recv(100)
            sock.sendall(b"taken " + answer_to)
    assert read_all(client) == b"taken 0"


@pytest.mark.parametrize("threads", [0, 2])
def test_connections_have_the_default_timeout(threads: int, listener: Listener) -> None:
    timeouts = []
    socket.setdefaulttimeout(4.5)
    try:
        with serving(listener, lambda c: timeouts.append(c.gettimeout()), threads=threads):
            exchange(listener, b"")
    finally:
        socket.setdefaulttimeout(None)
    assert timeouts == [4.5]


def test_64_clients_at_once_are_each_answered_once(listener: Listener) -> None:
    handled = []
    side_by_side = []
    running = itertools.count()
    ended = itertools.count()

    def handler(connection: Connection) -> None:
        side_by_side.append(next(running) + 1)
        number = connection.recv(100)
        handled.append(number)
        connection.sendall(number)
        next(ended)

    together = threading.Barrier(64)

    def client(number: int) -> bytes:
        with connect(listener) as sock:
            together.wait(LIMIT)
            sock.sendall(b"%d" % number)
            return read_all(sock)

    with serving(listener, handler, threads=(2, 16)), ThreadPoolExecutor(64) as clients:
        assert list(clients.map(client, range(64))) == [b"%d" % n for n in range(64)]
        wait_until(lambda: listener.stats().handled == 64)
        stats = listener.stats()
        assert 2 <= stats.threads <= 16
        assert (stats.accepted, stats.active) == (64, 0)
    assert sorted(handled, key=int) == [b"%d" % n for n in range(64)]


def test_threads_beyond_the_least_end_when_idle(listener: Listener, queued: Queued) -> None:
    with serving(listener, answer, threads=(1, 3)):
        with contextlib.ExitStack() as silent:
            for _ in range(3):
                silent.enter_context(connect(listener))
            wait_until(lambda: listener.stats().threads == 3)
        # one waits 10 s for its turn to be the next, and 10 s as the next
        wait_until(lambda: listener.stats().threads == 1, 40)
        (client,) = queued(listener, 1)
        assert read_all(client) == b"0"


# --- handlers that raise --------------------------------------------------------------------------


@pytest.mark.parametrize("threads", THREADS)
def test_on_error_gets_what_a_handler_raises(threads: Any, listener: Listener) -> None:
    told: list[tuple[Exception, Connection, bool]] = []
    problem = ZeroDivisionError("of a handler")

    def handler(connection: Connection) -> None:
        connection.recv(100)
        raise problem

    def on_error(error: Exception, connection: Connection) -> None:
        told.append((error, connection, connection.closed))
        connection.sendall(b"sorry")

    with serving(listener, handler, threads=threads, on_error=on_error):
        with connect(listener) as client:
            client.sendall(b"x")
            assert read_all(client) == b"sorry"
            peer = client.getsockname()
        wait_until(lambda: listener.stats().handled == 1)
        assert listener.stats().handler_errors == 1
    assert [(error, connection.peer, closed) for error, connection, closed in told] == [
        (problem, peer, False)
    ]
    assert told[0][1].closed


@pytest.mark.parametrize("threads", THREADS)
def test_without_on_error_the_log_gets_it_and_the_client_nothing(
    threads: Any, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(connection: Connection) -> None:
        connection.recv(100)
        raise ZeroDivisionError("a secret")

    with serving(listener, handler, threads=threads):
        assert exchange(listener, b"x") == b""
        wait_until(lambda: listener.stats().handled == 1)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("fastlisten", logging.ERROR)
    assert "peer=('127.0.0.1'" in caplog.text
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "a secret"


@pytest.mark.parametrize("threads", THREADS)
def test_an_on_error_that_raises_is_logged_and_serving_goes_on(
    threads: Any, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    def on_error(error: Exception, connection: Connection) -> None:
        raise LookupError("of on_error")

    def handler(connection: Connection) -> None:
        data = connection.recv(100)
        assert data != b"bad"
        connection.sendall(data)

    with serving(listener, handler, threads=threads, on_error=on_error):
        assert exchange(listener, b"bad") == b""
        assert exchange(listener, b"good") == b"good"
    raised = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert raised[0] == "of on_error"
    assert "bad" in raised[1]  # what on_error did not deal with is not lost


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("bad", [0, 1, 3, 7])
def test_a_handler_that_raises_in_a_batch_costs_its_own_client_only(
    bad: int, threads: int, listener: Listener, queued: Queued
) -> None:
    clients = queued(listener, 8)

    def handler(connection: Connection) -> None:
        if (number := number_of(connection)) == bad:
            raise RuntimeError
        connection.sendall(b"%d" % number)

    errors: list[object] = []
    with serving(listener, handler, threads=threads, on_error=lambda e, c: errors.append(e)):
        answers = [read_all(client) for client in clients]
    assert answers == [b"" if n == bad else b"%d" % n for n in range(8)]
    assert len(errors) == 1


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("ending", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_what_is_no_exception_of_the_handler_s_own_ends_serve(
    ending: BaseException, threads: Any, listener: Listener, queued: Queued
) -> None:
    clients = queued(listener, 8)
    handled = []

    def handler(connection: Connection) -> None:
        handled.append(number_of(connection))
        if handled[-1] == 1:
            raise ending
        connection.sendall(b"x")

    with pytest.raises(type(ending)) as told:
        listener.serve(handler, threads=threads)
    assert told.value is ending
    assert listener.stats().handler_errors == 0
    assert listener.stats().active == 0
    # Who was accepted is handled or closed; the others are still queued, and the Listener still works.
    with serving(listener, answer, threads=threads):
        assert exchange(listener, b"another") == b"another"
        answers = [read_all(client) for client in clients if not is_reset(client)]
    assert set(answers) <= {b"x", *(b"%d" % n for n in range(8))}


def is_reset(client: socket.socket) -> bool:
    """Tell whether the server has dropped this client with its number unread."""
    try:
        return client.recv(1, socket.MSG_PEEK) == b""
    except ConnectionResetError:
        return True


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
        wait_until(lambda: listener.stats().handled == 1)
        assert listener.stats().active == 1
        assert listener.stats().accepted == 1
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
    connections = [next(each) for _ in range(3)]  # type: ignore[call-overload]
    listener.stop()
    assert list(each) == []
    assert [connection.closed for connection in connections] == [False] * 3
    for connection in connections:
        with connection:
            answer(connection)
    assert [read_all(client) for client in clients] == [b"0", b"1", b"2"]


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


# --- one socket, several loops --------------------------------------------------------------------


def answered_once(target: Any, number: int, clients: int = 4) -> None:
    """Have some clients make `number` exchanges and check each answer."""

    def some(first: int) -> list[bytes]:
        return [exchange(target, b"%d" % n) for n in range(first, number, clients)]

    with ThreadPoolExecutor(clients) as pool:
        for first, answers in enumerate(pool.map(some, range(clients))):
            assert answers == [b"%d" % n for n in range(first, number, clients)]


def answered_until(enough: threading.Event, target: Any, clients: int = 4) -> int:
    """Have some clients make exchanges, each answer checked, until it is enough; return how many."""

    def some(first: int) -> int:
        for made in itertools.count():
            if enough.is_set():
                return made
            assert exchange(target, b"%d %d" % (first, made)) == b"%d %d" % (first, made)
        raise AssertionError("not reached")

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(some, range(clients)))


def one_more_is_accepted(listener: Listener) -> None:
    before = listener.stats().accepted
    wait_until(lambda: listener.stats().accepted > before)


@pytest.mark.parametrize("threads", [0, 2])
def test_two_loops_on_one_socket_take_each_client_once(threads: int, listener: Listener) -> None:
    with listener.dup() as second:
        assert isinstance(second, Listener)
        with serving(listener, echo, threads=threads), serving(second, echo, threads=threads):
            answered_once(listener, 400)
            wait_until(lambda: listener.stats().active + second.stats().active == 0)
        assert listener.stats().accepted + second.stats().accepted == 400
        assert listener.stats().handled + second.stats().handled == 400


@pytest.mark.parametrize(("threads", "taken"), [(0, 4), (1, 1)])
def test_a_loop_hoards_no_clients_that_another_could_serve(
    threads: int, taken: int, listener: Listener, queued: Queued
) -> None:
    entered, gate = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        entered.set()
        assert gate.wait(LIMIT)
        answer(connection)

    clients = queued(listener, 12)
    with listener.dup() as second, serving(listener, slow, threads=threads):
        assert entered.wait(LIMIT)
        with serving(second, answer):
            assert [read_all(client) for client in clients[taken:]] == [b"%d" % n for n in range(taken, 12)]
            gate.set()
            assert [read_all(client) for client in clients[:taken]] == [b"%d" % n for n in range(taken)]
    assert listener.stats().accepted == taken


@needs("fork")
@pytest.mark.parametrize("threads", [0, 2])
def test_forked_processes_serve_one_listener(threads: int, listener: Listener) -> None:
    reader, writer = os.pipe()

    def handler(connection: Connection) -> None:
        os.write(writer, b"x")
        echo(connection)

    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            try:
                signal.signal(signal.SIGTERM, lambda *_: listener.stop())
                os.write(writer, b"r")
                listener.serve(handler, threads=threads)
            finally:
                os._exit(0)
        children.append(child)
    try:
        assert os.read(reader, 1) + os.read(reader, 1) == b"rr"
        with serving(listener, handler, threads=threads):
            answered_once(listener, 200)
    finally:
        for child in children:
            os.kill(child, signal.SIGTERM)
        codes = [os.waitpid(child, 0)[1] for child in children]
    os.close(writer)
    with open(reader, "rb") as marks:
        assert marks.read() == b"x" * 200
    assert codes == [0, 0]


@needs("fork")
@pytest.mark.parametrize("threads", [0, 2])
def test_a_child_forked_while_serving_disturbs_nobody(threads: int, listener: Listener) -> None:
    # The child stops, serves and closes its own; the parent's loop goes on.

    def handler(connection: Connection) -> None:
        data = connection.recv(100)
        if data != b"fork":
            connection.sendall(data)
            return
        # Forking here is what the test is about; the other threads hold none of our locks.
        if (child := fork()) == 0:
            code = 1
            try:
                connection.close()
                listener.stop()
                if threads:  # inline, this is still the loop's thread
                    listener.serve(echo)  # answers the stop
                listener.close()
                code = 0
            finally:
                os._exit(code)
        connection.sendall(b"%d" % os.waitpid(child, 0)[1])

    with serving(listener, handler, threads=threads):
        assert exchange(listener, b"before") == b"before"
        assert exchange(listener, b"fork") == b"0"
        assert exchange(listener, b"after") == b"after"
        assert exchange(listener, b"after") == b"after"


def fork() -> int:
    """Fork with threads running, which Python 3.12 and later warn of."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


OTHER_PROCESS = """
import fastlisten, sys
listener = fastlisten.bind(sys.argv[1])
def handler(connection):
    while data := connection.recv(100):
        connection.sendall(data)
    print("x", flush=True)
import signal
signal.signal(signal.SIGTERM, lambda *_: listener.stop())
print("ready", flush=True)
listener.serve(handler)
listener.close()
"""


@posix_only("descriptors are inherited by number")
def test_another_process_serves_the_same_listener(listener: Listener) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, f"fd:{listener.fileno()}"],
        pass_fds=[listener.fileno()],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert line_of(process) == "ready"
            with serving(listener, echo):
                answered_once(listener, 200)
            process.terminate()
            assert process.stdout is not None
            theirs = process.stdout.read().count("x")
            assert process.wait(LIMIT) == 0
        finally:
            process.kill()
    assert theirs + listener.stats().handled == 200


# --- stop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", THREADS)
def test_stop_ends_an_idle_serve_within_10_ms(threads: Any, listener: Listener) -> None:
    took = []
    for _ in range(21):
        served = Serving(lambda: listener.serve(echo, threads=threads))
        assert exchange(listener, b"up") == b"up"
        begin = time.perf_counter()
        listener.stop()
        served.wait()
        took.append(time.perf_counter() - begin)
    # The middle one of 21: a busy machine may hold up any single one. Wine's calls go through a process
    # of its own, and each wait for that is one more.
    assert statistics.median(took) < (0.050 if under_wine() else 0.010), sorted(took)


@pytest.mark.parametrize("threads", THREADS)
def test_stop_from_the_handler(threads: Any, listener: Listener) -> None:
    def handler(connection: Connection) -> None:
        listener.stop()
        listener.stop()
        answer(connection)

    served = Serving(lambda: listener.serve(handler, threads=threads))
    assert exchange(listener, b"last") == b"last"
    assert served.wait() == ServeResult(finished=1, cut=0)


@needs("signals between processes")
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("busy", [False, True])
def test_stop_from_a_signal_handler(busy: bool, threads: Any, listener: Listener) -> None:
    handled = threading.Event()

    def client() -> None:
        assert exchange(listener, b"up") == b"up"
        while busy and not handled.is_set():
            with contextlib.suppress(OSError):  # of the clients that come after the stop
                exchange(listener, b"more", 0.2)
            os.kill(os.getpid(), signal.SIGUSR1)
        if not busy:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_signal(*_: object) -> None:
        handled.set()
        listener.stop()

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        clients = Serving(client)
        listener.serve(echo, threads=threads)
        assert handled.is_set()
        clients.wait()
        listener.setblocking(False)
        for connection in drained(listener):  # whoever came after the stop
            connection.close()
    finally:
        signal.signal(signal.SIGUSR1, before)


def drained(listener: Listener) -> list[Connection]:
    """Return who is queued, without waiting for anybody."""
    try:
        return listener.accept_many(1000)
    except BlockingIOError:
        return []


@pytest.mark.parametrize("threads", THREADS)
def test_a_stop_before_serve_ends_the_next_one(threads: Any, listener: Listener, queued: Queued) -> None:
    (client,) = queued(listener, 1)
    listener.stop()
    listener.stop()
    assert listener.serve(answer, threads=threads) == ServeResult(0, 0)
    assert listener.stats().accepted == 0
    with serving(listener, answer, threads=threads):
        assert read_all(client) == b"0"


@pytest.mark.parametrize("threads", THREADS)
def test_a_stop_in_a_batch_leaves_nobody_out(threads: Any, listener: Listener, queued: Queued) -> None:
    clients = queued(listener, 64)

    def handler(connection: Connection) -> None:
        listener.stop()
        answer(connection)

    for _ in range(64):  # each takes a batch and leaves the others queued
        listener.serve(handler, threads=threads)
        if listener.stats().accepted == 64:
            break
    assert [read_all(client) for client in clients] == [b"%d" % n for n in range(64)]
    assert listener.stats().handled == 64
    assert not listener.stats().handler_errors


@pytest.mark.parametrize("threads", THREADS)
def test_serve_again_and_again_loses_nobody(threads: Any, listener: Listener) -> None:
    enough = threading.Event()
    clients = Serving(lambda: answered_until(enough, listener))
    try:
        for _ in range(20):
            with serving(listener, echo, threads=threads):
                one_more_is_accepted(listener)
    finally:
        enough.set()
    with serving(listener, echo, threads=threads):
        made = clients.wait()
    assert listener.stats().handled == made


@pytest.mark.parametrize("threads", THREADS)
def test_stop_lets_handlers_end_in_their_own_time(threads: Any, listener: Listener, queued: Queued) -> None:
    entered, gate = threading.Event(), threading.Event()

    def handler(connection: Connection) -> None:
        entered.set()
        assert gate.wait(LIMIT)
        answer(connection)

    served = Serving(lambda: listener.serve(handler, threads=threads))
    (client,) = queued(listener, 1)
    assert entered.wait(LIMIT)
    listener.stop()
    served.thread.join(0.05)
    assert served.thread.is_alive()
    gate.set()
    assert served.wait() == ServeResult(finished=1, cut=0)
    assert read_all(client) == b"0"


def test_a_listener_is_served_or_awaited_not_both(listener: Listener) -> None:
    async def main() -> None:
        waits = asyncio.ensure_future(listener.accept_async())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="somebody waits on an event loop"):
            listener.serve(echo)
        waits.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waits
        with serving(listener, echo):
            with pytest.raises(RuntimeError, match=r"serve\(\) runs already on"):
                await listener.accept_async()
            with pytest.raises(RuntimeError, match=r"serve\(\) runs already on"):
                await anext(aiter(listener))
            assert exchange(listener, b"served") == b"served"
        with connect(listener) as client:
            accepted, address = await listener.accept_async()
            with accepted:
                assert address == client.getsockname()

    asyncio.run(main())


@pytest.mark.parametrize("threads", THREADS)
def test_a_second_serve_on_one_listener_is_refused(threads: Any, listener: Listener) -> None:
    with serving(listener, echo, threads=threads):
        assert exchange(listener, b"up") == b"up"
        with pytest.raises(RuntimeError, match=r"serve\(\) runs already on"):
            listener.serve(echo)
        with pytest.raises(RuntimeError, match=r"serve\(\) runs already on"):
            next(iter(listener))  # type: ignore[call-overload]
        with bind(LOOPBACK) as other:
            with pytest.raises(RuntimeError, match=r"serve\(\) runs already on"):
                fastlisten.serve(echo, other, listener)
            with serving(other, echo):  # the refused serve() has not kept it
                assert exchange(other, b"free") == b"free"
        assert exchange(listener, b"still up") == b"still up"


def test_a_listener_given_twice_is_refused(listener: Listener) -> None:
    with pytest.raises(ValueError, match="a listener is given more than once"):
        fastlisten.serve(echo, listener, listener)
    with serving(listener, echo):
        assert exchange(listener, b"free") == b"free"


def test_a_thread_that_is_slow_to_begin_is_no_handler_that_goes_on(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """On a busy machine a thread may get no core for longer than cut handlers are waited for."""
    begins, may_begin = threading.Event(), threading.Event()

    def hold(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is threading.Thread.run.__code__:
            begins.set()
            may_begin.wait(LIMIT)

    threading.setprofile(hold)  # of the threads that are started from now on
    try:
        with caplog.at_level(logging.WARNING, "fastlisten"):
            served = Serving(lambda: listener.serve(echo, threads=1))
            assert begins.wait(LIMIT)
            listener.stop(drain=0)
            served.thread.join(0.6)
            assert served.thread.is_alive()
            may_begin.set()
            assert served.wait() == ServeResult(finished=0, cut=0)
        assert caplog.messages == []
    finally:
        threading.setprofile(None)
        may_begin.set()


@pytest.mark.parametrize("threads", THREADS)
def test_serve_on_a_closed_listener_is_ebadf(threads: Any, listener: Listener) -> None:
    with socket.socket() as plain:
        plain.close()
        with pytest.raises(OSError) as expected:  # noqa: PT011
            plain.accept()
    listener.close()
    with pytest.raises(OSError) as told:  # noqa: PT011
        listener.serve(echo, threads=threads)
    assert told.value.args == expected.value.args


@pytest.mark.parametrize("threads", THREADS)
def test_serve_on_a_socket_that_does_not_listen_is_accept_s_error(threads: Any) -> None:
    with socket.socket() as plain, Listener(socket.AF_INET, socket.SOCK_STREAM) as listener:
        with pytest.raises(OSError) as expected:  # noqa: PT011
            plain.accept()
        with pytest.raises(OSError) as told:  # noqa: PT011
            listener.serve(echo, threads=threads)
    assert told.value.args == expected.value.args


@pytest.mark.parametrize("threads", THREADS)
def test_close_ends_serve_and_its_handlers(threads: Any, listener: Listener) -> None:
    served = Serving(lambda: listener.serve(echo, threads=threads))
    with connect(listener) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"  # the handler waits for more
        listener.close()
        assert served.wait() == ServeResult(finished=0, cut=1)
        assert read_all(client) == b""


def test_a_negative_drain_is_refused(listener: Listener) -> None:
    for drain in (-1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="drain must not be negative"):
            listener.stop(drain)
    with serving(listener, echo):  # none of them was a stop
        assert exchange(listener, b"x") == b"x"


# --- pause ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", THREADS)
def test_pause_keeps_clients_queued_until_resume(threads: Any, listener: Listener, queued: Queued) -> None:
    with serving(listener, answer, threads=threads):
        (first,) = queued(listener, 1)
        assert read_all(first) == b"0"
        listener.pause()
        # The pause is known once a client that came after it is left alone, see below.
        waiting = queued(listener, 3, first=1)
        if listener.stats().queue_depth is not None:
            wait_until(lambda: listener.stats().queue_depth == 3)
        stats = listener.stats()
        assert (stats.paused, stats.accepted) == (True, 1)
        listener.resume()
        assert [read_all(client) for client in waiting] == [b"1", b"2", b"3"]
        assert not listener.stats().paused


@pytest.mark.parametrize("threads", THREADS)
def test_a_pause_before_serve_holds_and_stop_ends_it(
    threads: Any, listener: Listener, queued: Queued
) -> None:
    (client,) = queued(listener, 1)
    listener.pause()
    served = Serving(lambda: listener.serve(answer, threads=threads))
    wait_until(lambda: listener._loop is not None, what="serve() has begun")
    listener.stop()
    assert served.wait() == ServeResult(0, 0)
    assert listener.stats().accepted == 0
    listener.resume()
    with serving(listener, answer, threads=threads):
        assert read_all(client) == b"0"


@pytest.mark.parametrize("threads", THREADS)
def test_pause_and_resume_under_load_lose_nobody(threads: Any, listener: Listener) -> None:
    enough = threading.Event()
    with serving(listener, echo, threads=threads):
        clients = Serving(lambda: answered_until(enough, listener))
        try:
            for _ in range(20):
                listener.pause()
                listener.resume()
                one_more_is_accepted(listener)
        finally:
            enough.set()
        made = clients.wait()
    assert listener.stats().handled == made


# --- signals --------------------------------------------------------------------------------------


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
    with child(INTERRUPTED, kind, str(threads)) as process:
        with connect(("127.0.0.1", int(line_of(process)))) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
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
    with child(INTERRUPTED_AT, repr(options)) as process:
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
    with child(EXITING, repr(threads)) as process, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", int(line_of(process)))
        assert exchange(address, b"up") == b"up"
        for _ in range(clients):
            client = stack.enter_context(connect(address))
            client.sendall(b"x")
        out, err = process.communicate("end\n", timeout=LIMIT)
    assert (process.returncode, out, err) == (0, "", "")


# --- counters -------------------------------------------------------------------------------------


def test_stats_count_what_has_happened(listener: Listener, queued: Queued) -> None:
    begun = listener.stats()
    assert begun.since <= time.time()
    assert (begun.accepted, begun.handled, begun.active, begun.refused) == (0, 0, 0, 0)
    assert (begun.handler_errors, begun.accept_errors, begun.paused) == (0, {}, False)
    assert (begun.threads, begun.idle_threads) == (0, 0)

    def handler(connection: Connection) -> None:
        data = connection.recv(100)
        if data == b"bad":
            raise ValueError
        connection.sendall(data)

    errors: list[object] = []
    with serving(listener, handler, threads=2, on_error=lambda *e: errors.append(e)):
        for data in (b"1", b"2", b"bad"):
            exchange(listener, data)
        with connect(listener):
            wait_until(lambda: listener.stats().accepted == 4 and listener.stats().handled == 3)
            wait_until(lambda: listener.stats().idle_threads == 1)  # a moment after it has accepted
            now = listener.stats()
            assert (now.active, now.handler_errors) == (1, 1)
            assert (now.threads, now.idle_threads) == (2, 1)
        wait_until(lambda: listener.stats().active == 0)
    ended = listener.stats()
    assert (ended.accepted, ended.handled, ended.handler_errors) == (4, 4, 1)
    assert (ended.threads, ended.idle_threads, ended.since) == (0, 0, begun.since)
    with pytest.raises(AttributeError):
        ended.accepted = 5  # type: ignore[misc]
    assert len(errors) == 1
    assert begun.accepted == 0  # a copy


@needs("TCP_INFO of a listener")
def test_stats_tell_the_kernel_s_queue(queued: Queued, unix_path: str) -> None:
    with bind(LOOPBACK, backlog=9) as listener:
        assert (listener.stats().queue_depth, listener.stats().queue_limit) == (0, 9)
        queued(listener, 3)
        wait_until(lambda: listener.stats().queue_depth == 3)
        for connection in listener.accept_many():
            connection.close()
        assert listener.stats().queue_depth == 0
    assert (listener.stats().queue_depth, listener.stats().queue_limit) == (None, None)
    with bind(f"unix:{unix_path}") as listener:
        assert (listener.stats().queue_depth, listener.stats().queue_limit) == (None, None)


def resident() -> int:
    """Return this process's resident memory in bytes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


CLIENT = """
import socket, struct, sys
address, number = ("127.0.0.1", int(sys.argv[1])), int(sys.argv[2])
for _ in range(number):
    with socket.socket() as client:
        client.connect(address)
        client.sendall(b"x")
        if client.recv(2) != b"x" or client.recv(1) != b"":
            raise SystemExit("a wrong answer")
        # a reset in place of our FIN: no port stays in TIME_WAIT
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
"""


@needs("Linux")
@pytest.mark.parametrize("threads", [0, (2, 4)])
def test_20000_connections_leave_nothing_behind(threads: Any, listener: Listener) -> None:
    def clients(number: int) -> None:
        port = str(listener.getsockname()[1])
        subprocess.run([sys.executable, "-c", CLIENT, port, str(number)], check=True, timeout=50)
        wait_until(lambda: listener.stats().active == 0)

    with serving(listener, answer, threads=threads):
        clients(2000)
        descriptors, memory = len(os.listdir("/proc/self/fd")), resident()
        clients(20_000)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        # 64 bytes leaked with each connection would be more than this
        assert resident() - memory < 1 << 20
    assert listener.stats().handled == 22_000


def test_clients_that_reset_before_they_are_accepted_stop_nobody(listener: Listener) -> None:
    for _ in range(100):
        reset(connect(listener))
    errors: list[Exception] = []
    with serving(listener, echo, on_error=lambda error, _: errors.append(error)):
        assert exchange(listener, b"served") == b"served"
    assert all(isinstance(error, ConnectionError) for error in errors)
