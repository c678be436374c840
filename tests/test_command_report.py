"""What `fastlisten serve` tells while it runs."""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastlisten
from fastlisten import Endpoint
from fastlisten.cli.report import Advice
from helpers import LIMIT, LOOPBACK, connect, exchange, posix_only
from helpers.command import COMMAND, serve, signals


@signals
def test_a_line_appears_when_something_changed() -> None:
    with serve("127.0.0.1:0") as server:
        assert exchange(server.target) == b"ping"
        pattern = r"\d\d:\d\d:\d\d accepted 1  \d+/s  active ([01])"
        # The time for a line can come while the client is served.
        while told := re.match(pattern, server.line()):
            if told[1] == "0":
                break
        assert told
        # Without a change there is no other one.
        _, output, _ = server.end(signal.SIGTERM)
    assert [line.split(":")[0] for line in output] == ["SIGTERM", "stopped by SIGTERM"]


@signals
def test_json_is_one_object_a_line() -> None:
    with serve("127.0.0.1:0", "--json") as server:
        started = json.loads(server.first)
        assert started == {
            "event": "started",
            "endpoint": str(server.endpoint),
            "handler": "echo",
            "process": server.process.pid,
        }
        assert exchange(server.target) == b"ping"
        while (stats := json.loads(server.line()))["active"]:  # told while the client was served
            assert (stats["event"], stats["accepted"]) == ("stats", 1)
        assert stats["event"] == "stats"
        assert (stats["accepted"], stats["handled"], stats["active"]) == (1, 1, 0)
        assert stats["accept_errors"] == {}
        assert stats["per_second"] >= 0
        status, output, errors = server.end(signal.SIGTERM)
    draining, stopped = map(json.loads, output[-2:])
    assert draining == {"event": "draining", "signal": "SIGTERM", "seconds": 5.0}
    assert (status, errors) == (0, "")
    assert (stopped["event"], stopped["signal"]) == ("stopped", "SIGTERM")
    assert (stopped["cut"], stopped["accepted"]) == (0, 1)


@posix_only("pseudo-terminals")
def test_a_terminal_shows_one_live_line() -> None:
    with on_a_terminal("serve", "127.0.0.1:0") as (process, screen):
        address = screen.listening()
        screen.until(rb"\raccepted 0  0/s  active 0")
        with connect(address) as client:
            client.sendall(b"a")
            assert client.recv(1) == b"a"
            screen.until(rb"\raccepted 1  \d+/s  active 1")
        screen.until(rb"\raccepted 1  \d+/s  active 0")
        # All of it was drawn over one line, which no state exceeds.
        drawn = screen.seen.partition(b"\r\n")[2]
        assert b"\n" not in drawn
        assert max(map(len, drawn.split(b"\r"))) < 50
        process.send_signal(signal.SIGTERM)
        screen.until(rb"\r +\rSIGTERM: draining for at most 5 s\r\n")
        screen.until(rb"stopped by SIGTERM: \d connections? finished, 0 cut; .*\r\n")


COUNTERS = r"accepted (\d)  \d+/s  active (\d)  queue .*"


@posix_only("pseudo-terminals")
def test_a_terminal_shows_a_row_a_worker() -> None:
    command = ["serve", "127.0.0.1:0", "echo", "--workers", "3"]
    with on_a_terminal(*command) as (process, screen):
        with connect(screen.listening()) as client:
            client.sendall(b"a")
            assert client.recv(1) == b"a"
            screen.until_it_shows(rf"\d\d:\d\d:\d\d accepted 1  \d+/s  active 1  queue .*\n{rows(3)}")
            served = re.findall(COUNTERS, screen.text())
            assert sorted(served[1:]) == [("0", "0"), ("0", "0"), ("1", "1")]
        process.send_signal(signal.SIGHUP)
        # What happens is told above the counters, which are there once, with what the old workers had.
        told = r"SIGHUP: 3 of 3 workers are replaced\n"
        screen.until_it_shows(rf"{told}(.*ended with.*\n)*\S+ accepted 1  \d+/s  active 0  .*\n{rows(3)}")
        assert len(re.findall(COUNTERS, screen.text())) == 4
        assert max(len(row) for row in screen.rows if "accepted" in row) < 50
        process.send_signal(signal.SIGTERM)
        screen.until_it_shows(r"stopped by SIGTERM: \d finished, 0 cut; 1 accepted, 1 handled\n")
        assert not re.search(COUNTERS, screen.text())


@posix_only("pseudo-terminals")
def test_a_terminal_that_is_too_low_for_all_workers_shows_some() -> None:
    command = ["serve", "127.0.0.1:0", "echo", "--workers", "6"]
    with on_a_terminal(*command, height=5) as (process, screen):
        screen.until_it_shows(rf"\S+ accepted 0  .*\n{rows(2)}  and 4 more workers\n")
        with connect(screen.listening()) as client:
            client.sendall(b"a")
            screen.until_it_shows(rf"\S+ accepted 1  .*\n{rows(2)}  and 4 more workers\n")
        assert len(re.findall(COUNTERS, screen.text())) == 3  # none has scrolled away
        process.send_signal(signal.SIGTERM)
        screen.until_it_shows("stopped by SIGTERM")


def rows(count: int) -> str:
    """Return the pattern of so many workers' lines."""
    return "".join(rf"  worker {number}  accepted .*\n" for number in range(count))


@contextlib.contextmanager
def on_a_terminal(*arguments: str, height: int = 40) -> Iterator[tuple["subprocess.Popen[str]", "Screen"]]:
    """Run the command on a terminal of 50 columns; it ends well, and says nothing on stderr."""
    import pty

    terminal, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "50", "LINES": str(height)},
        ) as process:
            try:
                os.close(theirs)
                theirs = -1
                yield process, Screen(terminal, height)
                assert process.wait(LIMIT) == 0
                assert process.stderr is not None
                assert process.stderr.read() == ""
            finally:
                if process.poll() is None:
                    process.kill()
    finally:
        os.close(terminal)
        if theirs >= 0:
            os.close(theirs)


