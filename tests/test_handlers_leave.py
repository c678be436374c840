"""Handlers in threads, or behind a queue of ours, fork, exec or raise: who has no handler is lost by nobody.

With `threads` the kernel's queue is the only one, as inline. With `busy` clients wait in a queue of ours, for
that is what was asked for: a child holds none of them, and who ends by an exception closes and counts them.
"""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from helpers import LIMIT, LOOPBACK, connect, exchange, needs, read_all, wait_until
from helpers.programs import line_of, running

pytestmark = needs("fork")

CLIENTS = 6
THREADS = 4

# The program under test adopts descriptor argv[1], which has CLIENTS queued, and serves it in the way of
# argv[2]; "plain" is a thread for each place, around socket.accept().  The first THREADS handlers wait for
# one another, so that it is known who has one: the last of them to come leaves by `leave`, the others answer.
SERVES = """
import json, os, signal, socket, sys, threading, warnings
import fastlisten
from helpers import wait_until
warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads: an exception from 3.15 on

fd, way, what = int(sys.argv[1]), *sys.argv[2:4]
THREADS = 4
seen, lock, left = [], threading.Lock(), threading.Event()

def plain(handle):
    listener = socket.socket(fileno=fd)
    def work():
        while True:
            connection, _ = listener.accept()
            with connection:
                handle(connection)
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

def serve(handle):
    global listener
    if way == "plain":
        return plain(handle)
    listener = fastlisten.Listener(fileno=fd)
    options = {"busy": "reset", "pending": 9} if "busy" in way else {}
    return listener.serve(handle, threads=THREADS if "threads" in way else 0, **options)

def all_are_here():
    handlers = THREADS if "threads" in way or way == "plain" else 1
    return len(seen) >= handlers and ("busy" not in way or listener.stats().accepted == 6)

def handle(connection):
    with lock:
        seen.append(1)
        number = len(seen)
    if number == 1:
        wait_until(all_are_here)
        leave(connection)
        left.set()
    elif number <= THREADS:
        left.wait(10)
    connection.sendall(b"%d " % os.getpid())
"""


@pytest.fixture
def queue() -> Iterator[tuple[socket.socket, list[socket.socket]]]:
    """Give a listener that children inherit, and the clients in its queue."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(LOOPBACK))
        listener.set_inheritable(True)
        yield listener, [stack.enter_context(connect(listener)) for _ in range(CLIENTS)]


def answer_of(client: socket.socket) -> str:
    """Return what a client is told until the end of its stream: its answers, or "reset"."""
    try:
        return read_all(client).decode()
    except ConnectionResetError:
        return "reset"


FORKS = """
def leave(connection):
    child = os.fork()
    if child:
        print(child, flush=True)
    elif what == "ends":
        os._exit(0)
    elif what == "lives":
        os.read(0, 1)
        os._exit(0)
    elif what == "raises":
        raise SystemExit
    elif what == "closes":
        listener.close()
        os._exit(0)
    elif what == "stops":
        listener.stop(drain=0)
        os._exit(0)
    elif what == "returns":
        connection.close()

def handle_in_both(connection):
    parent = os.getpid()
    try:
        handle(connection)
    except OSError:
        if os.getpid() == parent:
            raise

