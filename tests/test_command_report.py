"""What `fastlisten serve` tells while it runs."""

import json
import os
import re
import selectors
import signal
import subprocess
import time

from helpers.command import COMMAND, serve, signals
from helpers import LIMIT, connect, exchange, posix_only

from fastlisten import Endpoint


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
    import pty

    terminal, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [*COMMAND, "serve", "127.0.0.1:0"],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "50"},
        ) as process:
            try:
                os.close(theirs)
                theirs = -1
                screen = Screen(terminal)
                screen.until(rb"listening on (\S+)\r\n")
                [endpoint] = re.findall(rb"listening on (\S+)\r\n", screen.seen)
                screen.until(rb"\raccepted 0  0/s  active 0")
                target = Endpoint.parse(endpoint.decode()).sockaddr
                with connect(target) as client:
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
    """What a process has written to its terminal."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self.seen = b""

    def until(self, pattern: bytes) -> None:
        """Read until pattern appears after what earlier calls waited for."""
        start = len(self.seen)
        end = time.monotonic() + LIMIT
        with selectors.DefaultSelector() as selector:
            selector.register(self._terminal, selectors.EVENT_READ)
            while not re.search(pattern, self.seen[max(start - 200, 0) :]):
                assert time.monotonic() < end, (pattern, self.seen)
                if selector.select(0.1):
                    self.seen += os.read(self._terminal, 4096)
