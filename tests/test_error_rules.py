"""The standard library's rules, each asked of the standard library and of fastlisten alike.

Nothing is hard-coded: an act runs on both in the same process and the outcomes are compared by
class, errno, winerror, arguments, text and chaining, on whatever CPython runs the test.
"""

import contextlib
import errno
import itertools
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlisten
from helpers import (
    LIMIT,
    NOBODYS,
    NOWHERE,
    Told,
    alarms,
    connect,
    needs,
    not_under_wine,
    posix_only,
    reset,
    tells_the_queue,
    told,
    wait_until,
)

INET, STREAM = socket.AF_INET, socket.SOCK_STREAM
LOOPBACK = ("127.0.0.1", 0)


class Surface(NamedTuple):
    """The names an act uses."""

    create_server: Any
    socket: Any


STANDARD = Surface(socket.create_server, socket.socket)
OURS = Surface(fastlisten.create_server, fastlisten.Listener)
Act = Callable[[Surface], Any]


def same(act: Act) -> Told:
    """Assert that both surfaces give the same outcome, and return it."""
    expected = told(act, STANDARD)
    assert told(act, OURS) == expected
    return expected


@contextlib.contextmanager
def taken(family: int = INET, host: str = "127.0.0.1") -> Iterator[Any]:
    """Give an address that another socket listens on."""
    with socket.socket(family, STREAM) as other:
        other.bind((host, 0))
        other.listen(1)
        yield other.getsockname()[:2]


@pytest.fixture(params=["standard", "ours"])
def surface(request: pytest.FixtureRequest) -> Surface:
    return {"standard": STANDARD, "ours": OURS}[request.param]


# --- create_server: rules 1 to 7


@pytest.mark.parametrize(
    "arguments",
    [
        ((), {}),
        ((LOOPBACK, INET), {}),
        ((LOOPBACK,), {"no_such_option": 1}),
        ((LOOPBACK,), {"mode": 0o600}),
        ((), {"family": INET}),
    ],
    ids=repr,
)
def test_rule_1_one_positional_argument(arguments: Any) -> None:
    positional, named = arguments
    outcome = same(lambda on: on.create_server(*positional, **named))
    assert outcome[0] is TypeError


def test_rule_2_the_address_is_in_use() -> None:
    with taken() as address:
        outcome = same(lambda on: on.create_server(address))
    assert outcome[1] == errno.EADDRINUSE or os.name == "nt"
    assert "while attempting to bind" in outcome[4]


@needs("addresses of others that cannot be bound")
def test_rule_2_the_address_is_not_this_machines() -> None:
    outcome = same(lambda on: on.create_server((NOBODYS, 0)))
    assert outcome[0] is OSError


