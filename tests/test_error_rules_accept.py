"""The standard library's rules, each asked of it and of fastlisten alike: accept()."""

import contextlib
import errno
import os
import socket
import threading
import time
from typing import Any

import pytest

from helpers import LIMIT, LOOPBACK, alarms, connect, needs, posix_only, reset, told, wait_until
from helpers.surfaces import INET, OURS, STANDARD, STREAM, Surface, accepted_facts, facts, same, with_server
from helpers.waiting import asleep


def test_rule_12_nothing_to_accept() -> None:
    def now(listener: Any) -> Any:
        listener.setblocking(False)
        return listener.accept()

    def later(listener: Any) -> Any:
        listener.settimeout(0.02)
        return listener.accept()

    assert same(lambda on: with_server(on, now))[0] is BlockingIOError
    outcome = same(lambda on: with_server(on, later))
    assert outcome[:4] == (TimeoutError, None, outcome[2], ("timed out",))


def many(listener: Any) -> Any:
    for connection in listener.accept_many():
        connection.close()


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_rule_12_holds_for_accept_many(timeout: float) -> None:
    def one(listener: Any) -> Any:
        listener.settimeout(timeout)
        listener.accept()

    def batch(listener: Any) -> Any:
        listener.settimeout(timeout)
        many(listener)

    assert told(with_server, OURS, batch) == told(with_server, STANDARD, one)


def spoiled(on: Surface, how: str, timeout: float | None) -> Any:
    """Return a socket that cannot accept, still to be closed; it had its timeout before."""
    kind = socket.SOCK_DGRAM if how == "datagram" else STREAM
    spoilt = on.socket(INET, kind)
    spoilt.settimeout(timeout)
    if how != "unbound":
        spoilt.bind(LOOPBACK)
    if how in ("closed", "detached"):
        spoilt.listen()
    if how == "closed":
        spoilt.close()
    if how == "detached":
        socket.close(spoilt.detach())
    return spoilt


@pytest.mark.parametrize("timeout", [None, 0, 0.02])
@pytest.mark.parametrize("how", ["unbound", "not listening", "datagram", "closed", "detached"])
def test_rule_13_what_cannot_accept(how: str, timeout: float | None) -> None:
    def accept(on: Surface) -> Any:
        with spoiled(on, how, timeout) as listener:
            try:
                return listener.accept()
            finally:
                assert (listener.fileno() == -1) == (how in ("closed", "detached"))

    outcome = same(accept)
    if os.name == "posix":
        codes = {"datagram": errno.EOPNOTSUPP, "closed": errno.EBADF, "detached": errno.EBADF}
        if timeout in (None, 0) or how in ("closed", "detached"):
            assert outcome[1] == codes.get(how, errno.EINVAL)

    def accept_many(on: Surface) -> Any:
        with spoiled(on, how, timeout) as listener:
            return many(listener)

    assert told(accept_many, OURS)[:4] == outcome[:4]


@pytest.mark.parametrize("how", ["unbound", "closed", "detached"])
@pytest.mark.parametrize("name", ["bind", "listen", "getsockname", "getpeername", "fileno"])
def test_rule_13_the_other_methods_of_such_a_socket(how: str, name: str) -> None:
    def act(on: Surface) -> Any:
        with spoiled(on, how, None) as listener:
            value = getattr(listener, name)(*[LOOPBACK] if name == "bind" else [])
            return value if name != "fileno" else value < 0

    if (how, name) == ("unbound", "listen") and os.name == "posix":
        act(OURS)  # Linux picks a port for it
        return
    same(act)


def test_rule_13_bind_twice() -> None:
    outcome = same(lambda on: with_server(on, lambda listener: listener.bind(LOOPBACK)))
    assert outcome[0] is OSError


@posix_only("no RLIMIT_NOFILE")
def test_rule_13_no_descriptor_is_left() -> None:
    import resource

    def act(on: Surface) -> Any:
        with on.create_server(LOOPBACK) as listener, connect(listener):
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                return listener.accept()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    outcome = same(act)
    assert outcome[:2] == (OSError, errno.EMFILE)


