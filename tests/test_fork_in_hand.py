"""A thread forks while another has a client in hand that no handler has yet: the child never keeps it.

Clients are accepted without the GIL, so that a fork can come between the accept and the handler. The child
has the connections of handlers, as after any fork; one more it would keep open until its own end, and the
client would not see its stream end, or its refusal.
"""

import errno
import itertools
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import LIMIT, exchange, needs
from helpers.programs import line_of, run, running

pytestmark = needs("fork", "Linux")

FORKS = 60
CLIENTS = 4

# Each child looks for connections beside those of handlers; some children live on until the program ends.
FORKER = """
import asyncio, gc, json, os, socket, sys, threading, time, warnings
import fastlisten
from fastlisten import aio
from helpers import serving, wait_until
from helpers.internals import clients_of

way, forks = sys.argv[1], int(sys.argv[2])
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads, which is the point
# A thread gives the GIL up where it waits and nowhere else: not between accept and the handler's first line.
sys.setswitchinterval(100)
closing = threading.Lock()  # nobody forks in the middle of a handler's close()
gc.freeze()  # held() looks at what is made from now on
life, end_of_life = os.pipe()  # who reads there lives as long as the parent

# A handler that is an object, with its client in `args` from the call on: BaseException.__new__() is C.
# Without the GIL a fork stops the other threads between any two instructions of Python, and so before a
# handler's first line, too.
class Handler(Exception):
    def __init__(self, connection):
        connection.sendall(connection.recv(100))
        connection.shutdown(socket.SHUT_RDWR)  # a child has it, too
        with closing:
            connection.close()

def held():  # the descriptors that handlers have, also those of threads that are not in this child
    handlers = [each for each in gc.get_objects() if type(each) is Handler]
    return [fd for handler in handlers if (fd := handler.args[0].fileno()) != -1]

def connected():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            sock = socket.socket(fileno=int(name))
        except OSError:  # no socket, or the descriptor of the listing itself
            continue
        try:
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if sock.family == socket.AF_INET and not listens:
                found.append(int(name))
        finally:
            sock.detach()
    return found

def fork(lives, stats, held):
    reader, writer = os.pipe()
    with closing:
        began = time.monotonic()
        child = os.fork()
        took = time.monotonic() - began
    if child:
        os.close(writer)
        with open(reader) as told:
            strangers, uncounted = json.loads(told.readline())
        if not lives:
            os.waitpid(child, 0)
        return strangers, uncounted, took
    try:
        mine = held()
        found = connected()
        strangers = [fd for fd in found if fd not in mine]
        os.write(writer, json.dumps([strangers, stats().active - len(mine)]).encode() + b"\\n")
        os.close(end_of_life)
        if lives:
            os.read(life, 1)
    finally:
        os._exit(0)

def fork_often(stats, held):
    lives = {5, forks // 2, forks - 1}
    said = [fork(number in lives, stats, held) for number in range(forks)]
    strangers = sum(bool(found) for found, _, _ in said)
    uncounted = sum(bool(count) for _, count, _ in said)
    print(json.dumps([strangers, uncounted, sorted(took for _, _, took in said)[forks // 2]]), flush=True)

def end(listener):
    wait_until(lambda: not listener.stats().active)
    stats = listener.stats()
    print(json.dumps([stats.accepted, stats.handled, stats.refused, stats.dropped]), flush=True)
"""

SERVES = """
OPTIONS = {
    "inline": {},
    "threads": {"threads": 3},
    "growing threads": {"threads": (1, 4)},
    "busy": {"busy": "reset", "pending": 1},
    "busy text": {"busy": b"busy", "pending": 0},
    "busy threads": {"busy": "reset", "pending": 1, "threads": 2},
    "busy limit": {"busy": b"busy", "pending": 1, "threads": 3, "max_connections": 1},
    "first bytes": {"first_bytes": 10},
    "first bytes threads": {"first_bytes": 10, "threads": 3},
    "first bytes busy": {"first_bytes": 10, "busy": "reset", "pending": 1, "threads": 2},
    "admission": {"threads": 3, "admission": fastlisten.Admission(concurrent=100)},
    "admission busy": {"busy": b"busy", "pending": 1, "admission": fastlisten.Admission(concurrent=2)},
}

def iterate(listener):
    for connection in listener:
        Handler(connection)

with fastlisten.bind("127.0.0.1:0") as listener:
    print(listener.endpoint.port, flush=True)
    target = threading.Thread(target=iterate, args=[listener]) if way == "iteration" else None
    if target is not None:
        target.start()
        fork_often(listener.stats, held)
        sys.stdin.readline()
        end(listener)
        listener.stop()
        target.join()
    else:
        with serving(listener, Handler, **OPTIONS[way]):
            fork_often(listener.stats, held)
            sys.stdin.readline()
            end(listener)
            if "admission" in OPTIONS[way]:
                wait_until(lambda: not OPTIONS[way]["admission"].stats().open)
"""

