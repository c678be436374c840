"""A Listener beside a listening socket: what is the same on every surface."""

import contextlib
import itertools
import os
import socket
import sys
from typing import Any

import pytest

import fastlisten
from helpers import LOOPBACK, NOWHERE, connect, needs, not_under_wine, posix_only, told
from helpers.surfaces import (
    OURS,
    STANDARD,
    Surface,
    accepted_facts,
    facts,
    on_bind,
    queue_limit,
    same,
    taken,
    with_server,
)


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
