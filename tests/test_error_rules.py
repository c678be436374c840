"""The standard library's rules, each asked of it and of fastlisten alike: creating, binding, listening.

Nothing is hard-coded: an act runs on both in the same process and the outcomes are compared by
class, errno, winerror, arguments, text and chaining, on whatever CPython runs the test.
"""

import errno
import os
import socket
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlisten
from helpers import LOOPBACK, NOBODYS, NOWHERE, needs, told
from helpers.surfaces import (
    INET,
    OURS,
    STANDARD,
    STREAM,
    Surface,
    facts,
    on_bind,
    queue_limit,
    same,
    taken,
    with_server,
)

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