@needs("fork")
def test_rule_2_a_port_without_the_right_to_it() -> None:
    """A child without root's rights compares for us; a tuple of texts comes back."""
    if os.geteuid() == 0 and sys.platform != "linux":
        pytest.skip("needs Linux to give root's rights up in a child")
    floor = 1024
    if sys.platform == "linux":
        with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as setting:
            floor = int(setting.read())
    if floor < 2:
        pytest.skip("needs privileged ports: this system has none")

    def act(on: Surface) -> Any:
        return on.create_server(("127.0.0.1", 1))

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setuid(65534)
            outcomes = [told(act, each) for each in (STANDARD, OURS)]
            os.write(write, repr((outcomes[0] == outcomes[1], *outcomes)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    assert text.startswith("(True, "), text
    assert "PermissionError" in text


@needs("unix sockets")
def test_rule_2_a_unix_path_that_cannot_be(unix_path: str) -> None:
    missing = os.path.join(unix_path, "in", "nothing")
    outcome = same(lambda on: on.create_server(missing, family=socket.AF_UNIX))
    assert outcome[0] is FileNotFoundError
    with socket.socket(socket.AF_UNIX, STREAM) as other:
        other.bind(unix_path)
    outcome = same(lambda on: on.create_server(unix_path, family=socket.AF_UNIX))
    assert outcome[1] == errno.EADDRINUSE
    assert os.path.exists(unix_path)


@pytest.mark.parametrize(
    "address",
    [("::1", 0), ("no such name.invalid", 0), (NOWHERE, 0)],
    ids=repr,
)
def test_rule_3_a_name_that_does_not_resolve(address: Any) -> None:
    outcome = same(lambda on: on.create_server(address))
    assert outcome[0] is OSError
    bound = told(lambda: on_bind(STANDARD, address))
    assert bound[0] is socket.gaierror
    assert told(lambda: on_bind(OURS, address)) == bound


def on_bind(on: Surface, address: Any) -> Any:
    with on.socket(INET, STREAM) as fresh:
        fresh.bind(address)
        return fresh.getsockname()[0]


@needs("unix sockets")
def test_rule_4_an_over_long_unix_path() -> None:
    outcome = same(lambda on: on.create_server("/tmp/" + "x" * 200, family=socket.AF_UNIX))
    assert outcome[:2] == (OSError, None)


@pytest.mark.parametrize("reuse_port", [False, True])
@pytest.mark.parametrize("dualstack", [False, True])
@pytest.mark.parametrize("family", [INET, socket.AF_INET6])
@pytest.mark.parametrize("has_reuse_port", [False, True])
@pytest.mark.parametrize("has_dualstack", [False, True])
def test_rule_5_value_errors_in_order(
    monkeypatch: pytest.MonkeyPatch,
    reuse_port: bool,
    dualstack: bool,
    family: int,
    has_reuse_port: bool,
    has_dualstack: bool,
) -> None:
    if not has_reuse_port:
        monkeypatch.delattr("_socket.SO_REUSEPORT", raising=False)  # where the library looks
    if not has_dualstack:
        monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with taken() as address:  # so that every combination fails, one way or the other
        outcome = same(
            lambda on: on.create_server(
                address, family=family, reuse_port=reuse_port, dualstack_ipv6=dualstack
            )
        )
    if reuse_port and not has_reuse_port:
        assert outcome[4] == "SO_REUSEPORT not supported on this platform"


@pytest.mark.parametrize("address", [("127.0.0.1", "x"), ("127.0.0.1", 2**70), [], None, 5])
def test_rule_6_what_is_not_an_oserror_is_not_caught(address: Any, recwarn: pytest.WarningsRecorder) -> None:
    """TypeError and OverflowError pass; whether the socket is left to the collector as there."""
    leaked = []
    for on in (STANDARD, OURS):
        recwarn.clear()
        with pytest.raises((TypeError, OverflowError)):
            on.create_server(address)
        leaked.append([w.category for w in recwarn.list])
    # Ours may close it at once, which is better; it must not leave more behind.
    assert len(leaked[1]) <= len(leaked[0])


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("address", [("127.0.0.1", "x"), ("127.0.0.1", 2**70), [], None, 5])
def test_rule_6_is_told_in_the_same_words(address: Any) -> None:
    same(lambda on: on.create_server(address))


def option(on_socket: socket.socket, name: str, level: int = socket.SOL_SOCKET) -> Any:
    number = getattr(socket, name, None)
    return None if number is None else on_socket.getsockopt(level, number)


def facts(listener: socket.socket) -> dict[str, Any]:
    """Read back what can be read of a listener."""
    found = {
        "family": listener.family,
        "type": listener.type,
        "proto": listener.proto,
        "timeout": listener.gettimeout(),
        "blocking": listener.getblocking(),
        "inheritable": listener.get_inheritable(),
        "SO_REUSEADDR": option(listener, "SO_REUSEADDR"),
        "SO_REUSEPORT": option(listener, "SO_REUSEPORT"),
        "SO_KEEPALIVE": option(listener, "SO_KEEPALIVE"),
        "SO_ACCEPTCONN": option(listener, "SO_ACCEPTCONN"),
    }
    if listener.family in (INET, socket.AF_INET6):
        found["TCP_NODELAY"] = option(listener, "TCP_NODELAY", socket.IPPROTO_TCP)
        found["queue"] = queue_limit(listener)
        found["host"] = listener.getsockname()[0]
    if listener.family == socket.AF_INET6:
        found["V6ONLY"] = listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    if os.name == "posix":
        import fcntl

        found["flags"] = fcntl.fcntl(listener, fcntl.F_GETFL)
        found["close on exec"] = fcntl.fcntl(listener, fcntl.F_GETFD)
    return found


def queue_limit(listener: socket.socket) -> int | None:
    """Return the backlog that Linux has set: tcpi_sacked of a listener, see tcp(7)."""
    if not tells_the_queue():
        return None
    # struct tcp_info begins with eight bytes; then rto, ato, snd_mss, rcv_mss, unacked, sacked.
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    return int(struct.unpack_from("=8x6I", info)[5])


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"backlog": None},
        {"backlog": 0},
        {"backlog": -3},
        {"backlog": 7},
        {"backlog": 1 << 20},
        {"backlog": True},
        {"family": INET},
        {"reuse_port": hasattr(socket, "SO_REUSEPORT")},
    ],
    ids=repr,
)
def test_rule_7_defaults(named: dict[str, Any]) -> None:
    def act(on: Surface) -> Any:
        with on.create_server(LOOPBACK, **named) as listener:
            return facts(listener)

    assert same(act)[0] == "value"


