"""What processes that serve together ask of the core: steering, shared counters, the look at the queues."""

import mmap
import os
import socket
from collections.abc import Iterator

import pytest

import fastlisten
from fastlisten import Listener
from fastlisten._core.processes import BALANCES, Counters, Queues, end_with_parent, steer
from fastlisten._core.state import STATE_BYTES, State, queue
from fastlisten._workers.totals import _counted, _sum
from helpers import LOOPBACK, connect, needs, tells_the_queue
from helpers.programs import run

SIZE = mmap.PAGESIZE * -(-STATE_BYTES // mmap.PAGESIZE)

linux = needs("Linux")
queues_are_told = pytest.mark.skipif(not tells_the_queue(), reason="needs TCP_INFO of a listener")


@pytest.fixture
def three() -> Iterator[list[Listener]]:
    """Give three listeners that share a port."""
    with fastlisten.bind(LOOPBACK) as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with (
            fastlisten.bind(first.endpoint, reuse_port=True) as second,
            fastlisten.bind(first.endpoint, reuse_port=True) as third,
        ):
            yield [first, second, third]


def depths(listeners: list[Listener]) -> list[int | None]:
    return [queue(listener.fileno())[0] for listener in listeners]


@linux
@queues_are_told
@pytest.mark.parametrize("place", [0, 1, 2])
def test_all_clients_go_where_they_are_steered(three: list[Listener], place: int) -> None:
    steer(three[2].fileno(), [place])
    clients = [connect(three[0]) for _ in range(10)]
    assert depths(three) == [10 if number == place else 0 for number in range(3)]
    for client in clients:
        client.close()


@linux
@queues_are_told
def test_clients_are_spread_over_those_that_are_named(three: list[Listener]) -> None:
    steer(three[0].fileno(), [0, 2])
    clients = [connect(three[0]) for _ in range(60)]
    first, second, third = depths(three)
    assert first is not None
    assert third is not None
    assert second == 0
    assert min(first, third) > 10
    for client in clients:
        client.close()


@linux
@queues_are_told
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs("the IPv6 loopback address"))])
def test_one_source_port_goes_elsewhere(host: str) -> None:
    with fastlisten.bind((host, 0)) as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with fastlisten.bind(first.endpoint, reuse_port=True) as second, socket.socket(first.family) as probe:
            probe.bind((host, 0))
            steer(first.fileno(), [0], probe.getsockname()[1], 1)
            probe.connect(first.getsockname())
            with connect(first):
                assert depths([first, second]) == [1, 1]


@linux
def test_what_cannot_be_steered_is_told(three: list[Listener]) -> None:
    assert BALANCES
    with pytest.raises(OSError, match="Invalid argument"):
        steer(three[0].fileno(), [])
    with fastlisten.bind(LOOPBACK) as alone, pytest.raises(OSError, match="Invalid argument"):
        steer(alone.fileno(), [0])


def test_a_state_in_memory_that_another_process_reads() -> None:
    memory = mmap.mmap(-1, 3 * SIZE)
    with fastlisten.bind(LOOPBACK) as listener:
        listener._state = State(listener, memory, SIZE)
        counters = Counters(memory, SIZE)
        assert (counters.accepted, counters.handled, counters.paused) == (0, 0, False)
        with connect(listener):
            connections = listener.accept_many()
        assert (counters.accepted, counters.handled) == (1, 0)
        connections[0].close()
        listener.pause()
        assert counters.handled == 1
        assert counters.paused
        assert counters.counts() == listener._state.counts()
        assert counters.tls_failures() == {}
    for offset in (-1, 3 * SIZE - 1):
        with pytest.raises(ValueError, match="no state can be at"):
            Counters(memory, offset)
    with pytest.raises(BufferError):
        memory.close()  # a Connection could still count there


def test_all_that_processes_count_is_added_up() -> None:
    """A counter that totals.py does not name would be 0 for workers."""
    with fastlisten.bind(LOOPBACK) as listener:
        listener._state.tls_completed()
        listener._state.tls_failed("timeout")
        counts = _counted(listener._state, takes=True)
    total = _sum([counts, counts])
    assert (total["tls_handshakes"], total["tls_failures"]) == (2, {"timeout": 2})
    assert set(total) == set(counts)


@linux
def test_a_fork_has_counters_of_its_own() -> None:
    program = """
import fastlisten, mmap, os, socket
from fastlisten._core.processes import Counters
from fastlisten._core.state import State

memory = mmap.mmap(-1, 16 * mmap.PAGESIZE)
with fastlisten.bind("127.0.0.1:0") as listener:
    listener._state = State(listener, memory)
    with socket.create_connection(listener.getsockname()):
        [connection] = listener.accept_many()
    child = os.fork()
    if child == 0:
        connection.close()
        assert listener.stats().handled == 1
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert Counters(memory, 0).handled == 0
    connection.close()
    assert Counters(memory, 0).handled == 1
"""
    run(program)


@linux
def test_the_end_of_a_parent_that_has_ended_is_told() -> None:
    program = """
import os
from fastlisten._core.processes import end_with_parent
assert end_with_parent(os.getppid())
try:
    end_with_parent(os.getppid() + 1)
except ProcessLookupError:
    print("ended")
"""
    assert run(program).stdout == "ended\n"
    assert callable(end_with_parent)


@linux
@queues_are_told
def test_a_queue_that_does_not_move_is_seen() -> None:
    memory = mmap.mmap(-1, SIZE)
    reader, writer = socket.socketpair()
    with reader, writer, fastlisten.bind(LOOPBACK) as listener:
        listener._state = State(listener, memory)
        queues = Queues([listener.fileno()])
        queues.serve(0, Counters(memory, 0))

        def look(most: int) -> None:
            queues.wait(reader.fileno(), 60.0, 0.001, most, 1000, 1000)

        look(3)
        assert (queues.depth(0), queues.looks(0), queues.quiet) == (0, 0, 3)
        with connect(listener), connect(listener):
            look(3)
            assert (queues.depth(0), queues.looks(0)) == (2, 3)
            listener.accept_many(1)[0].close()
            look(1)
            assert (queues.looks(0), queues.quiet) == (0, 0)
            queues.wait(reader.fileno(), 60.0, 0.001, 1000, 5, 1000)  # until it has not moved five times
            assert (queues.depth(0), queues.looks(0)) == (1, 5)
            writer.send(b"x")
            queues.wait(reader.fileno(), 60.0, 0.001, 1000, 1000, 1000)  # what wakes ends it, too
            assert queues.looks(0) == 5
            listener.accept_many(1)[0].close()
        queues.wake()
        assert queues.quiet == 0
        for number in (-1, 1):
            with pytest.raises(IndexError):
                queues.depth(number)


def test_this_process_is_no_worker() -> None:
    assert fastlisten.worker() is None
    assert os.getpid() > 0