AWAITS = """
class Answer(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)
        self.transport.close()  # ends the stream, too: a child has it

async def main():
    busy = "reset" if way == "asyncio" else b"busy"
    server = await aio.create_server(Answer, "127.0.0.1", 0, busy=busy, pending=1, max_connections=2)
    print(server.sockets[0].getsockname()[1], flush=True)
    def transports():
        sockets = [transport.get_extra_info("socket") for transport in clients_of(server)]
        return [-1 if sock is None else sock._sock.fileno() for sock in sockets]  # None: it is about to end

    await asyncio.to_thread(fork_often, server.stats, transports)
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.to_thread(end, server)
    server.close()
    await server.wait_closed()

asyncio.run(main())
"""

# Forks while a thread is in close(), which waits for a client that does not read: SO_LINGER, socket(7).
CLOSES = """
import os, socket, struct, sys, threading, warnings
import fastlisten
from helpers import connect, read_all, wait_until

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads, which is the point
taken = []

def is_open(fd):
    try:
        return bool(os.fstat(fd))
    except OSError:
        return False

def handle(connection):
    taken.append(connection.fileno())
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    connection.setblocking(False)
    try:
        while True:
            connection.send(bytes(65536))
    except BlockingIOError:
        pass

def iterate(listener):
    for connection in listener:
        with connection:
            handle(connection)

def take(listener):
    with listener.accept_many(1)[0] as connection:
        handle(connection)

WAYS = {
    "inline": lambda listener: listener.serve(handle),
    "threads": lambda listener: listener.serve(handle, threads=2),
    "iteration": iterate,
    "accept_many": take,
}

with fastlisten.bind("127.0.0.1:0") as listener:
    thread = threading.Thread(target=WAYS[sys.argv[1]], args=(listener,))
    thread.start()
    with connect(listener, receive_buffer=4096) as client:
        wait_until(lambda: taken and not is_open(taken[0]))  # the close has begun, in the kernel
        child = os.fork()
        if not child:
            stats = listener.stats()
            print(stats.accepted, stats.handled, stats.active, stats.dropped, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print(listener.stats().active, flush=True)
        assert read_all(client)
    wait_until(lambda: listener.stats().handled)
    listener.stop()
    thread.join()
"""

# Forks while two threads make and close listeners; what its hooks complain of comes last.
NEIGHBOURS = """
import os, sys, threading, warnings
import fastlisten

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads, which is the point
complaints = []
sys.unraisablehook = lambda told: complaints.append(repr(told.exc_value))
sys.setswitchinterval(1e-6)
kept = [fastlisten.Listener() for _ in range(50)]
over = threading.Event()

def come_and_go():
    while not over.is_set():
        fastlisten.Listener().close()

threads = [threading.Thread(target=come_and_go) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
over.set()
for thread in threads:
    thread.join()
print(complaints)
"""

PROGRAMS = dict.fromkeys(
    [
        *["inline", "threads", "growing threads", "iteration"],
        *["busy", "busy text", "busy threads", "busy limit"],
        *["first bytes", "first bytes threads", "first bytes busy"],
        *["admission", "admission busy"],
    ],
    SERVES,
) | dict.fromkeys(["asyncio", "asyncio text"], AWAITS)


def asked(port: int, over: threading.Event, first: int) -> Counter[str]:
    """Ask until it is over; return how often a client was answered or refused."""
    told: Counter[str] = Counter()
    for number in itertools.count():
        if over.is_set():
            return told
        question = b"%d %d" % (first, number)
        try:
            answer = exchange(("127.0.0.1", port), question)
        except OSError as error:  # the reset can come before any of the client's calls
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
                raise
            told["refused"] += 1
            continue
        told["refused" if answer == b"busy" else "answered"] += 1
        assert answer in (question, b"busy")
    raise AssertionError("not reached")


@pytest.mark.parametrize("way", ["inline", "threads", "iteration", "accept_many"])
def test_a_child_counts_out_whom_a_thread_of_the_parent_was_closing(way: str) -> None:
    assert run(CLOSES, way).stdout.split("\n")[:2] == ["1 1 0 0", "1"]


@pytest.mark.parametrize("way", PROGRAMS)
def test_a_fork_beside_a_client_that_is_being_accepted(way: str) -> None:
    """Each client is answered or refused once and sees its end at once, while children live on; the parent's
    counters say what the clients saw, and a child's that it has nobody but those of handlers."""
    over = threading.Event()
    with (
        running(FORKER + PROGRAMS[way], way, str(FORKS)) as process,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        port = int(line_of(process))
        asking = [pool.submit(asked, port, over, first) for first in range(CLIENTS)]
        try:
            strangers, uncounted, took = json.loads(line_of(process))
        finally:
            over.set()
        told = sum((one.result(LIMIT) for one in asking), Counter[str]())
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        accepted, handled, refused, dropped = json.loads(line_of(process))
        assert process.wait(LIMIT) == 0
    assert (strangers, uncounted) == (0, 0)
    assert took < 0.09  # nobody is waited for in vain, which would take 0.1 s
    assert (handled, refused, dropped) == (told["answered"], told["refused"], 0)
    assert accepted == handled + refused > FORKS


def test_a_fork_beside_listeners_that_come_and_go() -> None:
    """Each listener is told of the fork, whatever other threads make or close meanwhile."""
    assert run(NEIGHBOURS, str(FORKS)).stdout == "[]\n"