class Screen:
    """What a process has written to its terminal: all that came, and what that shows.

    rows: the lines, with those that have scrolled away; the last `height` of them can be written to.
    """

    def __init__(self, terminal: int, height: int) -> None:
        self._terminal = terminal
        self._height = height
        self.seen = b""
        self.rows = [""]
        self._row = self._column = 0

    def listening(self) -> Any:
        """Wait for the endpoint that is listened on; returns where that is."""
        self.until_it_shows(r"listening on \S+\n")
        [endpoint] = re.findall(r"listening on (\S+)\n", self.text())
        return Endpoint.parse(endpoint).sockaddr

    def until(self, pattern: bytes) -> None:
        """Read until pattern appears after what earlier calls waited for."""
        start = max(len(self.seen) - 200, 0)
        self._read_until(lambda: re.search(pattern, self.seen[start:]) is not None, pattern)

    def until_it_shows(self, pattern: str) -> None:
        """Read until its lines have this."""
        self._read_until(lambda: re.search(pattern, self.text()) is not None, pattern)

    def text(self) -> str:
        """Return its lines."""
        return "\n".join(self.rows)

    def _read_until(self, done: Callable[[], bool], what: object) -> None:
        end = time.monotonic() + LIMIT
        with selectors.DefaultSelector() as selector:
            selector.register(self._terminal, selectors.EVENT_READ)
            while not done():
                assert time.monotonic() < end, (what, self.seen)
                if selector.select(0.1):
                    came = os.read(self._terminal, 4096)
                    self.seen += came
                    for part in re.findall(r"\x1b\[\d*[A-Z]|\r|\n|[^\x1b\r\n]+", came.decode()):
                        self._show(part)

    def _show(self, part: str) -> None:
        """Do what a terminal does with this, as far as the command asks for it: ECMA-48."""
        if part == "\r":
            self._column = 0
        elif part == "\n":
            self._row += 1
            self.rows += [""] * (self._row + 1 - len(self.rows))
        elif part.endswith("A") and part[0] == "\x1b":
            self._row = max(self._row - int(part[2:-1] or 1), len(self.rows) - self._height, 0)
        elif part in ("\x1b[K", "\x1b[J"):
            self.rows[self._row] = self.rows[self._row][: self._column]
            for row in range(self._row + 1, len(self.rows)) if part == "\x1b[J" else ():
                self.rows[row] = ""
        else:
            line = self.rows[self._row].ljust(self._column)
            self.rows[self._row] = line[: self._column] + part + line[self._column + len(part) :]
            self._column += len(part)


@posix_only("pseudo-terminals")
def test_a_terminal_that_cannot_go_back_gets_lines() -> None:
    """TERM=dumb: an editor's shell, or a log that looks like a terminal."""
    primary, secondary = os.openpty()
    try:
        with subprocess.Popen(
            [*COMMAND, "serve", "127.0.0.1:0"], stdout=secondary, env={**os.environ, "TERM": "dumb"}
        ) as process:
            os.close(secondary)
            first = os.read(primary, 1000)
            assert exchange(Endpoint.parse(first.decode().split()[2]).sockaddr) == b"ping"
            line = os.read(primary, 1000)
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT) == 0
    finally:
        os.close(primary)
    assert line.endswith(b"\n")
    assert b"accepted 1" in line


def stats(**counters: Any) -> fastlisten.ListenerStats:
    """Return counters of which all but these are 0."""
    with fastlisten.bind(LOOPBACK) as listener:
        return listener.stats()._replace(**counters)


@pytest.mark.parametrize(("threads", "warns"), [(0, False), (2, True), ((1, 2), True)])
def test_threads_that_are_all_taken_for_long_are_told_of_once(
    threads: int | tuple[int, int], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    advice = Advice(threads, first_bytes=True)

    def look(now: int, active: int, waiting: int = 0) -> None:
        total = stats(accepted=active, active=active, waiting=waiting)
        advice.look(total, [total], now)

    for now, active in enumerate([2, 2, 2, 1, *[2] * 5]):
        look(now, active)
    for now in range(9, 20):
        look(now, 9, waiting=8)  # they have no thread
    assert not caplog.records  # never for 5 s at a stretch
    for now in range(20, 30):
        look(now, 3)
    texts = [record.getMessage() for record in caplog.records]
    assert (
        texts
        == [
            "all 2 threads have had clients for 5 s, and others wait: --threads 1,4 would serve more, and "
            "connection.settimeout() in the handler ends who says nothing"
        ]
        * warns
    )


@pytest.mark.parametrize(
    ("counters", "first_bytes", "warns"),
    [
        ({"accepted": 1, "active": 1, "waiting": 1}, True, True),
        ({"accepted": 2, "active": 1, "waiting": 1, "refused": 1}, True, True),
        ({"accepted": 2, "active": 2, "waiting": 1}, True, False),
        ({"accepted": 2, "active": 1, "waiting": 1, "handled": 1}, True, False),
        ({"accepted": 1, "active": 1, "waiting": 1}, False, False),
    ],
)
def test_a_handler_that_may_wait_in_vain_is_told_of_once(
    counters: dict[str, int], first_bytes: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    advice, total = Advice(4, first_bytes), stats(**counters)
    for now in range(10):
        advice.look(total, [total, total], now)
    assert [record.event for record in caplog.records] == ["nobody has spoken"] * warns  # type: ignore[attr-defined]