@pytest.mark.parametrize("default", [None, 0.0, 7.5])
@pytest.mark.parametrize("timeout", [None, 0.0, 5.0])
def test_rule_14_the_accepted_socket(default: float | None, timeout: float | None) -> None:
    def act(listener: Any) -> Any:
        listener.settimeout(timeout)
        socket.setdefaulttimeout(default)
        try:
            return accepted_facts(listener)
        finally:
            socket.setdefaulttimeout(None)

    outcome = same(lambda on: with_server(on, act))
    assert outcome[0] == "value", outcome
    assert outcome[1]["class"] is socket.socket
    assert outcome[1]["timeout"] == default or default is None
    assert outcome[1]["inheritable"] is False


@needs("the IPv6 loopback address")
def test_rule_14_over_ipv6() -> None:
    def act(on: Surface) -> Any:
        with on.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            return accepted_facts(listener)

    assert same(act)[1]["class"] is socket.socket


@needs("unix sockets")
@pytest.mark.parametrize("named", [False, True])
def test_rule_14_over_unix(unix_path: str, named: bool) -> None:
    def act(on: Surface) -> Any:
        with on.create_server(unix_path, family=socket.AF_UNIX) as listener:
            try:
                source = unix_path + ".client" if named else None
                with connect(listener, source=source):
                    accepted, address = listener.accept()
                    with accepted:
                        return facts(accepted), address, type(accepted)
            finally:
                for path in (unix_path, unix_path + ".client"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)

    assert same(act)[0] == "value"


@needs("Linux")
def test_rule_14_over_an_abstract_name() -> None:
    def act(on: Surface) -> Any:
        name = b"\0fastlisten-test-%d" % os.getpid()
        with on.create_server(name, family=socket.AF_UNIX) as listener, connect(listener):
            accepted, address = listener.accept()
            with accepted:
                return facts(accepted), address, listener.getsockname(), accepted.getsockname()

    assert same(act)[0] == "value"


def test_rule_14_keeps_the_protocol_number() -> None:
    """`proto` is what the listener was made with, 0 or IPPROTO_TCP."""

    def act(on: Surface) -> Any:
        with on.socket(INET, STREAM, socket.IPPROTO_TCP) as listener:
            listener.bind(LOOPBACK)
            listener.listen()
            return accepted_facts(listener)

    # Windows Python does not ask the system for it: there it is 0 on both sides.
    assert same(act)[1]["proto"] == (socket.IPPROTO_TCP if os.name == "posix" else 0)


@pytest.mark.parametrize("call", ["accept", "accept_many"])
@needs("signals between processes")
def test_rule_15_a_signal_does_not_end_the_wait(call: str) -> None:
    """The time that remains is what is waited for, however many signals come."""
    surfaces = [STANDARD, OURS] if call == "accept" else [OURS]
    for on in surfaces:
        rung: list[int] = []
        with on.create_server(LOOPBACK) as listener:
            listener.settimeout(0.3)
            with alarms(lambda *_: rung.append(1), 0.02):  # noqa: B023
                begun = time.monotonic()
                with pytest.raises(TimeoutError, match=r"^timed out$"):
                    getattr(listener, call)()
                took = time.monotonic() - begun
        assert len(rung) >= 3
        assert 0.29 < took < LIMIT


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize("call", ["accept", "accept_many"])
@needs("signals between processes")
def test_rule_15_what_the_handler_raises_comes_out(call: str, timeout: float | None) -> None:
    class RungError(Exception):
        pass

    def ring(*_: Any) -> None:
        raise RungError

    with OURS.create_server(LOOPBACK) as listener:
        listener.settimeout(timeout)
        with pytest.raises(RungError), alarms(ring, 0.05):
            getattr(listener, call)()
        # and the listener is as it was
        with connect(listener):
            listener.accept()[0].close()


@needs("signals between processes")
def test_rule_15_a_blocked_accept_goes_on_after_signals(surface: Surface) -> None:
    clients: list[socket.socket] = []
    with surface.create_server(LOOPBACK) as listener:

        def ring(*_: Any) -> None:
            rung.append(1)
            if len(rung) == 3:  # the client comes from the third interruption
                clients.append(connect(listener))

        rung: list[int] = []
        with alarms(ring, 0.02):
            accepted, address = listener.accept()
        with accepted, clients[0]:
            assert address == clients[0].getsockname()


