"""status=: what a process without workers answers about itself, and to whom it does not listen long."""

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastlisten
from fastlisten import Connection, Listener, bind, metrics
from fastlisten._events import Events
from fastlisten._status import server as status_server
from fastlisten._status.answers import answer
from fastlisten._status.server import StatusServer
from fastlisten._status.thread import StatusThread
from fastlisten._status.weight import Weight
from helpers import (
    LOOPBACK,
    connect,
    echo,
    exchange,
    needs,
    own_loopback,
    read_all,
    reset,
    serving,
    wait_until,
)
from helpers.command import is_one_line, serve, signals
from helpers.command import run as run_command
from helpers.programs import run
from helpers.status import Answer, agent, ask, get


@pytest.fixture
def status(listener: Listener) -> Iterator[StatusThread]:
    """Give a status port about a listener."""
    with StatusThread(bind(LOOPBACK), [listener]) as thread:
        yield thread


def of(status: StatusThread) -> Any:
    return status.endpoint.sockaddr


def state(status: StatusThread) -> tuple[int, str, str]:
    """Return what /readyz and the agent-check are told."""
    answer = get(of(status), "/readyz")
    return answer.status, answer.text, agent(of(status))


# --- what is so


def test_the_states_of_a_service(listener: Listener, status: StatusThread) -> None:
    assert state(status) == (503, "starting\n", "down\n")
    hold, go = threading.Event(), threading.Event()

    def handler(connection: Connection) -> None:
        hold.set()
        go.wait(10)

    with serving(listener, handler, threads=4) as served:
        wait_until(lambda: state(status) == (200, "serving\n", "up 100% ready\n"))
        listener.pause()
        assert state(status) == (503, "paused\n", "maint\n")
        listener.resume()
        with connect(listener):
            assert hold.wait(10)
            assert state(status) == (200, "serving\n", "up 75% ready\n")
            assert ask(of(status), b"state\n") == b"up ready\n"
            listener.stop(drain=10)
            assert state(status) == (503, "draining\n", "drain\n")
            go.set()
            served.wait()
    assert get(of(status), "/healthz").status == 200


def test_the_weight_is_what_is_free(listener: Listener, status: StatusThread) -> None:
    go = threading.Event()
    with (
        contextlib.ExitStack() as clients,
        serving(listener, lambda _: go.wait(10), threads=2, pending=8, busy="reset"),
    ):
        weights: list[str] = []
        for _ in range(10):
            clients.enter_context(connect(listener))
            wait_until(lambda: listener.stats().active == len(weights) + 1)
            weights.append(agent(of(status)))
        assert weights[:3] == ["up 90% ready\n", "up 80% ready\n", "up 70% ready\n"]
        assert weights[-1] == "up 1% ready\n"  # 0 would be a drain
        go.set()


def test_two_listeners_of_one_loop_share_a_weight(listener: Listener) -> None:
    go = threading.Event()
    with bind(LOOPBACK) as other, StatusThread(bind(LOOPBACK), [listener, other]) as status:
        loop = threading.Thread(
            target=lambda: fastlisten.serve(lambda _: go.wait(10), listener, other, threads=4)
        )
        loop.start()
        with connect(listener), connect(other):
            wait_until(lambda: listener.stats().active == other.stats().active == 1)
            assert agent(of(status)) == "up 50% ready\n"
            go.set()
        listener.stop()
        loop.join()


def test_it_is_draining_before_the_stop_when_told_so(listener: Listener, status: StatusThread) -> None:
    with serving(listener, echo, threads=1) as served:
        status.leave(0.05, listener.stop)
        assert state(status) == (503, "draining\n", "drain\n")
        served.wait()


def test_a_wait_that_is_called_off_does_not_stop(listener: Listener, status: StatusThread) -> None:
    with serving(listener, echo, threads=1):
        called: list[int] = []
        status.leave(0.01, lambda: called.append(1))
        status.stay()
        wait_until(lambda: status._at == float("inf"))
        assert not called
        assert exchange(listener, b"still here") == b"still here"


