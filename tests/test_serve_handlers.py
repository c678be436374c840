"""serve(): where handlers run, what becomes of their connections, and handlers that raise."""

import contextlib
import itertools
import logging
import queue
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastlisten import Connection, Listener
from helpers import LIMIT, connect, echo, exchange, read_all, serving, wait_until
from helpers.serve import THREADS, Queued, answer, number_of

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