serve(handle_in_both)
"""


@pytest.mark.parametrize("child", ["ends", "lives", "raises", "closes", "stops", "returns"])
@pytest.mark.parametrize("way", ["busy", "threads", "threads busy"])
def test_a_child_answers_nobody_and_keeps_nobody_who_waits(
    way: str, child: str, queue: tuple[socket.socket, list[socket.socket]]
) -> None:
    """Whatever the child does, everybody is answered once, and by the parent.

    In a child that lives on are the connections of handlers of other threads, as after any fork: their end is
    told when it is over. The others' is told at once.
    """
    listener, clients = queue
    fds = [listener.fileno()]
    with running(SERVES + FORKS, str(fds[0]), way, child, pass_fds=fds) as process:
        forked = int(line_of(process))
        who_waited = clients[1 if way == "busy" else THREADS :]
        answers = [answer_of(client) for client in who_waited]
        assert answers == [f"{process.pid} "] * len(who_waited)
        assert exchange(listener, b"") == b"%d " % process.pid
        assert process.stdin is not None
        process.stdin.write("x")  # who lives on ends
        process.stdin.flush()
        others = [client for client in clients if client not in who_waited]
        assert [answer_of(client) for client in others] == [f"{process.pid} "] * len(others)
        assert exchange(listener, b"") == b"%d " % process.pid
        wait_until_gone(forked)


def wait_until_gone(child: int) -> None:
    """Wait until a process that is no child of ours has ended; it may be a zombie then."""

    def gone() -> bool:
        try:
            with open(f"/proc/{child}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] in "ZX"
        except FileNotFoundError:
            return True

    wait_until(gone)


EXEC = """
REST = '''
import os, select, socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
listener.setblocking(False)
while select.select([listener], [], [], 0)[0]:
    client, _ = listener.accept()
    with client:
        client.sendall(b"rest ")
print("done", flush=True)
'''
def leave(connection):
    connection.sendall(b"%d " % os.getpid())
    os.set_inheritable(fd, True)
    os.execv(sys.executable, [sys.executable, "-c", REST, str(fd)])
serve(handle)
"""


@pytest.mark.parametrize("way", ["plain", "threads", "threads busy", "busy"])
def test_exec_out_of_a_handler(way: str, queue: tuple[socket.socket, list[socket.socket]]) -> None:
    """The new program finds who has no handler; whose handler is no more, their streams end with it.

    A queue of ours ends with the program, too.
    """
    listener, clients = queue
    fds = [listener.fileno()]
    with running(SERVES + EXEC, str(fds[0]), way, "exec", pass_fds=fds) as process:
        told = [answer_of(client) for client in clients]
        assert line_of(process) == "done"
        assert process.wait(LIMIT) == 0
    gone = 3 if way in ("plain", "threads") else 5
    assert sorted(told) == sorted([f"{process.pid} "] + [""] * gone + ["rest "] * (5 - gone))
    if gone == 3:
        assert told[THREADS:] == ["rest ", "rest "]


RAISES = """
def leave(connection):
    if what != "SIGINT" or way == "busy":
        connection.sendall(b"%d " % os.getpid())
    left.set()
    if what == "SIGINT":  # for the main thread
        return os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit if what == "SystemExit" else KeyboardInterrupt
told = None
try:
    serve(handle)
except BaseException as error:
    told = type(error).__name__
print(json.dumps([told, listener.stats()[:3] + listener.stats()[5:7]]), flush=True)
"""


@pytest.mark.parametrize("what", ["SystemExit", "KeyboardInterrupt", "SIGINT"])
@pytest.mark.parametrize("way", ["threads", "threads busy", "busy"])
def test_a_handler_ends_the_loop(
    way: str, what: str, queue: tuple[socket.socket, list[socket.socket]]
) -> None:
    """Who has a handler is answered or cut; the others are in the kernel's queue, or in ours and counted."""
    listener, clients = queue
    fds = [listener.fileno()]
    with running(SERVES + RAISES, str(fds[0]), way, what, pass_fds=fds) as process:
        error, counts = json.loads(line_of(process))
        assert process.wait(LIMIT) == 0
    accepted, handled, active, refused, dropped = counts
    assert (error, active, refused) == ("KeyboardInterrupt" if what == "SIGINT" else what, 0, 0)
    queued = {str(address): accepted for accepted, address in still_queued(listener)}
    told: list[Any] = []
    for client in clients:
        if (mine := queued.pop(str(client.getsockname()), None)) is not None:
            mine.close()
            told.append("queued")
        else:
            told.append(answer_of(client))
    assert not queued
    assert told.count("queued") == CLIENTS - accepted
    assert handled + dropped == accepted
    if way == "busy":
        assert (accepted, handled) == (CLIENTS, 1)
        assert told == [f"{process.pid} "] + [""] * (CLIENTS - 1)
    else:
        # Who has a handler is cut, unless it was quicker; who came free at the end may have taken one more.
        assert handled >= THREADS
        assert dropped == 0 or "busy" in way
        assert told.count(f"{process.pid} ") + told.count("") == accepted
        assert 1 <= told.count(f"{process.pid} ") <= handled or what == "SIGINT"


def still_queued(listener: socket.socket) -> Iterator[tuple[socket.socket, Any]]:
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            yield listener.accept()