@needs("the IPv6 loopback address")
@pytest.mark.parametrize("dualstack", [False, True])
def test_rule_7_defaults_of_ipv6(dualstack: bool) -> None:
    def act(on: Surface) -> Any:
        with on.create_server(
            ("::" if dualstack else "::1", 0), family=socket.AF_INET6, dualstack_ipv6=dualstack
        ) as listener:
            return facts(listener)

    assert same(act)[1]["V6ONLY"] == (not dualstack)


@needs("unix sockets")
def test_rule_7_defaults_of_unix(unix_path: str) -> None:
    def act(on: Surface) -> Any:
        with on.create_server(unix_path, family=socket.AF_UNIX) as listener:
            found = facts(listener), listener.getsockname(), os.stat(unix_path).st_mode
        left = os.path.exists(unix_path)
        if left:
            os.unlink(unix_path)
        return *found, left

    assert same(act)[1][-1] is True  # create_server leaves the path, bind() does not


@pytest.mark.parametrize("default", [None, 0.0, 7.5])
def test_rule_7_a_default_timeout_is_the_listeners_too(default: float | None) -> None:
    socket.setdefaulttimeout(default)
    try:
        outcome = same(lambda on: with_server(on, lambda listener: listener.gettimeout()))
    finally:
        socket.setdefaulttimeout(None)
    assert outcome == ("value", default)


def with_server(on: Surface, act: Callable[[socket.socket], Any], **named: Any) -> Any:
    with on.create_server(LOOPBACK, **named) as listener:
        return act(listener)


# Pairs of faults show the order of the checks.
HOSTS = st.sampled_from(
    [
        *["127.0.0.1", "", "0.0.0.0", "192.0.2.1", "::1", None, b"127.0.0.1"],
        *[bytearray(b"127.0.0.1"), "a\0b", 5, "<broadcast>", "255.255.255.255"],
    ]
)
PORTS = st.sampled_from([0, "80", 70000, -1, 2**70, 1.5, None, True])
ADDRESSES = st.one_of(
    st.tuples(HOSTS, PORTS),
    st.tuples(HOSTS),
    st.tuples(HOSTS, PORTS, PORTS),
    st.lists(st.just(0), max_size=2),
    st.sampled_from([None, "", "x" * 300, 7]),
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "family": st.sampled_from([INET, socket.AF_INET6, 2, 999, "x", None]),
        "backlog": st.sampled_from([None, 0, -1, 5, "5", 1.5, 2**40, []]),
        "reuse_port": st.sampled_from([False, True, 0, "yes"]),
        "dualstack_ipv6": st.sampled_from([False, True]),
        "no_such": st.just(1),
    },
)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@settings(max_examples=400)
@given(ADDRESSES, OPTIONS)
def test_the_order_of_checks_in_create_server(address: Any, named: dict[str, Any]) -> None:
    def act(on: Surface) -> Any:
        with on.create_server(address, **named) as listener:
            found = facts(listener)
        if listener.family == getattr(socket, "AF_UNIX", None):
            raise AssertionError("no example names a path that can be bound")
        return found

    same(act)


# --- arguments: rules 8 to 11


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@settings(max_examples=300)
@given(ADDRESSES)
def test_rules_8_and_9_the_order_of_checks_in_bind(address: Any) -> None:
    same(lambda on: on_bind(on, address))


