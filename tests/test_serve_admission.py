"""serve(admission=): who may come in, in every way of serving, before any of Python's code runs for him."""

import contextlib
import gc
import logging
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import fastlisten
from fastlisten import Admission, Listener, ListenerStats, Proxy, bind
from fastlisten._listener import make_loop, serve_options
from helpers import (
    CLOSED,
    LIMIT,
    LOOPBACK,
    connect,
    echo,
    exchange,
    needs,
    read_all,
    refusal,
    serving,
    wait_until,
)
from helpers.certificates import Pair, client_context, server_context
from helpers.faults import Faults
from helpers.programs import python
from helpers.proxy_headers import inet, unix, v1, v2
from helpers.serve import answer, modes

HERE = ["127.0.0.0/8", "::1"]
ELSEWHERE = ["192.0.2.0/24"]  # RFC 5737: nobody has these
LOCAL = Proxy(["127.0.0.1", "::1"], timeout=LIMIT)

Inside = Callable[..., list[socket.socket]]


@pytest.fixture
def inside() -> Iterator[Inside]:
    """Give a function that connects some clients, each of which a handler has then."""
    with contextlib.ExitStack() as clients:

        def some(listener: Listener, number: int = 1) -> list[socket.socket]:
            made = [clients.enter_context(connect(listener)) for _ in range(number)]
            for client in made:
                client.sendall(b"in")
                assert client.recv(2) == b"in"
            return made

        yield some


def balanced(stats: ListenerStats) -> bool:
    assert stats.accepted == stats.handled + stats.active + stats.refused + stats.dropped
    if stats.active:
        return False
    assert sum(stats.refused_for.values()) == stats.refused
    return True


def told(mode: dict[str, Any]) -> bytes | str:
    """Return what somebody who is refused is told."""
    busy: bytes | str = mode.get("busy", CLOSED)
    return busy


@modes
def test_who_is_denied_is_refused_and_counted(listener: Listener, mode: dict[str, Any]) -> None:
    handled: list[Any] = []
    admission = Admission(deny=HERE)
    with serving(listener, handled.append, admission=admission, **mode):
        for _ in range(3):
            assert refusal(listener) == told(mode)
        wait_until(lambda: balanced(listener.stats()) and listener.stats().refused == 3)
    assert handled == []
    assert listener.stats().refused_for == {"denied": 3}
    assert admission.stats().refused == {"denied": 3}


@modes
def test_a_source_s_connections_at_a_time(listener: Listener, inside: Inside, mode: dict[str, Any]) -> None:
    admission = Admission(concurrent=2)
    with serving(listener, echo, admission=admission, **{**mode, "threads": 4}):
        first, second = inside(listener, 2)
        assert refusal(listener) == told(mode)
        first.close()
        wait_until(lambda: admission.stats().open == 1)
        inside(listener)
        assert refusal(listener) == told(mode)
        assert listener.stats().refused_for == {"concurrent": 2}
        second.close()
        listener.stop(drain=0)
    assert balanced(listener.stats())
    assert admission.stats().open == 0


@modes
def test_a_source_s_rate(listener: Listener, mode: dict[str, Any]) -> None:
    with serving(listener, answer, admission=Admission(rate=0.001, burst=5), **mode):
        assert [answered(listener) for _ in range(8)] == [True] * 5 + [False] * 3
        wait_until(lambda: balanced(listener.stats()))
    assert listener.stats().refused_for == {"rate": 3}


def answered(target: Any, header: bytes = b"") -> bool:
    """Tell whether a client is answered, and not refused: over bytes that nobody reads a close is a reset."""
    try:
        return exchange(target, header + b"ping") == b"ping"
    except OSError:  # reset, or not connected any more
        return False


@modes
def test_a_dry_run_lets_everybody_in(listener: Listener, mode: dict[str, Any]) -> None:
    admission = Admission(rate=0.001, burst=2, dry_run=True)
    with serving(listener, answer, admission=admission, **mode):
        for _ in range(5):
            assert exchange(listener) == b"ping"
    assert listener.stats().refused == 0
    assert admission.stats()[:2] == (2, {"rate": 3})


@modes
def test_a_handler_s_penalty(listener: Listener, mode: dict[str, Any]) -> None:
    admission = Admission(concurrent=100)

    def handler(connection: Any) -> None:
        admission.penalise(connection.peer, 60)
        answer(connection)

    with serving(listener, handler, admission=admission, **mode):
        assert exchange(listener) == b"ping"
        assert refusal(listener) == told(mode)
        admission.release("127.0.0.1")
        assert exchange(listener) == b"ping"
        wait_until(lambda: balanced(listener.stats()))
    assert listener.stats().refused_for == {"penalised": 1}


