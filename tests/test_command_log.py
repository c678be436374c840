"""`--log-format json`: whatever the command tells, on stdout and stderr, is one JSON object a line."""

import contextlib
import json
import logging
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastlisten import Endpoint
from fastlisten.cli.log import JSONLines
from helpers import LIMIT, LOOPBACK, connect, exchange, needs, posix_only, read_all, wait_until
from helpers.command import COMMAND, run

pytestmark = posix_only("signals between processes")

# Fails with what the client says in its words, holds the client, or echoes.
SERVICE = """
import sys, threading, warnings

def handle(connection):
    data = connection.recv(1000)
    if data.startswith(b"fail"):
        raise ValueError("said: " + data.decode("utf-8", "surrogateescape"))
    if data == b"warn":
        warnings.warn("first line\\nsecond line")
    if data == b"thread":
        threading.Thread(target=lambda: 1 / 0).start()
    if data == b"hold":
        connection.sendall(b"held")
        connection.recv(1)
    else:
        connection.sendall(data)
"""
# What a client may say to have a line of its own in a log.
FORGED = 'fail"}\n{"event": "forged"}\r\x1b[2J\u2028\u0085'.encode() + b"\xff"


@pytest.fixture
def service(tmp_path: Path) -> Path:
    (tmp_path / "service.py").write_text(SERVICE)
    return tmp_path


class Told:
    """A command that runs, and what it tells on stdout and stderr, which are files."""

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        self.process = process
        self._files = [folder / "stdout", folder / "stderr"]
        self.wait_for("started")
        self.endpoint = Endpoint.parse(self.found("started")["endpoint"])
        self.address: Any = self.endpoint.sockaddr

    def lines(self) -> list[dict[str, Any]]:
        """Read what was told so far, each with what all have."""
        return told("".join(file.read_text() for file in self._files).splitlines())

    def found(self, event: str) -> dict[str, Any]:
        return next(line for line in self.lines() if line["event"] == event)

    def wait_for(self, event: str) -> None:
        wait_until(lambda: any(f'"event": "{event}"' in file.read_text() for file in self._files))

    def end(self) -> set[str]:
        """Have it drain; return the events that it has told."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(LIMIT) == 0
        return {line["event"] for line in self.lines()}


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, **options: Any) -> Iterator[Told]:
    command = [*COMMAND, "serve", "127.0.0.1:0", "service:handle", "--log-format", "json", *arguments]
    with (
        (folder / "stdout").open("wb") as output,
        (folder / "stderr").open("wb") as errors,
        subprocess.Popen(command, stdout=output, stderr=errors, cwd=folder, **options) as process,
    ):
        try:
            yield Told(process, folder)
        finally:
            process.kill()


def told(lines: list[str]) -> list[dict[str, Any]]:
    """Read the lines, each of which has what all have."""
    found = [json.loads(line) for line in lines]
    for line in found:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
        assert line["event"]
        assert line["event"] != "forged"
    return found


@contextlib.contextmanager
def held(address: Any, number: int) -> Iterator[None]:
    """Have so many clients with a handler, as far as they get one."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(address)) for _ in range(number)]
        for client in clients:
            client.sendall(b"hold")
        assert clients[0].recv(4) == b"held"
        yield


def limited(descriptors: int) -> Callable[[], None]:
    def limit() -> None:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    return limit


@needs("Linux")
def test_refusals_errors_and_a_shortage(service: Path) -> None:
    """All of 127.0.0.0/8 is the loopback interface's there, so that somebody else can come."""
    # Without --first-bytes, which would close who has not spoken yet to make way for others.
    options = ["--deny", "127.0.0.2", "--first-bytes", "0"]
    with serving(service, *options, preexec_fn=limited(40)) as server:
        assert exchange(server.address) == b"ping"
        for data in (FORGED, b"warn", b"thread"):
            with connect(server.address) as client:
                client.sendall(data)
                assert read_all(client) == (b"" if data is FORGED else data)
        with socket.socket() as stranger:
            stranger.settimeout(LIMIT)
            stranger.bind(("127.0.0.2", 0))
            stranger.connect(server.address)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
        with held(server.address, 40):
            server.wait_for("accepting pauses")
        assert exchange(server.address) == b"ping"
        server.wait_for("stats")
        assert {"draining", "stopped", "refused", "handler failed"} <= server.end()
        failed = server.found("handler failed")
        assert (failed["level"], failed["listener"]) == ("ERROR", str(server.endpoint))
        assert re.fullmatch(r"127\.0\.0\.1:\d+", failed["peer"])
        assert failed["error"] == "ValueError: said: " + FORGED.decode("utf-8", "surrogateescape")
        assert "in handle" in failed["traceback"]
        refused = server.found("refused")
        assert (refused["reasons"], refused["sources"]) == ({"denied": 1}, {"127.0.0.2": 1})
        assert server.found("accepting pauses")["reason"] == "[Errno 24] Too many open files"
        assert server.found("uncaught exception")["error"] == "ZeroDivisionError: division by zero"
        assert "first line\nsecond line" in server.found("log")["message"]


@needs("Linux", "fork")
def test_workers_that_are_replaced(service: Path) -> None:
    with serving(service, "--workers", "2") as server:
        server.wait_for("serving")
        with connect(server.address) as client:
            client.sendall(FORGED)
            assert read_all(client) == b""
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("replaced")
        assert exchange(server.address) == b"ping"
        assert {"ready", "replacing", "ended", "stopped"} <= server.end()
        failed = server.found("handler failed")
        assert failed["worker"] in (0, 1)
        assert failed["listener"] == str(server.endpoint)


def test_what_ends_the_command() -> None:
    with socket.create_server(LOOPBACK) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("serve", where, "--log-format", "json")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = told(done.stderr.splitlines())
    assert (line["level"], line["event"]) == ("ERROR", "failed")
    assert line["message"].startswith(f"cannot listen on {where}: ")
    unknown = run("serve", "--log-format", "xml")
    assert unknown.returncode == 2
    assert "invalid choice: 'xml'" in unknown.stderr


def test_text_is_the_default() -> None:
    with socket.create_server(LOOPBACK) as taken:
        done = run("serve", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.stderr.startswith("fastlisten: cannot listen on ")


class Connection:
    """Of whom a record says who the client is."""

    def __init__(self, peer: Any) -> None:
        self._peer = peer

    @property
    def peer(self) -> Any:
        if isinstance(self._peer, Exception):
            raise self._peer
        return self._peer


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        (("192.0.2.1", 5000), "192.0.2.1:5000"),
        (("2001:db8::1", 5000, 0, 0), "[2001:db8::1]:5000"),
        ("/run/client\n.sock", "/run/client\n.sock"),
        (b"\0name\xff", "@name\\xff"),
        (OSError("of no family"), None),
    ],
)
def test_a_peer_is_text(peer: Any, text: str | None) -> None:
    record = logging.makeLogRecord({"msg": "%s %d\n", "args": ("a", 1), "connection": Connection(peer)})
    line = JSONLines({"listener": ":80"}).format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["message"], found["event"], found["listener"]) == ("a 1\n", "log", ":80")
    assert found["peer"] == text


def test_what_json_has_no_form_for_is_text() -> None:
    try:
        raise ValueError("\udcff")
    except ValueError:
        record = logging.makeLogRecord({"msg": "m", "exc_info": sys.exc_info(), "extra": {1, 2}, "no": None})
    found = json.loads(JSONLines({}).format(record))
    assert (found["error"], found["extra"]) == ("ValueError: \udcff", "{1, 2}")
    assert "no" not in found
