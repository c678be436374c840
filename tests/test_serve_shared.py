"""One listening socket, several loops: of this process, of forked ones and of others."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import cast

import pytest

from fastlisten import Connection, Listener
from helpers import LIMIT, echo, exchange, needs, posix_only, read_all, serving, wait_until
from helpers.programs import line_of, running
from helpers.serve import Queued, answer, answered_once


@pytest.mark.parametrize("threads", [0, 2])
def test_two_loops_on_one_socket_take_each_client_once(threads: int, listener: Listener) -> None:
    with listener.dup() as second:
        assert isinstance(second, Listener)
        with serving(listener, echo, threads=threads), serving(second, echo, threads=threads):
            answered_once(listener, 400)
            wait_until(lambda: listener.stats().active + second.stats().active == 0)
        assert listener.stats().accepted + second.stats().accepted == 400
        assert listener.stats().handled + second.stats().handled == 400


def waits(second: Listener) -> None:
    second.settimeout(5)
    second.settimeout(None)


def blocks(second: Listener) -> None:
    second.setblocking(False)
    second.setblocking(True)


@pytest.mark.parametrize(
    "act", [Listener.gettimeout, waits, blocks, Listener.detach], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("threads", [0, 2])
def test_a_duplicate_does_not_keep_a_loop_in_accept(
    threads: int, act: Callable[[Listener], object], listener: Listener
) -> None:
    """The mode of the description is for both, and a duplicate is made with the original's timeout."""
    with serving(listener, echo, threads=threads) as served:
        answered_once(listener, 20)
        second = listener.dup()
        try:
            number = act(second)
            answered_once(listener, 20)
            listener.stop()
            served.wait()
        finally:
            if act is Listener.detach:
                socket.socket(fileno=cast(int, number)).close()
            second.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_the_mode_is_not_blocking_even_for_a_moment(threads: int, listener: Listener) -> None:
    """A loop that looks for a client just then would stay in accept(), out of stop()'s reach."""
    with serving(listener, echo, threads=threads) as served, listener.dup() as second:
        for n in range(500):
            exchange(listener, b"%d" % n)
            for one in (listener, second):  # the loop comes back for the next client
                one.settimeout(5)
                one.settimeout(None)
        listener.stop()
        served.wait()


@pytest.mark.parametrize("threads", [0, 1])
def test_a_loop_hoards_no_clients_that_another_could_serve(
    threads: int, listener: Listener, queued: Queued
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
            assert [read_all(client) for client in clients[1:]] == [b"%d" % n for n in range(1, 12)]
            gate.set()
            assert read_all(clients[0]) == b"0"
    assert listener.stats().accepted == 1


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
    number = listener.fileno()
    with running(OTHER_PROCESS, f"fd:{number}", pass_fds=[number]) as process:
        assert line_of(process) == "ready"
        with serving(listener, echo):
            answered_once(listener, 200)
        process.terminate()
        assert process.stdout is not None
        theirs = process.stdout.read().count("x")
        assert process.wait(LIMIT) == 0
    assert theirs + listener.stats().handled == 200
