"""Ours in the originals' place, and beside libraries that put theirs there."""

import importlib.util
import multiprocessing
import pickle
import socket
from multiprocessing import forkserver, resource_tracker
from typing import Any

import pytest

import fastlisten
import fastlisten.socket
from helpers import LIMIT, connect, needs, read_all
from helpers.programs import python, run

IN_PLACE = """
import importlib, json, socket, sys
if sys.argv[1] == "after":
    import fastlisten
import fastlisten.socket
for _ in range(int(sys.argv[2])):
    socket.socket = fastlisten.socket.socket
    socket.create_server = {create_server}
if sys.argv[1] == "reloaded":
    importlib.reload(fastlisten.socket)
told = []
for thing in (socket.socket(), {{}}, None):
    told.append(isinstance(thing, socket.socket))
    if told[-1]:
        thing.close()
told.append(issubclass(fastlisten.Listener, socket.socket))
with socket.create_server(("127.0.0.1", 0)) as listener:
    with socket.create_connection(listener.getsockname()) as client:
        with listener.accept()[0] as accepted:
            client.sendall(b"hello")
            told.append(accepted.recv(5).decode())
a, b = socket.socketpair()
with a, b:
    told.append(isinstance(a, socket.socket))
print(json.dumps(told))
"""


@pytest.mark.parametrize("create_server", ["fastlisten.create_server", "fastlisten.socket.create_server"])
@pytest.mark.parametrize("times", ["1", "2"])
@pytest.mark.parametrize("when", ["before", "after", "reloaded"])
def test_our_socket_and_create_server_in_the_originals_place(
    when: str, times: str, create_server: str
) -> None:
    """As who uses PySocks does; isinstance() asked itself without end, and so did create_server()."""
    told = python(IN_PLACE.format(create_server=create_server), when, times)
    assert told == [True, False, False, True, "hello", True]


SERVERS_IN_PLACE = """
import asyncio, json, socketserver, sys, threading
import fastlisten.aio, fastlisten.socketserver
from helpers import exchange
for _ in range(2):
    for name in ("TCPServer", "ThreadingTCPServer"):
        setattr(socketserver, name, getattr(fastlisten.socketserver, name))
    asyncio.start_server = fastlisten.aio.start_server
    asyncio.BaseEventLoop.create_server = lambda loop, *args, **kw: fastlisten.aio.create_server(*args, **kw)

class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.read())

told = []
for kind in (socketserver.TCPServer, socketserver.ThreadingTCPServer):
    with kind(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        told.append(exchange(server.server_address).decode())
        server.shutdown()
        thread.join()

async def main():
    async def echo(reader, writer):
        writer.write(await reader.read())
        writer.close()
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        told.append((await asyncio.to_thread(exchange, server.sockets[0].getsockname())).decode())

asyncio.run(main())
print(json.dumps(told))
"""


def test_our_servers_in_the_originals_place() -> None:
    assert python(SERVERS_IN_PLACE) == ["ping"] * 3


# --- gevent and eventlet

PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}

GREEN_SERVER = """
import socket, threading
{both}
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline())

with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with socket.create_connection(server.server_address) as client:
        client.sendall(b"hello\\n")
        print(client.recv(100))
    server.shutdown()
    thread.join()
"""

GREEN_ACCEPT = """
import socket, threading
{both}
with {make} as listener:
    def connect():
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"hello")
            client.recv(1)
    thread = threading.Thread(target=connect)
    thread.start()
    accepted, address = listener.accept()
    print(accepted.recv(100), isinstance(accepted, socket.socket))
    accepted.close()
    thread.join()
    listener.settimeout(0.01)
    try:
        listener.accept()
    except TimeoutError as error:
        print(error)
"""

GREEN_REFUSED = """
{both}
import fastlisten
listener = fastlisten.bind("127.0.0.1:0")
for refused in (lambda: listener.serve(print), lambda: next(iter(listener)), listener.accept_many):
    try:
        refused()
    except RuntimeError as error:
        print(error)
listener.close()
"""


@pytest.mark.parametrize("order", ["patched first", "patched after"])
@pytest.mark.parametrize("library", PATCHES)
@pytest.mark.parametrize(
    ("program", "ours", "make"),
    [
        (GREEN_SERVER, "from fastlisten import socketserver", ""),
        (GREEN_ACCEPT, "from fastlisten import socket as drop", 'drop.create_server(("127.0.0.1", 0))'),
        (GREEN_ACCEPT, "import fastlisten", 'fastlisten.bind("127.0.0.1:0")'),
        (GREEN_REFUSED, "import fastlisten", ""),
    ],
    ids=["socketserver", "socket", "bind", "refused"],
)
def test_where_sockets_are_green_ours_are_or_refuse(
    program: str, ours: str, make: str, library: str, order: str
) -> None:
    """The drop-ins are the original's then; what would block every greenlet says so at once."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    if (library, order, program) == ("eventlet", "patched after", GREEN_SERVER):
        pytest.skip("the original's serve_forever() waits for ever then, too")
    both = [PATCHES[library], ours]
    if order == "patched after":
        both.reverse()
    done = run(program.format(both="\n".join(both), make=make), options=["-W", "ignore"])
    lines = done.stdout.splitlines()
    if program is GREEN_SERVER:
        assert lines == [repr(b"hello\n")]
    elif program is GREEN_ACCEPT:
        assert lines == [f"{b'hello'!r} True", "timed out"]
    else:
        assert len(lines) == 3
        assert all(f"since {library} has patched the socket module" in line for line in lines)


# --- another process


def answers(listener: Any) -> None:
    """Accept one client and answer it, as the process that a Listener was sent to."""
    client, _ = listener.accept()
    with client:
        client.sendall(type(listener).__name__.encode())


@needs("signals between processes")  # and with them processes that are quick to start
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.parametrize("make", [fastlisten.create_server, fastlisten.socket.create_server])
def test_a_listener_goes_to_a_process_as_a_socket_does(make: Any, method: str) -> None:
    with make(("127.0.0.1", 0)) as listener:
        context: Any = multiprocessing.get_context(method)
        process = context.Process(target=answers, args=(listener,))
        process.start()
        with connect(listener) as client:
            assert read_all(client).decode() == type(listener).__name__
        process.join(LIMIT)
        assert process.exitcode == 0
        process.close()
    helper: Any
    for helper in (forkserver._forkserver, resource_tracker._resource_tracker):
        helper._stop()  # they would go on, and so would their pipes


def test_a_listener_is_pickled_by_multiprocessing_only() -> None:
    told = python(
        "import json, pickle, sys, fastlisten\n"
        "with fastlisten.bind(('127.0.0.1', 0)) as listener:\n"
        "    try:\n"
        "        pickle.dumps(listener)\n"
        "    except TypeError as error:\n"
        "        print(json.dumps(str(error)))\n"
    )
    with pytest.raises(TypeError, match="cannot pickle") as error, socket.socket() as sock:
        pickle.dumps(sock)
    assert told == str(error.value).replace("'socket'", "'Listener'")
