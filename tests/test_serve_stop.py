"""serve(): stop, pause and resume."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import statistics
import threading
import time
from typing import Any

import pytest

import fastlisten
from fastlisten import Connection, Listener, ServeResult, bind
from helpers import (
    LIMIT,
    LOOPBACK,
    Serving,
    connect,
    echo,
    exchange,
    needs,
    read_all,
    serving,
    under_wine,
    wait_until,
)
from helpers.internals import is_served
from helpers.serve import THREADS, Queued, answer, answered_until, one_more_is_accepted

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
            next(iter(listener))
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
    wait_until(lambda: is_served(listener), what="serve() has begun")
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
