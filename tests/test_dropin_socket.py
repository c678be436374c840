"""fastlisten.socket beside socket: the same act on both, the same outcome."""

import inspect
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
import warnings
from multiprocessing.reduction import ForkingPickler

import pytest

import fastlisten
from fastlisten import socket as dropin
from helpers import LIMIT, connect, exchange, needs, posix_only, serving

BOTH = pytest.mark.parametrize("module", [socket, dropin], ids=["original", "dropin"])
# What makes sockets that can listen; everything else is the original.
OURS = {"socket", "create_server", "fromfd", "fromshare"}


def outcome(act, module):
    """What an act gives or raises, without what differs from one run to the next."""
    with warnings.catch_warnings():
        # create_server() leaves its socket open when an argument has the wrong type: the original's way
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            return "returned", act(module)
        except Exception as error:
            details = (error.errno, getattr(error, "winerror", None)) if isinstance(error, OSError) else ()
            return type(error), details, str(error), error.__cause__, error.__suppress_context__


def same(act):
    """Assert that an act has the same outcome with both modules, and return it."""
    theirs, ours = outcome(act, socket), outcome(act, dropin)
    assert ours == theirs
    return ours


# --- names ------------------------------------------------------------------------------------------


def test_every_name_is_there_and_is_the_original():
    assert dropin.__all__ == socket.__all__
    for name in dir(socket):
        if name in OURS:
            assert getattr(dropin, name) is not getattr(socket, name)
        elif not name.startswith("__"):
            assert getattr(dropin, name) is getattr(socket, name), name
        assert name in dir(dropin)
    with pytest.raises(AttributeError):
        _ = dropin.no_such_name


def test_star_import():
    theirs, ours = {}, {}
    exec("from socket import *", theirs)
    exec("from fastlisten.socket import *", ours)
    assert theirs.keys() == ours.keys()
    assert {name for name in theirs if theirs[name] is not ours[name]} - {"__builtins__"} <= OURS


def test_a_changed_original_is_seen(monkeypatch):
    monkeypatch.setattr(socket, "getfqdn", len)
    assert dropin.getfqdn is len


@pytest.mark.parametrize("name", sorted(OURS & set(dir(socket))))
def test_signatures(name):
    def shape(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape(getattr(dropin, name)) == shape(getattr(socket, name))


# --- the class ----------------------------------------------------------------------------------------


def test_the_class():
    assert issubclass(dropin.socket, socket.socket)
    assert issubclass(dropin.socket, fastlisten.Listener)
    assert issubclass(socket.socket, dropin.socket)
    assert not issubclass(int, dropin.socket)
    with dropin.socket() as sock:
        assert type(sock) is dropin.socket
        assert isinstance(sock, socket.socket)
        assert (sock.family, sock.type, sock.proto) == (socket.AF_INET, socket.SOCK_STREAM, 0)
    assert not isinstance(None, dropin.socket)


def test_a_subclass_has_instances_of_its_own():
    class Mine(dropin.socket):
        pass

    with Mine() as mine, dropin.socket() as other:
        assert isinstance(mine, Mine)
        assert isinstance(mine, dropin.socket)
        assert not isinstance(other, Mine)
        assert issubclass(Mine, dropin.socket)
        assert not issubclass(socket.socket, Mine)


@BOTH
def test_accept(module):
    with module.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with connect(listener) as client:
            accepted, address = listener.accept()
            with accepted:
                assert type(accepted) is socket.socket
                assert isinstance(accepted, module.socket)
                assert address == client.getsockname()
                assert accepted.gettimeout() is None
                assert not accepted.get_inheritable()


def test_serve():
    def handler(connection):
        connection.sendall(connection.recv(99).upper())

    with dropin.create_server(("127.0.0.1", 0)) as listener:
        assert type(listener) is dropin.socket
        with serving(listener, handler):
            assert exchange(listener, b"hello") == b"HELLO"


@BOTH
def test_create_connection_and_socketpair(module):
    with (
        module.create_server(("127.0.0.1", 0)) as listener,
        module.create_connection(listener.getsockname()) as client,
    ):
        assert type(client) is socket.socket
        assert isinstance(client, module.socket)
    for end in module.socketpair():
        assert type(end) is socket.socket
        end.close()


# --- the life of a socket -----------------------------------------------------------------------------


@BOTH
def test_repr(module):
    sock = module.socket(socket.AF_INET, socket.SOCK_STREAM)
    with sock:
        sock.bind(("127.0.0.1", 0))
        assert repr(sock) == (
            f"<socket.socket fd={sock.fileno()}, family={socket.AF_INET}, type={socket.SOCK_STREAM}, "
            f"proto=0, laddr={sock.getsockname()}>"
        )
    assert repr(sock) == (
        f"<socket.socket [closed] fd=-1, family={socket.AF_INET}, type={socket.SOCK_STREAM}, proto=0>"
    )


@BOTH
def test_dup(module):
    with module.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT)
        with listener.dup() as other:
            assert type(other) is module.socket
            assert other.gettimeout() == LIMIT
            assert other.fileno() != listener.fileno()
            assert other.getsockname() == listener.getsockname()
            with connect(listener):
                other.accept()[0].close()