@needs("Linux")
def test_each_source_for_itself(listener: Listener, inside: Inside) -> None:
    with serving(listener, echo, threads=4, admission=Admission(concurrent=1)):
        inside(listener)
        with connect(listener, source=("127.0.0.2", 0)) as other:
            other.sendall(b"other")
            assert other.recv(5) == b"other"
            assert refusal(listener) == CLOSED
        listener.stop(drain=0)


@needs("the IPv6 loopback address")
def test_ipv4_clients_of_a_listener_for_both_families() -> None:
    with bind("[::]:0", dualstack_ipv6=True) as listener:
        address = ("127.0.0.1", listener.getsockname()[1])
        with serving(listener, answer, admission=Admission(deny=["127.0.0.1"])):
            assert refusal(address) == CLOSED
            assert exchange(("::1", address[1])) == b"ping"


@needs("Linux")
def test_unix_users(unix_path: str) -> None:
    with bind(f"unix:{unix_path}") as listener:
        with serving(listener, answer, admission=Admission(allow=[f"unix:{os.getuid()}"])):
            assert exchange(unix_path) == b"ping"
        with serving(listener, answer, admission=Admission(allow=[f"unix:{os.getuid() + 1}"])):
            assert refusal(unix_path) == CLOSED
        each = Admission(concurrent=1)
        with serving(listener, echo, threads=2, admission=each), connect(unix_path) as client:
            client.sendall(b"in")
            assert client.recv(2) == b"in"
            assert refusal(unix_path) == CLOSED


@needs("Linux", "a C compiler", "calls that go to libc")
def test_a_unix_user_of_whom_the_system_does_not_tell(faults: Faults, unix_path: str) -> None:
    """He is in no list but that of all who come by a unix socket, and one source with his like."""
    program = f"""
import os, fastlisten
from helpers import exchange, refusal, serving
from helpers.faults import FASTLISTENS, change_plan, meant_for
from helpers.serve import answer
meant_for(FASTLISTENS)
with fastlisten.bind("unix:" + {unix_path!r}) as listener:
    for network, told in [(f"unix:{{os.getuid()}}", b""), ("unix:", b"ping")]:
        admission = fastlisten.Admission(allow=[network])
        with serving(listener, answer, admission=admission):
            change_plan(getsockopt=[("ENOBUFS", 1)])
            assert (exchange if told else refusal)({unix_path!r}) == told
            change_plan()
            assert exchange({unix_path!r}) == b"ping"
    assert listener.stats().refused_for == {{"not allowed": 1}}
print("true")
"""
    assert faults.python(program) is True


def test_on_several_listeners_it_is_one() -> None:
    admission = Admission(concurrent=1)
    with bind(LOOPBACK) as one, bind(LOOPBACK) as other, ThreadPoolExecutor(1) as pool:
        served = pool.submit(fastlisten.serve, echo, one, other, threads=4, admission=admission)
        try:
            with connect(one) as client:
                client.sendall(b"in")
                assert client.recv(2) == b"in"
                assert refusal(other) == CLOSED
            wait_until(lambda: admission.stats().open == 0)
            assert exchange(other) == b"ping"
        finally:
            one.stop()
        served.result(LIMIT)
        assert (one.stats().refused, other.stats().refused) == (0, 1)


# --- a connection's life


@pytest.mark.parametrize("take", ["detach", "socket"])
def test_a_connection_that_is_taken_over_counts_no_more(listener: Listener, take: str) -> None:
    kept: list[socket.socket] = []

    def handler(connection: Any) -> None:
        made = getattr(connection, take)()
        kept.append(socket.socket(fileno=made) if isinstance(made, int) else made)

    admission = Admission(concurrent=1)
    with serving(listener, handler, admission=admission):
        for number in range(3):
            with connect(listener):
                wait_until(lambda: len(kept) == number + 1 and not admission.stats().open)  # noqa: B023
    assert listener.stats().refused == 0
    for sock in kept:
        sock.close()


def test_a_handler_that_raises_frees_its_place(listener: Listener) -> None:
    admission = Admission(concurrent=1)

    def handler(connection: Any) -> None:
        raise ValueError("as planned")

    with serving(listener, handler, admission=admission, on_error=lambda *_: None):
        for _ in range(3):
            assert not answered(listener)
            wait_until(lambda: admission.stats().open == 0)
    assert listener.stats().refused == 0


def test_a_connection_may_outlive_its_admission(listener: Listener) -> None:
    kept: list[Any] = []
    with ThreadPoolExecutor(1) as pool, connect(listener):

        def take() -> None:
            def keep(connection: Any) -> None:
                kept.append(connection)
                listener.stop()

            listener.serve(keep, admission=Admission(concurrent=1))

        pool.submit(take).result(LIMIT)
    assert kept[0].peer[0] == "127.0.0.1"
    assert kept.pop().proxy is None


