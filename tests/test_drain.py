"""The end of serving: what a drain finishes, what it cuts, and restarts that nobody notices."""

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import pytest

import fastlisten
from helpers import (
    LIMIT,
    LOOPBACK,
    Serving,
    connect,
    echo,
    exchange,
    needs,
    nobody_listens,
    read_all,
    serving,
    told,
    wait_until,
)
from helpers.programs import check, interpreter, line_of, plain_environment, python, running
from helpers.server_process import server

MODES: dict[str, dict[str, Any]] = {
    "inline": {},
    "threads": {"threads": 2},
    "growing threads": {"threads": (1, 3)},
    "busy": {"busy": "reset", "pending": 100},
    "busy threads": {"busy": b"full", "pending": 100, "threads": 2},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def queued(stack: contextlib.ExitStack, listener: Any, count: int) -> list[socket.socket]:
    """Connect clients that have each sent their number, and wait until the kernel has them."""
    clients = [stack.enter_context(connect(listener)) for _ in range(count)]
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    return clients


def outcome(client: socket.socket) -> bytes | str:
    """Return what a client got in the end: an answer, b"" or "reset"."""
    try:
        return read_all(client)
    except ConnectionResetError:
        return "reset"


@modes
def test_a_drain_first_takes_what_the_kernel_has_queued(mode: Any) -> None:
    with (
        fastlisten.bind(LOOPBACK, backlog=100) as listener,
        contextlib.ExitStack() as stack,
    ):
        listener.pause()
        clients = queued(stack, listener, 64)

        def handler(connection: Any) -> None:
            connection.sendall(connection.recv(10))

        with serving(listener, handler, **mode) as served:
            listener.stop(drain=LIMIT)
            result = served.wait()
        assert [outcome(client) for client in clients] == [b"%d" % n for n in range(64)]
        assert result.cut == 0
        # With `stop` before the loop was there, all were served after it.
        assert result.finished == 64


@modes
def test_a_drain_takes_nobody_who_comes_after_the_stop(mode: Any) -> None:
    """The queue as it was at the stop is what is owed an answer; the drain comes to an end."""
    inside, go_on = threading.Event(), threading.Event()

    def handler(connection: Any) -> None:
        inside.set()
        assert go_on.wait(LIMIT)
        connection.sendall(connection.recv(10))

    with (
        fastlisten.bind(LOOPBACK, backlog=100) as listener,
        contextlib.ExitStack() as stack,
    ):
        over = threading.Event()

        def keep_coming() -> None:
            with contextlib.suppress(OSError):  # refused, reset, in vain
                while not over.is_set():
                    with connect(listener.getsockname(), 1) as client:
                        client.sendall(b"late")
                        client.shutdown(socket.SHUT_WR)
                        read_all(client)

        with serving(listener, handler, **mode) as served:
            (first,) = queued(stack, listener, 1)
            assert inside.wait(LIMIT)
            listener.stop(drain=60)
            coming = threading.Thread(target=keep_coming)
            coming.start()
            go_on.set()
            served.wait()
            assert outcome(first) == b"0"
        over.set()
        listener.close()
        coming.join(LIMIT)


@needs("unix sockets")
@modes
def test_who_comes_while_others_have_yet_to_speak_is_refused(mode: Any, unix_path: str) -> None:
    with fastlisten.bind(LOOPBACK) as listener:
        served = Serving(
            lambda: fastlisten.serve(echo, listener, f"unix:{unix_path}", first_bytes=LIMIT, **mode)
        )
        with connect(listener) as client, contextlib.ExitStack() as stack:
            wait_until(lambda: listener.stats().waiting)
            listener.pause()
            (other,) = queued(stack, listener, 1)  # is taken first
            other.shutdown(socket.SHUT_WR)
            listener.stop(drain=60)
            assert outcome(other) == b"0"
            wait_until(lambda: not os.path.exists(unix_path))
            client.sendall(b"at last")
            assert client.recv(100) == b"at last"
        assert served.wait() == (2, 0)


@needs("unix sockets")
@pytest.mark.parametrize("mode", [{"threads": 1}, {"threads": 2}, MODES["busy threads"]], ids=str)
@pytest.mark.parametrize("drain", [60, None])
def test_who_comes_while_handlers_end_is_refused(mode: Any, drain: float | None, unix_path: str) -> None:
    """He is not kept waiting for a reset at the end, by a socket that serve() has made and nobody hears."""
    inside, go_on = threading.Event(), threading.Event()

    def handler(connection: Any) -> None:
        inside.set()
        assert go_on.wait(LIMIT)
        connection.sendall(connection.recv(10))

    with fastlisten.bind(LOOPBACK) as listener:
        served = Serving(lambda: fastlisten.serve(handler, listener, f"unix:{unix_path}", **mode))
        with connect(listener) as client:
            client.sendall(b"first")
            assert inside.wait(LIMIT)
            listener.stop(drain)
            wait_until(lambda: not os.path.exists(unix_path))  # to connect would be to be queued
            assert not nobody_listens(listener), "the caller's is the caller's to close"
            assert served.thread.is_alive()
            go_on.set()
            assert read_all(client) == b"first"
        assert served.wait() == (1, 0)


@modes
def test_stop_without_a_drain_leaves_the_queue_to_the_next_serve(mode: Any) -> None:
    """Who was accepted is handled; who was not is still the kernel's, and loses nothing."""
    seen: list[bytes] = []
    turns = itertools.count(1)  # len(seen) could go from 9 to 11 before either handler looks

    def handler(connection: Any) -> None:
        data = connection.recv(10)
        seen.append(data)
        connection.sendall(data)
        if next(turns) == 10:
            listener.stop()

    with (
        fastlisten.bind(LOOPBACK, backlog=100) as listener,
        contextlib.ExitStack() as stack,
    ):
        listener.pause()
        clients = queued(stack, listener, 64)
        listener.resume()
        with serving(listener, handler, **mode) as served:
            result = served.wait()
        first = listener.stats()
        assert first.accepted == first.handled == len(seen)
        assert result.cut == 0
        assert 1 <= result.finished <= len(seen)
        if "busy" not in mode:
            assert len(seen) < 30  # the loop does not hoard
        with serving(listener, handler, **mode):
            assert [outcome(client) for client in clients] == [b"%d" % n for n in range(64)]


@modes
def test_what_takes_longer_than_the_drain_is_cut(mode: Any) -> None:
    """A handler in recv comes back with the end of the stream, and its client is told."""
    inside: list[Any] = []
    received: list[bytes] = []

    def handler(connection: Any) -> None:
        inside.append(connection)
        received.append(connection.recv(10))

    with (
        fastlisten.bind(LOOPBACK) as listener,
        connect(listener) as client,
        serving(listener, handler, **mode) as served,
    ):
        wait_until(lambda: inside)
        begun = time.monotonic()
        listener.stop(drain=0.2)
        assert served.wait() == (0, 1)
        assert time.monotonic() - begun > 0.19
        assert received == [b""]
        assert outcome(client) == b""


@modes
def test_a_drain_of_0_cuts_at_once_and_takes_nobody(mode: Any) -> None:
    inside = threading.Event()

    def handler(connection: Any) -> None:
        inside.set()
        connection.recv(10)

    with (
        fastlisten.bind(LOOPBACK, backlog=100) as listener,
        contextlib.ExitStack() as stack,
        serving(listener, handler, **mode) as served,
    ):
        client = stack.enter_context(connect(listener))
        assert inside.wait(LIMIT)
        listener.pause()
        late = [stack.enter_context(connect(listener)) for _ in range(5)]
        accepted = listener.stats().accepted
        listener.stop(drain=0)
        result = served.wait()  # its handler would wait for ever
        assert result.finished == 0
        assert result.cut >= 1
        assert listener.stats().accepted == accepted
        assert outcome(client) == b""
        listener.close()
        # Who was queued is reset by the kernel.
        assert {outcome(each) for each in late} <= {"reset", b""}


@pytest.mark.parametrize("threads", [1, 3, (1, 4)], ids=str)
def test_a_drain_counts_who_finished_and_who_was_cut(threads: Any) -> None:
    most = threads[1] if isinstance(threads, tuple) else threads

    def handler(connection: Any) -> None:
        connection.sendall(connection.recv(10))  # the greeting
        connection.sendall(connection.recv(10))  # what it waits for

    with (
        fastlisten.bind(LOOPBACK) as listener,
        contextlib.ExitStack() as stack,
        serving(listener, handler, threads=threads) as served,
    ):
        clients = queued(stack, listener, most)
        for client in clients:
            assert client.recv(10)
        listener.stop(drain=0.3)
        clients[0].sendall(b"done")
        assert outcome(clients[0]) == b"done"
        assert served.wait() == (1, most - 1)
        assert [outcome(client) for client in clients[1:]] == [b""] * (most - 1)


@modes
def test_a_shorter_drain_shortens_a_longer_one(mode: Any) -> None:
    inside = threading.Event()

    def handler(connection: Any) -> None:
        inside.set()
        connection.recv(10)

    with (
        fastlisten.bind(LOOPBACK) as listener,
        connect(listener),
        serving(listener, handler, **mode) as served,
    ):
        assert inside.wait(LIMIT)
        begun = time.monotonic()
        listener.stop()
        listener.stop(drain=60)
        listener.stop(drain=0.1)
        listener.stop(drain=30)  # longer than served.wait() waits
        assert served.wait().cut == 1
        assert time.monotonic() - begun > 0.09


@modes
def test_close_is_a_drain_of_0(mode: Any) -> None:
    inside = threading.Event()

    def handler(connection: Any) -> None:
        inside.set()
        connection.recv(10)

    listener = fastlisten.bind(LOOPBACK)
    with connect(listener) as client, serving(listener, handler, **mode) as served:
        assert inside.wait(LIMIT)
        listener.close()
        assert listener.fileno() == -1
        assert served.wait() == (0, 1)
        assert outcome(client) == b""


@pytest.mark.parametrize("threads", [0, 2])
def test_a_handler_that_will_not_end_does_not_hold_a_cut_for_ever(
    threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Inline it must: it is the thread of serve(). Threads are left to end by themselves."""
    inside, let_go, ended = threading.Event(), threading.Event(), threading.Event()

    def handler(_: Any) -> None:
        inside.set()
        assert let_go.wait(LIMIT)
        ended.set()

    with (
        fastlisten.bind(LOOPBACK) as listener,
        connect(listener) as client,
        serving(listener, handler, threads=threads) as served,
    ):
        assert inside.wait(LIMIT)
        listener.stop(drain=0)
        assert client.recv(1) == b""  # its client is let go, whatever the handler does
        if threads:
            assert served.wait() == (0, 1)
            assert "go on without their connections" in caplog.text
        let_go.set()
        assert ended.wait(LIMIT)
        assert served.wait() == (0, 1)


@modes
def test_a_drain_ends_a_pause(mode: Any) -> None:
    with (
        fastlisten.bind(LOOPBACK) as listener,
        contextlib.ExitStack() as stack,
        serving(listener, echo, **mode) as served,
    ):
        exchange(listener)
        listener.pause()
        clients = queued(stack, listener, 5)
        for client in clients:
            client.shutdown(socket.SHUT_WR)
        listener.stop(drain=LIMIT)
        assert [outcome(client) for client in clients] == [b"%d" % n for n in range(5)]
        assert served.wait().cut == 0
        listener.resume()


# --- restarts under load

CLIENT = """
import socket, sys, threading
port, total, workers = map(int, sys.argv[1:])
failed, done = [], [0] * workers
lock = threading.Lock()

def work(me):
    for number in range(total // workers):
        try:
            with socket.create_connection(("127.0.0.1", port), 20) as client:
                client.sendall(b"%d" % number)
                client.shutdown(socket.SHUT_WR)
                parts = []
                while part := client.recv(100):
                    parts.append(part)
                if b"".join(parts) != b"%d" % number:
                    failed.append(f"client {number} got {parts}")
        except OSError as error:
            failed.append(repr(error))
        done[me] += 1
        if done[me] % 100 == 0:
            with lock:
                print(sum(done), flush=True)

threads = [threading.Thread(target=work, args=(me,)) for me in range(workers)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("failed", len(failed), failed[:5], flush=True)
"""


@needs("Linux")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", ["inline", "growing threads"])
def test_restarts_under_load_lose_nobody(mode: str) -> None:
    """8,000 clients while the server is drained and started again ten times, on one listener."""
    total = 8_000
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(socket.create_server(LOOPBACK, backlog=1000))
        clients = stack.enter_context(
            running(CLIENT, str(kept.getsockname()[1]), str(total), "8"),
        )
        assert clients.stdout is not None
        finished = cut = restarts = 0
        done = 0
        while restarts < 10:
            with server(fd=kept.fileno(), pass_fds=(kept.fileno(),), **MODES[mode]) as process:
                goal = (restarts + 1) * total // 11
                while done < goal:
                    done = int(clients.stdout.readline())
                process.process.send_signal(signal.SIGTERM)  # stop(drain=10)
                _, result = process.ask("wait")
                finished, cut = finished + result[0], cut + result[1]
            restarts += 1
        with server(fd=kept.fileno(), pass_fds=(kept.fileno(),), **MODES[mode]):
            last = [line for line in clients.stdout if line.startswith("failed")]
    assert last == ["failed 0 []\n"]
    assert done < total  # the last restart was under load
    assert cut == 0


# --- the end of the interpreter, and fork

EXIT = """
import ast, sys, threading, fastlisten
from helpers import connect, echo, exchange
listener = fastlisten.bind(("127.0.0.1", 0))
options = ast.literal_eval(sys.argv[1])
threading.Thread(target=lambda: listener.serve(echo, **options), daemon=True).start()
exchange(listener)
if sys.argv[2] == "held":
    client = connect(listener)
    client.sendall(b"x")
    client.recv(1)
    sys.stderr = None  # its ResourceWarnings are not what is looked for
print("{}", flush=True)
"""


@pytest.mark.parametrize("held", ["idle", "held"])
@modes
def test_the_interpreter_ends_while_a_daemon_thread_serves(mode: Any, held: str) -> None:
    with running(EXIT, repr(mode), held, options=["-W", "ignore::ResourceWarning"]) as process:
        line = line_of(process)  # its last statement; the start of a Python is not looked at
        begun = time.monotonic()
        _, errors = process.communicate(timeout=30)
        elapsed = time.monotonic() - begun
    assert (line, process.returncode, errors) == ("{}", 0, "")
    assert elapsed < LIMIT


FORK = """
import ast, json, os, signal, sys, time, warnings, fastlisten
from helpers import echo, exchange, serving
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads, which is the point
options, act = ast.literal_eval(sys.argv[1]), sys.argv[2]
with fastlisten.bind(("127.0.0.1", 0)) as listener, serving(listener, echo, **options) as served:
    exchange(listener)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if act == "close":
                listener.close()
            elif act == "stop":
                listener.stop()
                listener.close()
            elif act == "pause":
                listener.pause()
                listener.close()
            else:
                # Both accept now; the child serves until it has had a client of its own.
                def once(connection):
                    echo(connection)
                    listener.stop()
                listener.serve(once, **options)
                listener.close()
            status = 0
        finally:
            os._exit(status)
    answers = []
    done, status = os.waitpid(child, os.WNOHANG if act == "serve" else 0)
    deadline = time.monotonic() + 20
    while not done and time.monotonic() < deadline:
        answers.append(exchange(listener).decode())
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:  # or it would outlive us
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    answers += [exchange(listener).decode() for _ in range(20)]
    alive = served.thread.is_alive()
    paused = listener.stats().paused
print(json.dumps([status, sorted(set(answers)), alive, paused]))
"""


@needs("fork")
@pytest.mark.parametrize("act", ["close", "stop", "pause", "serve"])
@modes
def test_what_a_forked_child_does_with_the_listener_is_its_own_matter(mode: Any, act: str) -> None:
    if act == "serve" and "busy" in mode:
        mode = {**mode, "pending": 1}
    found = python(FORK, repr(mode), act)
    assert found == [0, ["ping"], True, False]


FORKED_IN_A_HANDLER = """
import ast, json, os, sys, warnings, fastlisten
from helpers import exchange, serving
warnings.simplefilter("ignore", DeprecationWarning)
options = ast.literal_eval(sys.argv[1])
children = []
def handler(connection):
    child = os.fork()
    if child:
        children.append(child)
        return
    try:
        listener.close()
        connection.sendall(b"from the child " + connection.recv(10))
    finally:
        os._exit(0)
with fastlisten.bind(("127.0.0.1", 0)) as listener:
    with serving(listener, handler, **options):
        answers = [exchange(listener, b"%d" % n).decode() for n in range(10)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
print(json.dumps([answers, statuses]))
"""


@needs("fork")
@pytest.mark.parametrize("mode", ["inline", "threads", "growing threads"])
def test_a_handler_may_fork_for_its_client(mode: str) -> None:
    answers, statuses = python(FORKED_IN_A_HANDLER, repr(MODES[mode]))
    assert answers == [f"from the child {n}" for n in range(10)]
    assert statuses == [0] * 10


def test_the_checks_of_a_process_can_fail() -> None:
    with pytest.raises(AssertionError, match="status 3"):
        check(3, "", "")
    with pytest.raises(AssertionError, match="unclosed"):
        check(0, "", "unclosed <socket")
    assert sys.executable in interpreter()
    assert str(os.environ.get("PATH")) == plain_environment().get("PATH", "None")


@modes
@pytest.mark.parametrize(
    "act",
    [
        lambda listener: listener.close(),
        lambda listener: socket.close(listener.detach()),
        lambda listener: (listener.stop(), listener.stop(drain=0), listener.stop()),
        lambda listener: (listener.pause(), listener.stop()),
        lambda listener: (listener.stop(), listener.close(), listener.stop()),
    ],
    ids=["close", "detach", "stop again and again", "pause and stop", "stop, close, stop"],
)
def test_a_handler_ends_its_own_loop(mode: Any, act: Any) -> None:
    """Whatever of the loop's the handler's thread holds, it does not wait for itself."""

    def handler(connection: Any) -> None:
        if connection.recv(10) == b"last":
            act(listener)

    with fastlisten.bind(LOOPBACK) as listener:
        served = Serving(lambda: listener.serve(handler, **mode))
        address = listener.getsockname()
        for _ in range(5):
            exchange(address, b"more")
        with connect(address) as client:
            client.sendall(b"last")
            assert outcome(client) in (b"", "reset")
        served.wait()


@modes
def test_a_handler_may_ask_and_steer(mode: Any) -> None:
    seen: list[Any] = []

    def handler(connection: Any) -> None:
        listener.pause()
        stats = listener.stats()
        seen.append((stats.active >= 1, stats.paused, told(listener.serve, handler)[0]))
        listener.resume()
        connection.sendall(connection.recv(10))

    with fastlisten.bind(LOOPBACK) as listener, serving(listener, handler, **mode):
        for _ in range(20):
            assert exchange(listener) == b"ping"
    assert seen == [(True, True, RuntimeError)] * 20


@modes
def test_two_threads_close_at_once(mode: Any) -> None:
    for _ in range(10):
        listener = fastlisten.bind(LOOPBACK)
        with connect(listener) as client, serving(listener, echo, **mode) as served:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            together = threading.Barrier(2)

            def close(listener: Any = listener, together: Any = together) -> None:
                together.wait(LIMIT)
                listener.close()

            closers = [threading.Thread(target=close) for _ in range(2)]
            for closer in closers:
                closer.start()
            for closer in closers:
                closer.join(LIMIT)
                assert not closer.is_alive()
            assert served.wait().cut == 1
            assert listener.fileno() == -1
