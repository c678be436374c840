"""serve(): what stats() counts, and that nothing is left behind."""

import os
import time
from typing import Any

import pytest

from fastlisten import Connection, Listener, bind
from helpers import LOOPBACK, connect, echo, exchange, needs, reset, serving, wait_until
from helpers.programs import run, sanitizers
from helpers.serve import Queued, answer


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
        run(CLIENT, port, str(number), limit=50)
        wait_until(lambda: listener.stats().active == 0)

    with serving(listener, answer, threads=threads):
        clients(2000)
        descriptors, memory = len(os.listdir("/proc/self/fd")), resident()
        clients(20_000)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        # 64 bytes leaked with each connection would be more than this; AddressSanitizer's pools grow, too
        assert resident() - memory < (2 << 20 if sanitizers() else 1 << 20)
    assert listener.stats().handled == 22_000


def test_clients_that_reset_before_they_are_accepted_stop_nobody(listener: Listener) -> None:
    for _ in range(100):
        reset(connect(listener))
    errors: list[Exception] = []
    with serving(listener, echo, on_error=lambda error, _: errors.append(error)):
        assert exchange(listener, b"served") == b"served"
    assert all(isinstance(error, ConnectionError) for error in errors)
