"""`fastlisten top`: what it shows of a status port, on which terminals, and when there is none."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from fastlisten import Connection, Endpoint, Listener, bind
from fastlisten._status.thread import StatusThread
from fastlisten.cli.scrape import Snapshot
from fastlisten.cli.view import BARS, PLAIN_BARS, View
from helpers import LIMIT, LOOPBACK, connect, exchange, needs, posix_only, refusal, serving, wait_until
from helpers.command import COMMAND, is_one_line, serve, signals
from helpers.command import run as run_command
from helpers.programs import plain_environment, running


def answer(connection: Connection) -> None:
    connection.sendall(connection.recv(100))


@pytest.fixture
def asked(listener: Listener) -> Iterator[str]:
    """Give the status port of a listener that has served two clients and refused one."""
    with (
        StatusThread(bind(LOOPBACK), [listener]) as status,
        serving(listener, answer, threads=1, pending=1, busy=b"full"),
    ):
        for _ in range(2):
            exchange(listener, b"x")
        wait_until(lambda: listener.stats().active == 0)
        with connect(listener):
            wait_until(lambda: (listener.stats().active, listener.stats().pending_connections) == (1, 0))
            with connect(listener):
                wait_until(lambda: listener.stats().pending_connections == 1)
                assert refusal(listener) == b"full"
        wait_until(lambda: listener.stats().active == 0)
        yield str(status.endpoint)


def test_once_as_json(asked: str, listener: Listener) -> None:
    done = run_command("top", asked, "--once", "--json", "--interval", "0.01")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["endpoint"], found["state"], found["per_second"]) == (asked, "serving", 0)
    assert found["reasons"]["refused_connections"]["busy"] == 1
    [row] = found["rows"]
    assert (row["listener"], row["worker"], row["accepted_connections"]) == (str(listener.endpoint), None, 5)


@needs("Linux")
def test_what_cannot_be_written_is_told(asked: str) -> None:
    command = [*COMMAND, "top", asked, "--once", "--json", "--interval", "0.01"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT)
    line = "fastlisten: cannot write to stdout: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)


@pytest.mark.parametrize(("columns", "last"), [(20, "/s"), (80, "starts"), (200, "accepted")])
def test_once_as_text_is_as_wide_as_there_is_room(asked: str, columns: int, last: str) -> None:
    pytest.importorskip("rich")
    environment = plain_environment(COLUMNS=str(columns), NO_COLOR="1")
    done = run_command("top", asked, "--once", "--interval", "0.01", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert "\x1b" not in done.stdout
    assert next(line for line in lines if line.startswith("worker")).split()[-1] == last
    assert "refused: busy 1" in done.stdout


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, master: int, process: "subprocess.Popen[bytes]") -> None:
        self._master = master
        self.process = process
        self.seen = ""

    def until(self, text: str) -> None:
        """Read until it has written this; pytest's time limit ends a wait that is in vain."""
        while text not in self.seen:
            self.seen += os.read(self._master, 4096).decode(errors="replace")

    def press(self, key: bytes) -> None:
        os.write(self._master, key)

    def press_until(self, key: bytes, text: str) -> None:
        """The same for what it writes from now on."""
        self.seen = ""
        self.press(key)
        self.until(text)


@contextlib.contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    """Run the command on a terminal of 80 columns until the block ends."""
    master, slave = os.openpty()
    try:
        with subprocess.Popen(
            [*COMMAND, "top", *arguments],
            stdin=slave,
            stdout=slave,
            env=plain_environment(COLUMNS="80", LINES="24", **environment),
        ) as process:
            try:
                yield Terminal(master, process)
            finally:
                process.kill()
    finally:
        os.close(master)
        os.close(slave)


@posix_only("it has pseudo-terminals")
@pytest.mark.parametrize(("term", "key"), [("xterm", b"q"), ("xterm", b""), ("dumb", b"q")])
def test_on_a_terminal_until_a_key_ends_it(asked: str, listener: Listener, term: str, key: bytes) -> None:
    """No key: Ctrl-C, which is a signal."""
    pytest.importorskip("rich")
    with terminal(asked, "--interval", "0.05", TERM=term) as top:
        top.until("accepted 5")
        top.until("q end")
        exchange(listener, b"x")
        top.until("accepted 6")
        if key:
            top.press(key)
        else:
            top.process.send_signal(signal.SIGINT)
        assert top.process.wait(LIMIT) == 0
        assert "pause" not in top.seen  # which this port does not do
    assert ("\x1b[?1049h" in top.seen) == (term == "xterm")  # the screen that is left as it was