class Accepting:
    """An accept that blocks in a thread."""

    def __init__(self, listener: Any, call: str = "accept") -> None:
        self.outcome: Any = None
        self.begun = threading.Event()
        self.listener = listener
        self.call = call
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self.begun.wait(LIMIT)
        # Sleeping in the kernel, and not for the GIL: 'S' in proc(5) twice with a gap between.
        wait_until(lambda: self.asleep() and (time.sleep(0.02), self.asleep())[1])  # type: ignore[func-returns-value]

    def asleep(self) -> bool:
        return asleep(f"self/task/{self.thread.native_id}")

    def _run(self) -> None:
        self.begun.set()
        self.outcome = told(self._accept)

    def _accept(self) -> Any:
        value = getattr(self.listener, self.call)()
        return value[0]

    def result(self) -> Any:
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()
        return self.outcome


@needs("Linux")
@pytest.mark.parametrize("timeout", [None, 10.0])
def test_rule_16_shutdown_wakes_a_blocked_accept(timeout: float | None) -> None:
    def act(listener: Any) -> Any:
        listener.settimeout(timeout)
        accepting = Accepting(listener)
        listener.shutdown(socket.SHUT_RDWR)
        return accepting.result()

    outcome = same(lambda on: with_server(on, act))
    assert outcome[1][1] == errno.EINVAL


@needs("Linux")
@pytest.mark.parametrize("timeout", [None, 10.0])
def test_rule_16_close_does_not_wake_a_blocked_accept(timeout: float | None) -> None:
    """The kernel's wait holds the socket: a client that comes later is accepted, or EBADF."""

    def act(on: Surface) -> Any:
        listener = on.create_server(LOOPBACK)
        address = listener.getsockname()
        spare = socket.socket(fileno=os.dup(listener.fileno()))  # so that it can be connected to
        # Made before the close: the closed number must stay free, as poll() looks it up again.
        with spare, socket.socket() as client:
            listener.settimeout(timeout)
            accepting = Accepting(listener)
            listener.close()
            accepting.thread.join(0.05)
            assert accepting.thread.is_alive()
            client.settimeout(LIMIT)
            client.connect(address)
            return accepting.result()

    outcome = same(act)[1]
    assert outcome == ("a socket",) if timeout is None else outcome[1] == errno.EBADF


@needs("Linux")
def test_rule_17_a_client_that_reset_while_it_was_queued() -> None:
    def act(listener: Any) -> Any:
        client = connect(listener)
        address = client.getsockname()
        reset(client)
        accepted, peer = listener.accept()
        with accepted:
            return (
                peer == address,
                told(accepted.getpeername),
                told(accepted.recv, 1),
            )

    outcome = same(lambda on: with_server(on, act))
    assert outcome[1][1][1] == errno.ENOTCONN
    assert outcome[1][2][0] is ConnectionResetError

    def light(listener: Any) -> Any:
        client = connect(listener)
        address = client.getsockname()
        reset(client)
        with listener.accept_many(1)[0] as connection:
            return (
                connection.peer == address,
                told(connection.getpeername),
                told(connection.recv, 1),
            )

    assert told(with_server, OURS, light) == outcome


RULE_18 = """
import json, socket, sys, fastlisten
make = {"standard": socket.create_server, "ours": fastlisten.create_server}[sys.argv[1]]
with make(("127.0.0.1", 0)) as listener:
    listener.settimeout(float(sys.argv[2]) if sys.argv[2] else None)
    client = socket.create_connection(listener.getsockname())
    try:
        listener.accept()
    except OSError as error:
        print(json.dumps([type(error).__name__, error.errno, list(error.args), str(error)]))
    listener.accept()[0].close()  # the fault was given once, and the client is still there
    client.close()
"""


@pytest.mark.parametrize("timeout", ["", "5"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ECONNABORTED", "ConnectionAbortedError"),
        ("EPERM", "PermissionError"),
        ("EACCES", "PermissionError"),
        ("ETIMEDOUT", "TimeoutError"),
        ("EMFILE", "OSError"),
        ("ENFILE", "OSError"),
        ("EPROTO", "OSError"),
        ("ECONNRESET", "ConnectionResetError"),
    ],
)
def test_rule_18_the_class_of_a_failed_accept(faults: Any, name: str, kind: str, timeout: str) -> None:
    outcomes = [faults.python(RULE_18, which, timeout, accept=[(name, 1)]) for which in ("standard", "ours")]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == kind
    assert outcomes[0][1] == getattr(errno, name)


@pytest.fixture(params=["standard", "ours"])
def surface(request: pytest.FixtureRequest) -> Surface:
    return {"standard": STANDARD, "ours": OURS}[request.param]