# --- HTTP


def test_metrics_are_in_the_format_that_is_asked_for(listener: Listener, status: StatusThread) -> None:
    plain = get(of(status), "/metrics")
    assert (plain.status, plain.fields["Content-Type"]) == (200, metrics.CONTENT_TYPE)
    assert plain.fields["Content-Length"] == str(len(plain.text))
    assert f'fastlisten_paused{{listener="{listener.endpoint}"}} 0\n' in plain.text
    prometheus = (
        "Accept: application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;"
        "q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
    )
    found = get(of(status), "/metrics", prometheus)
    assert found.fields["Content-Type"] == metrics.OPENMETRICS_CONTENT_TYPE
    assert found.text.endswith("# EOF\n")


@pytest.mark.parametrize(
    ("field", "openmetrics"),
    [
        ("Accept: */*", False),
        ("accept: APPLICATION/OPENMETRICS-TEXT", True),
        ("Accept: application/openmetrics-text; version=0.0.1", False),
        ("Accept: text/plain, application/openmetrics-text;q=0.9", False),
        ("Accept: application/openmetrics-text;q=0", False),
        ("Accept: application/openmetrics-text;q=x", False),
        ("X-Accept: application/openmetrics-text", False),
    ],
)
def test_the_accept_field_decides(status: StatusThread, field: str, openmetrics: bool) -> None:
    found = get(of(status), "/metrics", field).fields["Content-Type"]
    assert found == (metrics.OPENMETRICS_CONTENT_TYPE if openmetrics else metrics.CONTENT_TYPE)


