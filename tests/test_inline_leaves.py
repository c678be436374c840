"""A handler in the loop's thread forks, is replaced or raises: nobody is lost, answered twice or held open.

Each way of serving does the same beside a plain loop around socket.accept(): who has no handler yet is in the
kernel's queue, whatever the handler before does.
"""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from helpers import LIMIT, LOOPBACK, connect, needs, read_all
from helpers.programs import line_of, python, running, wait_until_asleep

pytestmark = needs("fork")

CLIENTS = 6

# The program under test adopts descriptor argv[1], which has the clients queued, and serves it in the way of
# argv[2].  `handle` is the handler of each test; it counts in `seen`.
SERVES = """
import os, signal, socket, sys, warnings
import fastlisten
from fastlisten import socketserver

warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads, from 3.12 on
fd, way = int(sys.argv[1]), sys.argv[2]
seen = []

def serve(handle):
    if way == "accept":
        listener = socket.socket(fileno=fd)
        while True:
            connection, _ = listener.accept()
            with connection:
                handle(connection)
    elif way == "TCPServer":
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                handle(self.request)
        with socketserver.TCPServer(("127.0.0.1", 0), Handler, False) as server:
            server.socket.close()
            server.socket = fastlisten.Listener(fileno=fd)
            server.serve_forever()
    else:
        listener = fastlisten.Listener(fileno=fd)
        if way == "for":
            for connection in listener:
                with connection:
                    handle(connection)
        else:
            listener.serve(handle, **({"busy": "reset", "pending": 9} if way == "busy" else {}))

def answer(connection, *also):
    connection.sendall(b"%d " % os.getpid())
"""

WAYS = ["accept", "serve", "TCPServer", "for"]


@pytest.fixture
def queue() -> Iterator[tuple[socket.socket, list[socket.socket]]]:
    """Give a listener that children inherit, and the clients in its queue."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(LOOPBACK))
        listener.set_inheritable(True)
        yield listener, [stack.enter_context(connect(listener)) for _ in range(CLIENTS)]


def answers_of(clients: list[socket.socket]) -> list[int]:
    """Return how often each client was answered; all must have come to the end of their streams."""
    return [len(read_all(client).split()) for client in clients]


FORKS = """
def handle(connection):
    seen.append(connection)
    if len(seen) == 1 and os.fork() == 0:
        if sys.argv[3] == "ends":
            os._exit(0)
        os.read(0, 1)  # it lives on with the first client, until it is told to end
        os._exit(0)
    answer(connection)
print(os.getpid(), flush=True)
serve(handle)
"""


@pytest.mark.parametrize("child", ["ends", "lives"])
@pytest.mark.parametrize("way", [*WAYS, "busy"])
def test_a_handler_forks(way: str, child: str, queue: tuple[socket.socket, list[socket.socket]]) -> None:
    """The child has the client of that handler, and no other: the others' streams end with their answers."""
    listener, clients = queue
    fds = [listener.fileno()]
    with running(SERVES + FORKS, str(fds[0]), way, child, pass_fds=fds) as process:
        assert line_of(process)
        assert answers_of(clients[1:]) == [1] * (CLIENTS - 1)
        assert clients[0].recv(100).count(b" ") == 1
        assert process.stdin is not None
        process.stdin.write("x")  # who lives on ends
        process.stdin.flush()
        assert read_all(clients[0]) == b""


SERVES_ON = """
def handle(connection):
    seen.append(1)
    if len(seen) == 1:
        child = os.fork()
        if child == 0:
            connection.close()
            return
        print(child, flush=True)
    answer(connection)
serve(handle)
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_loop_goes_on_in_both_after_a_fork(
    way: str, queue: tuple[socket.socket, list[socket.socket]]
) -> None:
    """Parent and child take from the kernel's queue: each client is answered by one of them."""
    listener, clients = queue
    fds = [listener.fileno()]
    with running(SERVES + SERVES_ON, str(fds[0]), way, pass_fds=fds) as process:
        child = int(line_of(process))
        try:
            assert answers_of(clients) == [1] * CLIENTS
            with contextlib.ExitStack() as stack:
                more = [stack.enter_context(connect(listener)) for _ in range(20)]
                assert answers_of(more) == [1] * 20
        finally:
            os.kill(child, signal.SIGKILL)