@BOTH
def test_detach_and_adopt(module):
    listener = module.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    number = listener.detach()
    assert listener.fileno() == -1
    assert listener.detach() == -1
    with module.socket(fileno=number) as again:
        assert again.fileno() == number
        assert again.getsockname() == address
        with connect(address):
            again.accept()[0].close()


@BOTH
def test_fromfd(module):
    with module.create_server(("127.0.0.1", 0)) as listener:
        other = module.fromfd(listener.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        with other:
            assert type(other) is module.socket
            assert other.fileno() != listener.fileno()
            with connect(listener):
                other.accept()[0].close()


@pytest.mark.skipif(not hasattr(socket, "fromshare"), reason="needs socket.share, which Windows has")
@BOTH
def test_share(module):
    with (
        module.create_server(("127.0.0.1", 0)) as listener,
        module.fromshare(listener.share(os.getpid())) as other,
    ):
        assert type(other) is module.socket
        assert other.getsockname() == listener.getsockname()


@BOTH
def test_with_statement_closes_also_after_an_error(module):
    with pytest.raises(LookupError), module.socket() as sock:
        raise LookupError
    assert sock.fileno() == -1
    sock.close()


@BOTH
def test_a_socket_that_is_dropped_warns(module):
    sock = module.socket()
    text = f"unclosed {sock!r}"
    with pytest.warns(ResourceWarning) as caught:
        del sock
    assert [str(warning.message) for warning in caught] == [text]


AUDIT = """
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append(
    (event, *(type(arg).__name__ if event == "socket.__new__" else arg for arg in args[1:])))
    if event.startswith("socket.") else None)
import socket as standard
import {module} as module
seen.clear()
with module.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    with standard.create_connection(listener.getsockname()) as client:
        port = str(listener.getsockname()[1])
        listener.accept()[0].close()
with module.create_server(("127.0.0.1", 0)) as listener:
    pass
print(str(seen).replace(port, "1"))
"""


@posix_only("the wake-up is a socketpair(), which binds, listens and connects there")
def test_audit_events():
    outputs = [
        subprocess.run(
            [sys.executable, "-c", AUDIT.format(module=name)],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
        for name in ("socket", "fastlisten.socket")
    ]
    assert "socket.bind" in outputs[0]
    # create_server() makes its socket once more, as the class that it returns
    events = [eval(output) for output in outputs]
    extra = events[1].pop()
    assert extra[0] == "socket.__new__"
    assert events[1] == events[0]


# --- pickling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_refuses(protocol):
    def act(module):
        with module.socket() as sock:
            pickle.dumps(sock, protocol)

    kind, *_ = same(act)
    assert kind is TypeError


@pytest.mark.parametrize("make", [dropin.create_server, fastlisten.bind])
def test_multiprocessing_pickles(make):
    """As it sends a socket to another process; that keeps its class."""
    with make(("127.0.0.1", 0)) as listener, pickle.loads(ForkingPickler.dumps(listener)) as other:
        assert type(other) is type(listener)
        assert other.fileno() != listener.fileno()
        with connect(listener):
            other.accept()[0].close()
    multiprocessing.resource_sharer.stop(timeout=LIMIT)


# --- errors -----------------------------------------------------------------------------------------------


def closed(module):
    sock = module.socket()
    sock.close()
    return sock


def closed_behind_its_back(module):
    sock = module.socket()
    socket.close(sock.fileno())
    number = sock.fileno()
    return sock.detach() == number


def with_socket(act, *arguments):
    """An act on a fresh socket, which is closed whatever happens."""

    def run(module):
        with module.socket(*arguments) as sock:
            return act(sock)

    return run


def bound(sock):
    sock.bind(("127.0.0.1", 0))
    return sock


ACTS = {
    "accept: not listening": with_socket(lambda s: bound(s).accept()),
    "accept: closed": lambda module: closed(module).accept(),
    "accept: datagram": with_socket(lambda s: bound(s).accept(), socket.AF_INET, socket.SOCK_DGRAM),
    "accept: empty": with_socket(lambda s: (bound(s).listen(), s.setblocking(False), s.accept())),
    "detach: closed behind its back": closed_behind_its_back,
    "accept: timed": with_socket(lambda s: (bound(s).listen(), s.settimeout(0.01), s.accept())),
    "bind: twice": with_socket(lambda s: bound(bound(s))),
    "bind: no tuple": with_socket(lambda s: s.bind(["127.0.0.1", 0])),
    "bind: triple": with_socket(lambda s: s.bind(("127.0.0.1", 0, 0))),
    "bind: port text": with_socket(lambda s: s.bind(("127.0.0.1", "0"))),
    "bind: port 70000": with_socket(lambda s: s.bind(("127.0.0.1", 70000))),
    "bind: port 2**70": with_socket(lambda s: s.bind(("127.0.0.1", 2**70))),
    "bind: host None": with_socket(lambda s: s.bind((None, 0))),
    "bind: host NUL": with_socket(lambda s: s.bind(("a\0b", 0))),
    "bind: not ours": with_socket(lambda s: s.bind(("192.0.2.1", 0))),
    "listen: float": with_socket(lambda s: s.listen(1.5)),
    "listen: text": with_socket(lambda s: s.listen("5")),
    "listen: 2**40": with_socket(lambda s: s.listen(2**40)),
    "listen: negative": with_socket(lambda s: bound(s).listen(-1)),
    "listen: closed": lambda module: closed(module).listen(),
    "settimeout: negative": with_socket(lambda s: s.settimeout(-1)),
    "settimeout: nan": with_socket(lambda s: s.settimeout(float("nan"))),
    "settimeout: 1e30": with_socket(lambda s: s.settimeout(1e30)),
    "settimeout: text": with_socket(lambda s: s.settimeout("1")),
    "setblocking: text": with_socket(lambda s: (s.setblocking("yes"), s.gettimeout())),
    "setblocking: closed": lambda module: closed(module).setblocking(True),
    "detach: closed": lambda module: closed(module).detach(),
    "dup: closed": lambda module: closed(module).dup(),
    "socket: bad family": lambda module: module.socket(12345),
    "socket: text": lambda module: module.socket("AF_INET"),
    "socket: bad descriptor": lambda module: module.socket(fileno=99999),
    "socket: negative descriptor": lambda module: module.socket(fileno=-7),
    "socket: text descriptor": lambda module: module.socket(fileno="3"),
    "fromfd: bad": lambda module: module.fromfd(99999, socket.AF_INET, socket.SOCK_STREAM),
    "create_server: two arguments": lambda module: module.create_server(("127.0.0.1", 0), socket.AF_INET),
    "create_server: not ours": lambda module: module.create_server(("192.0.2.1", 0)),
    "create_server: port text": lambda module: module.create_server(("127.0.0.1", "0")),
    "create_server: port 70000": lambda module: module.create_server(("127.0.0.1", 70000)),
    "create_server: wrong family": lambda module: module.create_server(("::1", 0)),
    "create_server: dual stack on IPv4": lambda module: module.create_server(("", 0), dualstack_ipv6=True),
    "create_server: backlog": lambda module: module.create_server(("127.0.0.1", 0), backlog="5"),
    "attribute": with_socket(lambda s: s.no_such_attribute),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
def test_errors_are_the_originals(act):
    def run(module):
        result = act(module)
        return result if isinstance(result, int | float | type(None)) else None

    kind = same(run)[0]
    assert kind == "returned" or issubclass(kind, Exception)


@BOTH
def test_in_use(module):
    with module.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with pytest.raises(OSError, match="attempting to bind") as caught:
            module.create_server(address)
        assert str(caught.value).endswith(f"(while attempting to bind on address {address!r})")


@posix_only("a blocked accept() that shutdown() wakes; Windows wakes it by close")
@needs("Linux")
@BOTH
def test_shutdown_wakes_accept(module):
    with module.create_server(("127.0.0.1", 0)) as listener:
        raised = []

        def accept():
            try:
                listener.accept()
            except OSError as error:
                raised.append(error)

        thread = threading.Thread(target=accept)
        thread.start()
        thread.join(0.05)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT)
    assert [str(error) for error in raised] == ["[Errno 22] Invalid argument"]