@pytest.mark.parametrize(
    ("request_", "first", "holds"),
    [
        (b"GET /readyz HTTP/1.0\r\n\r\n", b"HTTP/1.1 503 ", b"starting\n"),
        (b"GET /readyz HTTP/1.0\n\n", b"HTTP/1.1 503 ", b"starting\n"),
        (b"GET http://a:1/healthz?x=y HTTP/1.1\r\nHost: a:1\r\n\r\n", b"HTTP/1.1 200 ", b"alive\n"),
        (b"HEAD /healthz HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 ", b"Content-Length: 6\r\n"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", b"HTTP/1.1 405 ", b"Allow: GET, HEAD\r\n"),
        (b"DELETE /readyz HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 ", b"only GET and HEAD\n"),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 ", b"/metrics, /healthz, /readyz\n"),
        (b"GET /metrics\r\n\r\n", b"HTTP/1.1 400 ", b""),
        (b"\x16\x03\x01\x00\xa5\r\n\r\n", b"HTTP/1.1 400 ", b""),
        (b"agent \n\r\n", b"HTTP/1.1 400 ", b""),
        (b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 2000, b"HTTP/1.1 431 ", b""),
        (b"agent\r\n", b"down\n", b""),
        (b"state\n", b"down\n", b""),
    ],
)
def test_what_a_request_is_answered(
    status: StatusThread, request_: bytes, first: bytes, holds: bytes
) -> None:
    answer = ask(of(status), request_)
    assert answer.startswith(first)
    assert holds in answer
    if request_.startswith(b"HEAD"):
        assert answer.endswith(b"\r\n\r\n")


def test_a_request_may_come_byte_by_byte(status: StatusThread) -> None:
    with connect(of(status)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /healthz HTTP/1.1\r\n\r\n":
            client.sendall(bytes([byte]))
        assert read_all(client).endswith(b"alive\n")


def test_what_follows_a_request_does_not_reset_the_answer(status: StatusThread) -> None:
    for _ in range(20):
        answer = ask(of(status), b"GET /metrics HTTP/1.1\r\n\r\n" + b"x" * 20000)
        assert answer.startswith(b"HTTP/1.1 200 ")


# --- who holds nobody


class Large:
    """A service with more metrics than a client's buffers hold."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def state(self) -> str:
        return "serving"

    def counts(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def present(self) -> float:
        return 1.0

    def free(self) -> float:
        return 1.0

    def sources(self) -> Sequence[Any]:
        return [self._listener] * 4000


@contextlib.contextmanager
def answering(service: Any) -> Iterator[StatusServer]:
    """Give a status port about any service, which a thread looks after."""
    over, events = threading.Event(), Events()
    server = StatusServer(bind(LOOPBACK), service)
    server.open(events)

    def look() -> None:
        while not over.is_set():
            events.wait(max(min(server.due() - time.monotonic(), 0.01), 0))
            server.look(time.monotonic())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield server
    finally:
        over.set()
        thread.join()
        events.close()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> float:
    """Give each client of a status port less time."""
    monkeypatch.setattr(status_server, "TIME", 0.5)
    return 0.5


def test_a_client_that_says_nothing_is_closed_and_keeps_nobody_waiting(
    status: StatusThread, hurried: float
) -> None:
    with connect(of(status)) as silent, connect(of(status)) as slow:
        slow.sendall(b"GET /hea")
        begun = time.monotonic()
        assert get(of(status), "/healthz").status == 200
        assert read_all(silent) == read_all(slow) == b""
        assert time.monotonic() - begun >= hurried / 2


def test_a_client_that_reads_nothing_is_closed_and_keeps_nobody_waiting(
    listener: Listener, hurried: float
) -> None:
    with answering(Large(listener)) as server:
        address = server.listener.getsockname()
        with connect(address, receive_buffer=4096) as deaf:
            deaf.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert deaf.recv(1) == b"H"
            assert get(address, "/healthz").status == 200
            wait_until(lambda: not server._clients)
            found = Answer(b"H" + read_all(deaf))
            assert len(found.text) < int(found.fields["Content-Length"])


def test_a_service_that_fails_to_tell_fails_nobody_else(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Large):
        def sources(self) -> Sequence[Any]:
            raise RuntimeError("no counters")

    with answering(Failing(listener)) as server:
        address = server.listener.getsockname()
        assert ask(address, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        assert get(address, "/healthz").status == 200
    assert [record.message for record in caplog.records] == ["a request for the status failed"]


def test_who_came_first_makes_way_for_one_too_many(status: StatusThread) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(of(status))) for _ in range(status_server.MOST_CLIENTS)]
        assert get(of(status), "/healthz").status == 200
        assert read_all(silent[0]) == b""


def test_clients_that_go_at_any_time_are_gone(status: StatusThread) -> None:
    for request in (b"", b"GET", b"GET /metrics HTTP/1.1\r\n\r\n", b"agent\n"):
        for _ in range(10):
            client = connect(of(status))
            client.sendall(request)
            reset(client)
    assert get(of(status), "/healthz").status == 200
    wait_until(lambda: not status._server._clients)


SHORT = """
import errno, os, resource, socket, time
import fastlisten
from fastlisten._status.thread import StatusThread
from fastlisten._status.weight import Weight

listener, port = (fastlisten.bind(("127.0.0.1", 0)) for _ in range(2))
with listener, StatusThread(port, [listener]) as status:
    client = socket.socket()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    held = []
    try:
        while True:
            held.append(os.dup(0))
    except OSError as error:
        assert error.errno == errno.EMFILE
    client.connect(status.endpoint.sockaddr)
    client.sendall(b"agent\\n")
    client.settimeout(0.3)
    before = time.process_time()
    try:
        print(client.recv(100))
    except TimeoutError:
        print("not yet", time.process_time() - before < 0.1)
    for number in held:
        os.close(number)
    client.settimeout(10)
    print(client.recv(100).decode().strip())
    client.close()
"""


@needs("Linux")
def test_without_descriptors_it_waits_for_some_and_does_not_spin() -> None:
    assert run(SHORT).stdout.splitlines() == ["not yet True", "down"]


def test_it_answers_while_python_computes(listener: Listener, status: StatusThread) -> None:
    over = threading.Event()

    def computes(_: Connection) -> None:
        while not over.is_set():
            sum(range(100))

    with serving(listener, computes, threads=1), connect(listener):
        wait_until(lambda: listener.stats().active == 1)
        assert get(of(status), "/metrics").status == 200
        over.set()


# --- serve(status=)


@needs("unix sockets")
def test_serve_answers_there_as_long_as_it_serves(unix_path: str, listener: Listener) -> None:
    def handler(connection: Connection) -> None:
        answer = ask(unix_path, b"GET /readyz HTTP/1.1\r\n\r\n")
        connection.sendall(answer)
        listener.stop()

    with connect(listener) as client:
        fastlisten.serve(handler, listener, status=f"unix:{unix_path}")
        assert read_all(client).endswith(b"serving\n")
    assert not os.path.exists(unix_path)


def test_a_status_port_in_use_is_an_error_before_anybody_is_served(listener: Listener) -> None:
    with connect(listener), bind(LOOPBACK) as taken:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            fastlisten.serve(echo, listener, status=taken.endpoint)
        assert caught.value.errno == errno.EADDRINUSE
    assert listener.stats().accepted == 0


@pytest.mark.parametrize(("value", "error"), [("nowhere", ValueError), (5, TypeError)])
def test_what_is_no_endpoint_is_refused_before_a_socket_opens(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        fastlisten.serve(echo, "127.0.0.1:0", status=value)
    with pytest.raises(error):
        fastlisten.Workers(echo, "127.0.0.1:0", workers=1, status=value)


def test_lame_duck_is_for_workers_and_with_status() -> None:
    with pytest.raises(ValueError, match="lame_duck is only meaningful with workers"):
        fastlisten.serve(echo, "127.0.0.1:0", lame_duck=1)
    with pytest.raises(ValueError, match="lame_duck is only meaningful with status"):
        fastlisten.Workers(echo, "127.0.0.1:0", workers=1, lame_duck=1)


def test_who_asks_for_no_status_pays_for_none() -> None:
    code = """
import sys, threading
import fastlisten
with fastlisten.bind(("127.0.0.1", 0)) as listener:
    listener.stop()
    fastlisten.serve(print, listener)
print(sorted({name for name in sys.modules if "_status" in name or "_events" in name or "metrics" in name}))
print(threading.active_count())
"""
    assert run(code).stdout.splitlines() == ["[]", "1"]


# --- the command


def status_of(server: Any) -> Any:
    """Return where a command that runs answers."""
    line = server.line()
    assert line.startswith("status on "), line
    return fastlisten.Endpoint.parse(line.removeprefix("status on ")).sockaddr


def refused_after_not_ready(server: Any, address: Any, stop: Callable[[], object]) -> None:
    """Stop a service while clients come: /readyz says no before the first of them is refused."""
    wait_until(lambda: get(address, "/readyz").status == 200)
    not_ready: list[float] = []

    def probe() -> None:
        with contextlib.suppress(OSError):
            while get(address, "/readyz").status == 200:
                pass
        not_ready.append(time.monotonic())

    prober = threading.Thread(target=probe)
    prober.start()
    stop()
    try:
        while server.process.poll() is None:
            with connect(server.target, 5) as client:
                client.sendall(b"x")
                client.shutdown(socket.SHUT_WR)
                assert read_all(client) == b"x"
    except (OSError, AssertionError):
        pass
    refused = time.monotonic()
    prober.join()
    assert not_ready[0] < refused


@needs("unix sockets")
@signals
@pytest.mark.parametrize("workers", [(), ("--workers", "1")], ids=["threads", "workers"])
def test_the_path_that_a_killed_service_left_is_taken(workers: Sequence[str], unix_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(unix_path)
    with serve("127.0.0.1:0", "--status", f"unix:{unix_path}", *workers) as server:
        wait_until(lambda: get(unix_path, "/readyz").status == 200)
        done = run_command("serve", "127.0.0.1:0", "--status", f"unix:{unix_path}", *workers)
        is_one_line(done, 1, "in use")
        assert server.end(signal.SIGTERM)[0] == 0
    assert not os.path.exists(unix_path)


@signals
@pytest.mark.parametrize("workers", [(), ("--workers", "2")], ids=["threads", "workers"])
def test_readyz_turns_before_the_first_client_is_refused(workers: Sequence[str]) -> None:
    with serve("127.0.0.1:0", "--status", "127.0.0.1:0", "--lame-duck", "0.2", *workers) as server:
        address = status_of(server)
        begun = time.monotonic()
        refused_after_not_ready(server, address, lambda: server.process.send_signal(signal.SIGTERM))
        assert time.monotonic() - begun >= 0.2
        output, errors = server.process.communicate(timeout=10)
        assert (server.process.returncode, errors) == (0, "")
        lines = [line for line in output.splitlines() if "SIGTERM" in line]
        assert lines[0] == "SIGTERM: not ready any more, draining in 0.2 s"
        assert lines[1] == "SIGTERM: draining for at most 5 s"


@signals
@pytest.mark.parametrize("workers", [(), ("--workers", "2")], ids=["threads", "workers"])
def test_a_second_sigterm_ends_the_wait(workers: Sequence[str]) -> None:
    with serve("127.0.0.1:0", "--status", "127.0.0.1:0", "--lame-duck", "100", "--json", *workers) as server:
        wait_until(lambda: '"status"' in (line := server.line()) and line)
        if workers:
            server.line_with('"serving"')
        server.process.send_signal(signal.SIGTERM)
        server.line_with('"leaving"')
        with connect(server.target) as client:  # it serves on
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        status, output, errors = server.end(signal.SIGTERM)
        assert (status, errors) == (0, "")
        assert any('"draining"' in line for line in output)


@pytest.mark.parametrize("workers", [(), ("--workers", "2")], ids=["threads", "workers"])
def test_the_command_tells_of_a_status_port_in_use(workers: Sequence[str]) -> None:
    if workers and not hasattr(signal, "SIGHUP"):
        pytest.skip("workers of the command are for POSIX")
    with bind((own_loopback(), 0)) as taken:
        done = run_command("serve", "127.0.0.1:0", "--status", str(taken.endpoint), *workers)
        assert "Address already in use" in done.stderr or os.name == "nt"
        is_one_line(done, 1, f"--status: cannot listen on {taken.endpoint}")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--status", "9100"], "--status: '9100' "),
        (["--lame-duck", "5"], "--lame-duck needs --status"),
        (["--lame-duck", "x", "--status", ":9100"], "'x' is not a time in seconds"),
    ],
)
def test_mistakes_are_told(arguments: list[str], text: str) -> None:
    is_one_line(run_command("serve", *arguments), 2, text)


# --- requests that nobody would write

FRAGMENTS = b"GET |HEAD |/metrics|/readyz?| HTTP/1.1|\r\n|\n|agent|state|Accept: |;q=|nan|,".split(b"|")


@given(st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=8), max_size=24).map(b"".join))
def test_any_bytes_are_answered_or_waited_for(request_: bytes) -> None:
    found = answer(request_, Idle(), Weight(Idle()))
    assert found is None or found.startswith((b"HTTP/1.1 ", b"down\n"))
    if found is not None:  # what follows changes nothing but which lines there are of a head
        assert answer(request_ + b"\r\n\r\n", Idle(), Weight(Idle())) is not None


class Idle(Large):
    """A service that has nothing to tell yet."""

    def __init__(self) -> None:
        pass

    def state(self) -> str:
        return "starting"

    def sources(self) -> Sequence[Any]:
        return []