@pytest.mark.parametrize(
    ("address", "kind", "text"),
    [
        (("127.0.0.1", "80"), TypeError, "'str' object cannot be interpreted as an integer"),
        (("127.0.0.1", 65536), OverflowError, "bind(): port must be 0-65535."),
        (("127.0.0.1", -1), OverflowError, "bind(): port must be 0-65535."),
        (("127.0.0.1", 2**70), OverflowError, ""),
        (["127.0.0.1", 80], TypeError, "bind(): AF_INET address must be tuple, not list"),
        (("127.0.0.1",), TypeError, "AF_INET address must be a pair (host, port)"),
        ((None, 80), TypeError, "str, bytes or bytearray expected, not NoneType"),
        (("a\0b", 80), Exception, "null character"),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_rules_8_and_9_in_all_three_surfaces(address: Any, kind: Any, text: str) -> None:
    outcome = same(lambda on: on_bind(on, address))
    assert issubclass(outcome[0], kind)
    assert text in outcome[4]
    same(lambda on: on.create_server(address))
    if isinstance(address, tuple):  # bind() takes an Endpoint, text or the library's addresses
        ours = told(fastlisten.bind, address)
        assert ours[0] is outcome[0]


@pytest.mark.parametrize(
    "host",
    [b"127.0.0.1", bytearray(b"127.0.0.1"), "", "<broadcast>", "localhost", "127.0.0.1", "127.1"],
)
def test_rule_9_hosts_that_are_accepted(host: Any) -> None:
    outcome = same(lambda on: on_bind(on, (host, 0)))
    assert outcome[0] == "value" or host == "<broadcast>"
    ours = told(lambda: bound_host((host, 0)))
    assert ours[:2] == outcome[:2]


def bound_host(address: Any) -> Any:
    with fastlisten.bind(address) as listener:
        return listener.getsockname()[0]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # the library's, on a TypeError
@pytest.mark.parametrize("backlog", [0, -1, -(2**20), 1, 5, 100, True, 1.5, "5", None, 2**40, ()])
def test_rule_10_backlog(backlog: Any) -> None:
    def act(on: Surface) -> Any:
        with on.socket(INET, STREAM) as fresh:
            fresh.bind(LOOPBACK)
            fresh.listen(backlog)
            return queue_limit(fresh)

    same(act)
    with_backlog = same(lambda on: with_server(on, queue_limit, backlog=backlog))
    if backlog is None:
        return
    ours = told(bound_queue, backlog)
    assert ours[0] is with_backlog[0] or ours == with_backlog


@pytest.mark.parametrize("backlog", [1.5, "5", 2**40, ()])
def test_a_bind_that_fails_leaves_no_socket(backlog: Any) -> None:
    """Not even to the collector, whose warning would be an error here."""
    assert issubclass(told(bound_queue, backlog)[0], (TypeError, OverflowError))


def bound_queue(backlog: Any) -> int | None:
    with fastlisten.bind(LOOPBACK, backlog=backlog) as listener:
        return queue_limit(listener)


@pytest.mark.parametrize("arguments", [(), (1, 2)])
def test_rule_10_listen_takes_at_most_one(arguments: Any) -> None:
    def act(on: Surface) -> Any:
        with on.socket(INET, STREAM) as fresh:
            fresh.bind(LOOPBACK)
            fresh.listen(*arguments)
            return queue_limit(fresh)

    same(act)


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), 1e30, "1", None, 0, 0.5, True, []])
def test_rule_11_settimeout(timeout: Any) -> None:
    def act(listener: Any) -> Any:
        listener.settimeout(timeout)
        return listener.gettimeout(), listener.getblocking()

    same(lambda on: with_server(on, act))


# --- accept: rules 12 to 18


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


def spoiled(on: Surface, how: str) -> Any:
    """Return a socket that cannot accept, still to be closed."""
    kind = socket.SOCK_DGRAM if how == "datagram" else STREAM
    spoilt = on.socket(INET, kind)
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
        with spoiled(on, how) as listener:
            if listener.fileno() != -1:
                listener.settimeout(timeout)
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
        with spoiled(on, how) as listener:
            if listener.fileno() != -1:
                listener.settimeout(timeout)
            return many(listener)

    assert told(accept_many, OURS)[:4] == outcome[:4]


@pytest.mark.parametrize("how", ["unbound", "closed", "detached"])
@pytest.mark.parametrize("name", ["bind", "listen", "getsockname", "getpeername", "fileno"])
def test_rule_13_the_other_methods_of_such_a_socket(how: str, name: str) -> None:
    def act(on: Surface) -> Any:
        with spoiled(on, how) as listener:
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


def accepted_facts(listener: Any) -> dict[str, Any]:
    with connect(listener) as client:
        wait_until_queued(listener)
        accepted, address = listener.accept()
        with accepted:
            found = facts(accepted)
            found["class"] = type(accepted)
            found["address"] = type(address), address == client.getsockname()
            found["peer"] = accepted.getpeername() == address
            return found