EXEC = """
REST = '''
import os, socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
listener.settimeout(5)
for _ in range(int(sys.argv[2])):
    client, _ = listener.accept()
    with client:
        client.sendall(b"0 ")
'''
def handle(connection):
    answer(connection)
    os.set_inheritable(fd, True)
    os.execv(sys.executable, [sys.executable, "-c", REST, str(fd), sys.argv[3]])
serve(handle)
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_handler_is_replaced_by_another_program(
    way: str, queue: tuple[socket.socket, list[socket.socket]]
) -> None:
    """exec(): the new program finds all in the queue who had no handler."""
    listener, clients = queue
    fds = [listener.fileno()]
    with running(SERVES + EXEC, str(fds[0]), way, str(CLIENTS - 1), pass_fds=fds) as process:
        assert answers_of(clients) == [1] * CLIENTS
        assert process.wait(LIMIT) == 0


RAISES = """
import json
def handle(connection):
    seen.append(1)
    answer(connection)
    if len(seen) == 2:
        if sys.argv[3] == "SIGINT":
            signal.raise_signal(signal.SIGINT)
        if sys.argv[3] == "Ctrl-C":
            print("inside", flush=True)
            connection.recv(1)  # until the signal comes
        raise SystemExit if sys.argv[3] == "SystemExit" else KeyboardInterrupt
told = None
try:
    serve(handle)
except BaseException as error:
    told = type(error).__name__
print(json.dumps([told, len(seen)]), flush=True)
"""


@pytest.mark.parametrize("what", ["SystemExit", "KeyboardInterrupt", "SIGINT", "Ctrl-C"])
@pytest.mark.parametrize("way", WAYS)
def test_a_handler_ends_the_loop(
    way: str, what: str, queue: tuple[socket.socket, list[socket.socket]]
) -> None:
    """Two are answered; the others are still queued, for whoever accepts next."""
    listener, clients = queue
    fds = [listener.fileno()]
    with running(SERVES + RAISES, str(fds[0]), way, what, pass_fds=fds) as process:
        if what == "Ctrl-C":
            assert line_of(process) == "inside"
            wait_until_asleep(process)
            process.send_signal(signal.SIGINT)
        told = line_of(process)
        assert told == f'["{what if what == "SystemExit" else "KeyboardInterrupt"}", 2]'
        assert process.wait(LIMIT) == 0
    assert answers_of(clients[:2]) == [1, 1]
    listener.settimeout(LIMIT)
    for client in clients[2:]:
        accepted, address = listener.accept()
        assert address == client.getsockname()
        accepted.close()


DROPPED = """
import json, sys, fastlisten
from helpers import connect, read_all, wait_until
with fastlisten.bind(("127.0.0.1", 0)) as listener:
    clients = [connect(listener) for _ in range(6)]
    def handler(connection):
        connection.sendall(b"1 ")
        wait_until(lambda: listener.stats().accepted == 6)
        raise SystemExit
    try:
        listener.serve(handler, busy="reset", pending=9)
    except SystemExit:
        pass
    told = []
    for client in clients:
        try:
            told.append(read_all(client).decode())
        except ConnectionResetError:
            told.append("reset")
        client.close()
    stats = listener.stats()
    print(json.dumps([told, stats.accepted, stats.handled, stats.active, stats.refused, stats.dropped]))
"""


def test_who_waits_in_our_queue_when_it_ends_is_closed_and_counted() -> None:
    """pending= asks for a queue of ours; who is in it when SystemExit ends the loop is `dropped`."""
    told, *counts = python(DROPPED)
    assert told == ["1 "] + [""] * 5
    assert counts == [6, 1, 0, 0, 5]