@signals
def test_keys_have_a_service_do_things() -> None:
    """A drain is asked for twice."""
    pytest.importorskip("rich")
    arguments = ("--workers", "2", "--status", "127.0.0.1:0", "--status-control")
    with serve("127.0.0.1:0", *arguments) as server:
        endpoint = server.line().removeprefix("status on ")
        server.line_with("all workers serve")
        with terminal(endpoint, "--interval", "0.05", TERM="xterm", NO_COLOR="1") as top:
            top.until("p pause  r resume  d drain  up/down choose  x restart worker  q end")
            top.press_until(b"p", "/pause: paused")
            top.until(f"{endpoint}  paused")
            top.press_until(b"r", "/resume: serving")
            top.press_until(b"\x1b[B", ">1")
            top.press_until(b"x", "/restart?worker=1: replacing worker 1")
            server.line_with("1 of 1 workers are replaced")
            top.press_until(b"k", ">0")
            top.press_until(b"d", "drain? y")
            top.press_until(b"n", "q end")
            top.press_until(b"d", "drain? y")
            top.press_until(b"y", "/drain: draining")
            server.line_with("stopped by SIGTERM")
            top.press(b"q")
            assert top.process.wait(LIMIT) == 0


@posix_only("signals between processes")
def test_a_service_that_goes_is_told_of_and_seen_again(listener: Listener) -> None:
    pytest.importorskip("rich")
    with bind(LOOPBACK) as port:
        endpoint = port.endpoint
    with StatusThread(bind(endpoint), [listener]):
        command = [*COMMAND, "top", str(endpoint), "--interval", "0.02"]
        process = running(command)
        top = process.__enter__()
        assert top.stdout is not None
        while "starting" not in top.stdout.readline():
            pass
    try:
        while "no answer: Connection refused" not in top.stdout.readline():
            pass
        with StatusThread(bind(endpoint), [listener]):
            while "starting" not in top.stdout.readline():
                pass
    finally:
        process.__exit__(None, None, None)


def test_nobody_there_is_told() -> None:
    with bind(LOOPBACK) as port:
        endpoint = port.endpoint
    is_one_line(run_command("top", str(endpoint)), 1, f"cannot ask {endpoint}: ")


def test_another_service_is_told(listener: Listener) -> None:
    def handler(connection: Any) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello")

    with serving(listener, handler):
        done = run_command("top", str(listener.endpoint))
    is_one_line(done, 1, "it answers, but not as a status port does")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["9100"], "; is :9100 meant?"),
        ([":9100", "--json"], "--json needs --once"),
        ([":9100", "--interval", "0"], "'0' is not a number above 0"),
    ],
)
def test_mistakes_are_told(arguments: list[str], text: str) -> None:
    is_one_line(run_command("top", *arguments), 2, text)


WITHOUT_RICH = """
import sys
sys.modules["rich"] = sys.modules["rich.console"] = None
from fastlisten.cli import main
sys.exit(main(["top", sys.argv[1], "--once", "--interval", "0.01", *sys.argv[2:]]))
"""


def test_without_rich_only_json_is_told(asked: str) -> None:
    from helpers.programs import run

    done = run(WITHOUT_RICH, asked, status=1)
    text = "fastlisten: top needs rich, and --once --json does not: pip install 'fastlisten[top]'\n"
    assert done.stderr == text
    assert json.loads(run(WITHOUT_RICH, asked, "--json").stdout)["state"] == "serving"


# --- the view

TEXT = """
fastlisten_accepted_connections_total{{listener="a:1",worker="0"}} {0}
fastlisten_accepted_connections_total{{listener="a:1",worker="1"}} {1}
fastlisten_worker_ready{{listener="a:1",worker="1"}} 0
fastlisten_pending_duration_seconds_bucket{{listener="a:1",worker="0",le="+Inf"}} 5
fastlisten_build_info{{version="1"}} 1
"""


def seen(*counts: tuple[int, int]) -> View:
    """Return a view that has seen these numbers of two workers, a second apart."""
    view = View(Endpoint.parse("127.0.0.1:1"))
    for second, (one, other) in enumerate(counts):
        snapshot = Snapshot("serving", TEXT.format(one, other))
        snapshot.at = float(second)
        view.saw(snapshot)
    return view


def test_rates_are_of_each_worker_and_of_all() -> None:
    view = seen((10, 0), (30, 5))
    assert view.rate() == 25
    assert view.rate(("a:1", "0")) == 20
    titles, rows = view.table(200)
    assert [dict(zip(titles, row, strict=True))["/s"] for row in rows] == ["20", "5"]
    assert [dict(zip(titles, row, strict=True))["state"] for row in rows] == ["serves", "starting"]


def test_a_counter_that_begins_anew_is_no_rate_below_0() -> None:
    assert seen((100, 0), (5, 0)).rate() == 0


def test_the_sparkline_is_of_a_minute_and_of_what_there_is_room_for() -> None:
    view = seen(*((70 * n if n > 2 else 0, 0) for n in range(100)))
    assert len(view.sparkline(200, BARS)) == 61
    assert view.sparkline(3, BARS) == "███"
    view = seen((0, 0), (0, 0), (1, 0), (8, 0))
    assert view.sparkline(80, PLAIN_BARS) == "__.#"