def wait_until_queued(listener: Any) -> None:
    import select

    assert select.select([listener], [], [], LIMIT)[0]


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
        with open(f"/proc/self/task/{self.thread.native_id}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "S"

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


# --- other surfaces, and the kernel's rules as far as the core has a hand in them


def test_a_name_that_does_not_resolve_is_a_gaierror_for_bind() -> None:
    expected = told(lambda: on_bind(STANDARD, (NOWHERE, 0)))
    assert expected[0] is socket.gaierror
    ours = told(fastlisten.bind, (NOWHERE, 0))
    assert ours[:2] == expected[:2]


def test_the_class_and_errno_of_bind_in_use() -> None:
    with taken() as address:
        expected = told(socket.create_server, address)
        ours = told(fastlisten.bind, address)
        assert ours[:2] == expected[:2]
        assert told(fastlisten.bind, fastlisten.Endpoint(*address))[:2] == expected[:2]
        assert told(fastlisten.bind, f"{address[0]}:{address[1]}")[:2] == expected[:2]


@needs("SO_REUSEPORT")
def test_reuse_port_with_port_0_is_for_create_server_only() -> None:
    """With port 0 it can share a stranger's port, so bind() refuses."""
    with pytest.raises(ValueError, match="port"):
        fastlisten.bind(LOOPBACK, reuse_port=True)
    assert same(lambda on: with_server(on, lambda _: 1, reuse_port=True)) == ("value", 1)


@needs("Linux")
@pytest.mark.parametrize("backlog", [0, 1, 5, 100])
def test_the_queue_holds_one_more_than_the_backlog(backlog: int) -> None:
    def act(listener: Any) -> int:
        with contextlib.ExitStack() as clients:
            for _ in range(backlog + 1):
                clients.enter_context(connect(listener, 5))
            late = clients.enter_context(socket.socket())
            late.setblocking(False)
            late.connect_ex(listener.getsockname())
            # The kernel drops the last handshake step: the server's queue does not grow.
            listener.settimeout(0.0)
            for taken_count in itertools.count():
                try:
                    listener.accept()[0].close()
                except BlockingIOError:
                    return taken_count
        raise AssertionError("not reached")

    outcome = same(lambda on: with_server(on, act, backlog=backlog))
    assert outcome == ("value", backlog + 1)


@needs("TCP_INFO of a listener")
def test_a_second_listen_changes_the_backlog() -> None:
    def act(listener: Any) -> Any:
        first = queue_limit(listener)
        listener.listen(9)
        return first, queue_limit(listener)

    assert same(lambda on: with_server(on, act, backlog=3)) == ("value", (3, 9))


AUDITED: list[tuple[str, Any]] = []


def _audit(event: str, arguments: Any) -> None:
    if AUDITED and event.startswith("socket."):
        # The socket itself differs, its class too; what is bound is the same.
        AUDITED.append((event, arguments[1:] if arguments else ()))


@pytest.fixture(scope="session")
def _audit_hook() -> None:
    sys.addaudithook(_audit)  # for good: there is no way to take one out


@pytest.mark.usefixtures("_audit_hook")
def test_audit_events_are_raised_as_usual() -> None:
    def act(on: Surface) -> Any:
        AUDITED.append(("begin", ()))
        try:
            with on.create_server(LOOPBACK) as listener, socket.socket() as client:
                client.connect_ex(listener.getsockname())
                listener.accept()[0].close()
            # How many socket objects it takes is no business of an auditor's.
            return [entry for entry in AUDITED if entry[0] not in ("socket.connect", "socket.__new__")]
        finally:
            AUDITED.clear()

    outcome = same(act)
    assert ("socket.bind", (LOOPBACK,)) in outcome[1]


def test_a_listener_is_a_socket_everywhere() -> None:
    with fastlisten.bind(LOOPBACK) as listener:
        assert isinstance(listener, socket.socket)
        same(lambda on: with_server(on, lambda it: repr(it).split("fd=")[1].split(",")[1:4]))
    assert listener.fileno() == -1


def test_an_unclosed_listener_warns_as_a_socket_does() -> None:
    def act(on: Surface) -> None:
        listener = on.create_server(LOOPBACK)
        del listener

    for on in (STANDARD, OURS):
        with pytest.warns(ResourceWarning, match="unclosed"):
            act(on)


@not_under_wine("Wine has no share of sockets between processes")
@posix_only("dup of a socket by number")
def test_dup_and_adoption_by_number() -> None:
    def act(on: Surface) -> Any:
        with on.create_server(LOOPBACK) as listener:
            copy = listener.dup()
            adopted = on.socket(fileno=os.dup(listener.fileno()))
            with copy, adopted:
                found = facts(adopted), facts(copy), type(copy) is type(listener)
                return *found, accepted_facts(adopted), accepted_facts(copy)

    assert same(act)[0] == "value"


@pytest.mark.parametrize("fileno", [-1, 1 << 20, "1", 1.5], ids=repr)
def test_adoption_of_what_is_no_socket(fileno: Any) -> None:
    same(lambda on: on.socket(fileno=fileno))