def circle(listener: Listener) -> Admission:
    """Return the Admission of a loop that refers to itself, and that nobody else does."""
    admission = Admission(concurrent=1)

    def pause(error: OSError, attempt: int) -> float:
        return float(attempt)

    options = serve_options(echo, admission=admission, exhausted=pause)
    pause.loop = make_loop([listener], echo, options)  # type: ignore[attr-defined]
    return admission


def test_a_loop_in_a_circle_lets_its_admission_go(listener: Listener) -> None:
    """The collector clears what is in a circle before it is freed."""
    admissions = [circle(listener) for _ in range(50)]
    gc.collect()
    for admission in admissions:
        admission.share()  # which is refused while anybody serves with it
    with serving(listener, answer, admission=admissions[0]):
        assert exchange(listener) == b"ping"


def test_who_waits_for_his_first_bytes_counts(listener: Listener) -> None:
    """Or a source could have as many silent ones as it likes."""
    admission = Admission(concurrent=2)
    with (
        serving(listener, answer, threads=2, first_bytes=LIMIT, admission=admission),
        connect(listener) as first,
        connect(listener),
    ):
        wait_until(lambda: listener.stats().waiting == 2)
        assert refusal(listener) == CLOSED
        first.sendall(b"now")
        assert read_all(first) == b"now"
        wait_until(lambda: admission.stats().open == 1)
        assert exchange(listener) == b"ping"
    assert admission.stats().open == 0


def test_who_is_silent_for_too_long_frees_his_place(listener: Listener) -> None:
    admission = Admission(concurrent=1)
    with serving(listener, answer, first_bytes=0.05, admission=admission):
        for _ in range(3):
            with connect(listener) as client:
                assert read_all(client) == b""
            wait_until(lambda: admission.stats().open == 0)
    assert listener.stats().refused_for == {"silent": 3}


def test_who_is_refused_for_want_of_a_place_counts_no_more(listener: Listener) -> None:
    admission = Admission(concurrent=100)
    release = threading.Event()

    def handler(connection: Any) -> None:
        connection.sendall(b"in")
        release.wait(LIMIT)

    with serving(listener, handler, pending=1, busy=b"full", admission=admission), connect(listener) as one:
        assert one.recv(2) == b"in"
        with connect(listener):
            wait_until(lambda: listener.stats().active == 2)
            assert refusal(listener) == b"full"
            wait_until(lambda: admission.stats().open == 2)
            release.set()
    assert listener.stats().refused_for == {"busy": 1}
    assert admission.stats().open == 0


def test_max_connections_counts_who_came_in(listener: Listener, inside: Inside) -> None:
    """Who is refused takes no place of somebody else's."""
    admission = Admission(deny=["127.0.0.2"], concurrent=10)
    with serving(listener, echo, threads=4, max_connections=2, admission=admission):
        (first,) = inside(listener)
        if os.name == "posix":
            for _ in range(5):
                with contextlib.suppress(OSError), connect(listener, source=("127.0.0.2", 0)) as denied:
                    assert read_all(denied) == b""
        inside(listener)
        with connect(listener) as third:
            third.sendall(b"third")
            first.close()
            assert third.recv(5) == b"third"
        listener.stop(drain=0)


def test_over_tls(listener: Listener, pair: Pair) -> None:
    """It is asked before the handshake, and a TLS connection counts until it is closed."""
    admission = Admission(concurrent=1)
    with (
        serving(listener, echo, threads=2, ssl=server_context(pair), admission=admission),
        connect(listener) as plain,
        client_context(pair).wrap_socket(plain, server_hostname="localhost") as client,
    ):
        client.sendall(b"in")
        assert client.recv(2) == b"in"
        with pytest.raises((ssl.SSLError, OSError)), connect(listener) as second:
            client_context(pair).wrap_socket(second, server_hostname="localhost")
        client.close()
        wait_until(lambda: admission.stats().open == 0)
    assert listener.stats().refused_for == {"concurrent": 1}


# --- behind a proxy


@modes
def test_behind_a_proxy_the_client_is_asked_about(listener: Listener, mode: dict[str, Any]) -> None:
    admission = Admission(deny=["192.0.2.9", "127.0.0.1", "::1"], rate=0.001, burst=2)
    with serving(listener, answer, proxy=LOCAL, admission=admission, **mode):
        for client, expected in [
            ("192.0.2.1", [True, True, False]),
            ("192.0.2.2", [True, True, False]),
            ("192.0.2.9", [False]),
            ("2001:db8::1", [True, True, False]),
            ("2001:db8::2", [False]),  # of the same /64
        ]:
            header = v2(inet(client), 0x21 if ":" in client else 0x11)
            assert [answered(listener, header) for _ in expected] == expected
        wait_until(lambda: balanced(listener.stats()))
    assert listener.stats().refused_for == {"denied": 1, "rate": 4}


def test_a_proxy_that_speaks_for_itself_is_not_limited(listener: Listener) -> None:
    """LOCAL, for health checks, and UNKNOWN: the specification, sections 2.1 and 2.2."""
    admission = Admission(deny=HERE, rate=0.001, burst=1)
    with serving(listener, answer, proxy=LOCAL, admission=admission):
        for header in [v2(b"", 0, 0x20)] * 3 + [b"PROXY UNKNOWN\r\n"] * 3:
            assert exchange(listener, header + b"ping") == b"ping"
        assert exchange(listener, v2(unix(), 0x31) + b"ping") == b"ping"
    assert listener.stats().refused == 0


def test_who_is_no_proxy_is_asked_about_by_his_own_address(listener: Listener) -> None:
    proxy = Proxy(ELSEWHERE, required=False)
    with serving(listener, answer, proxy=proxy, admission=Admission(rate=0.001, burst=1)):
        assert exchange(listener) == b"ping"
        assert refusal(listener) == CLOSED


def test_a_connection_by_a_proxy_counts_for_its_client(listener: Listener) -> None:
    admission = Admission(concurrent=1)
    with serving(listener, echo, threads=4, proxy=LOCAL, admission=admission), connect(listener) as first:
        first.sendall(v1() + b"in")
        assert first.recv(2) == b"in"
        assert not answered(listener, v1())
        assert exchange(listener, v2(inet("192.0.2.77")) + b"ping") == b"ping"
        first.close()
        wait_until(lambda: admission.stats().open == 0)
        assert exchange(listener, v1() + b"ping") == b"ping"


# --- what is told


def test_the_log_gets_one_line_a_minute_and_the_rest_at_the_end(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastlisten")
    with serving(listener, answer, admission=Admission(rate=0.001, burst=1)):
        exchange(listener)
        for _ in range(50):
            refusal(listener)
        wait_until(lambda: listener.stats().refused == 50)
        wait_until(lambda: caplog.records)
        assert len(caplog.messages) == 1
    first, rest = caplog.messages
    counts = [int(number) for number in re.findall(r"rate (\d+); most from 127.0.0.1 \(\1\)", first + rest)]
    assert first.startswith("refused: rate ")
    assert re.match(r"refused in \d+\.\d s: rate ", rest)
    assert sum(counts) == 50


@modes
def test_a_server_that_ends_tells_nothing_twice(
    listener: Listener, mode: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastlisten")
    admission = Admission(deny=["127.0.0.1"])
    for number in range(1, 3):
        with serving(listener, answer, admission=admission, **mode):
            refusal(listener)
            wait_until(lambda: listener.stats().refused == number)  # noqa: B023
        assert len(caplog.messages) == number
    with serving(listener, answer, admission=admission, **mode):
        pass
    assert len(caplog.messages) == 2


def test_an_admission_and_nothing_else(listener: Listener) -> None:
    with pytest.raises(TypeError, match="admission must be an Admission or None, not list"):
        listener.serve(echo, admission=["10.0.0.0/8"])  # type: ignore[arg-type]


# --- without Python


def test_nobody_s_refusal_waits_for_a_handler(listener: Listener) -> None:
    """With busy= a thread without the GIL refuses; a handler that computes holds nothing up."""
    began, over = threading.Event(), threading.Event()

    def handler(connection: Any) -> None:
        began.set()
        over.wait(LIMIT)

    admission = Admission(concurrent=1)
    with serving(listener, handler, pending=10, busy=b"no", admission=admission), connect(listener):
        assert began.wait(LIMIT)
        for _ in range(20):
            assert refusal(listener) == b"no"
        over.set()


@needs("fork")
def test_a_forked_child_frees_no_place_of_its_parent_s() -> None:
    program = """
import os, socket, threading, warnings
import fastlisten

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads
admission = fastlisten.Admission(concurrent=1)
listener = fastlisten.bind("127.0.0.1:0")

def handler(connection):
    connection.recv(1)
    if os.fork() == 0:
        connection.close()
        os._exit(0)
    os.wait()
    connection.sendall(b"%d" % admission.stats().open)

def client():
    with socket.create_connection(listener.getsockname()) as sock:
        sock.sendall(b"x")
        seen.append(int(sock.recv(9)))
    listener.stop()

seen = []
thread = threading.Thread(target=client)
thread.start()
listener.serve(handler, admission=admission)
thread.join()
listener.close()
print([*seen, admission.stats().open])
"""
    assert python(program) == [1, 0]
