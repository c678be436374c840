"""The command line, run as a person or a script runs it: in processes of its own."""

import contextlib
import errno
import functools
import inspect
import ipaddress
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastlisten
from fastlisten import Endpoint
from fastlisten.__main__ import main
from helpers import (
    LIMIT,
    NOBODYS,
    NOWHERE,
    connect,
    exchange,
    needs,
    not_under_wine,
    posix_only,
    read_all,
    under_wine,
)

COMMAND = [sys.executable, "-m", "fastlisten"]
LISTENING = "listening on "
Told = Callable[..., "subprocess.CompletedProcess[str]"]

signals = posix_only("signals between processes")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=LIMIT * 3, **options
    )


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Told:
    """Give run(), in an empty working directory; for many cases, and so in this process on Wine, where
    the start of another takes more than a second."""
    if not under_wine():
        return functools.partial(run, cwd=tmp_path)

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", sys.path.copy())
        try:
            status = main(arguments)
        except SystemExit as end:  # after --help
            status = int(end.code or 0)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return call


class Server:
    """A running `fastlisten serve` and the endpoint that its first line tells."""

    def __init__(self, process: "subprocess.Popen[str]", as_json: bool) -> None:
        self.process = process
        self.first = self.line()
        if as_json:
            self.endpoint = Endpoint.parse(json.loads(self.first)["endpoint"])
        else:
            assert self.first.startswith(LISTENING), (self.first, process.poll())
            self.endpoint = Endpoint.parse(self.first.removeprefix(LISTENING))

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def line_with(self, text: str) -> None:
        """Read lines until one has text; pytest's time limit ends a wait that is in vain."""
        while text not in (line := self.line()):
            assert line or self.process.poll() is None, f"{text!r} never came"

    def end(self, number: int) -> tuple[int, list[str], str]:
        """Send a signal; return the status, the lines that were left on stdout, and stderr."""
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, output.splitlines(), errors

    @property
    def target(self) -> Any:
        return self.endpoint.sockaddr

    @property
    def url(self) -> str:
        return f"http://{self.endpoint}/"


@contextlib.contextmanager
def serve(*arguments: str, **options: Any) -> Iterator[Server]:
    """Run `fastlisten serve` until the block ends."""
    with subprocess.Popen(
        [*COMMAND, "serve", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        **options,
    ) as process:
        try:
            yield Server(process, "--json" in arguments)
        finally:
            if process.poll() is None:
                process.kill()


def installed(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


# --- Serving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", ["0", "1", "2,8"])
def test_echo_answers_at_the_endpoint_that_the_first_line_tells(threads: str) -> None:
    with serve("127.0.0.1:0", "--threads", threads) as server:
        assert server.endpoint.port > 0
        for data in (b"hello", b"x" * 300_000):
            assert exchange(server.target, data) == data


def test_the_default_handler_is_echo_and_takes_clients_at_once() -> None:
    with serve("127.0.0.1:0") as server, connect(server.target) as silent:
        assert exchange(server.target, b"second") == b"second"
        silent.sendall(b"first")
        silent.shutdown(socket.SHUT_WR)
        assert read_all(silent) == b"first"


@needs("unix sockets")
def test_a_unix_endpoint_with_its_mode(unix_path: str) -> None:
    with serve(f"unix:{unix_path} :x", "echo", "--mode", "600") as server:
        assert server.first == f"{LISTENING}unix:{unix_path} :x"
        assert os.stat(f"{unix_path} :x").st_mode & 0o777 == 0o600
        assert exchange(f"{unix_path} :x") == b"ping"


@posix_only("a process inherits no sockets on Windows")
def test_an_inherited_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        descriptor = listener.fileno()
        with serve(f"fd:{descriptor}", pass_fds=[descriptor]) as server:
            assert server.endpoint == Endpoint(*listener.getsockname())
            assert exchange(listener) == b"ping"


@needs("the IPv6 loopback address")
def test_an_ipv6_endpoint() -> None:
    with serve("[::1]:0") as server:
        assert exchange(server.target) == b"ping"


def test_every_option_reaches_the_socket(tmp_path: Path) -> None:
    """The handler, found in the working directory, tells what it sees."""
    (tmp_path / "own.py").write_text(
        "import socket\n"
        "class Look:\n"
        "    def at(connection):\n"
        "        connection.recv(9)\n"
        "        seen = [\n"
        "            connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),\n"
        "            connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),\n"
        "        ]\n"
        "        connection.sendall(repr([bool(value) for value in seen]).encode())\n"
    )
    options = ["--backlog", "7", "--no-delay", "--keep-alive", "--max-connections", "9"]
    options += ["--threads", "1,2", "--exhausted", "shed", "--pending", "5", "--busy", "reset"]
    if sys.platform == "linux":
        options += ["--defer-accept", "3", "--fast-open", "4"]
    with serve("127.0.0.1:0", "own:Look.at", *options, cwd=tmp_path) as server:
        assert exchange(server.target, b"x") == b"[True, True]"


def test_busy_sends_its_text_to_the_client_beyond_pending() -> None:
    text = r"HTTP/1.1 503 Service Unavailable\r\n\r\né"
    with (
        serve("127.0.0.1:0", "--threads", "1", "--pending", "1", "--busy", text) as server,
        connect(server.target) as held,
    ):
        held.sendall(b"x")
        assert held.recv(1) == b"x"  # now the only thread is taken
        with connect(server.target), connect(server.target) as refused:
            assert read_all(refused) == "HTTP/1.1 503 Service Unavailable\r\n\r\né".encode()


def test_a_handler_that_raises_is_logged_and_counted() -> None:
    with serve("127.0.0.1:0", "json:loads", "--json") as server:
        assert exchange(server.target, b"") == b""
        stats = json.loads(server.line())
        assert (stats["event"], stats["handler_errors"], stats["accepted"]) == ("stats", 1, 1)
        server.process.kill()
        errors = server.process.communicate(timeout=LIMIT)[1]
        assert "ERROR fastlisten:" in errors
        assert "TypeError" in errors


# --- The built-in http handler -----------------------------------------------------------------


def parse_answer(answer: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    return status, dict(line.lower().split(b": ", 1) for line in lines), content


@pytest.fixture(scope="module")
def web() -> Iterator[Server]:
    with serve("127.0.0.1:0", "http") as server:
        yield server


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.0\n\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 60_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000,
        b"GET / HTTP/1.1\r\n\r\nGET /pipelined HTTP/1.1\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
)
def test_http_answers_any_request_with_a_small_200(web: Server, request_bytes: bytes) -> None:
    status, fields, content = parse_answer(exchange(web.target, request_bytes))
    assert status == b"HTTP/1.1 200 OK"
    assert fields[b"connection"] == b"close"
    assert int(fields[b"content-length"]) == len(content) > 0


def test_http_answers_while_the_client_keeps_its_side_open(web: Server) -> None:
    with connect(web.target) as client:
        for piece in (b"GET / HT", b"TP/1.1\r\n\r", b"\n"):
            client.sendall(piece)
        assert parse_answer(read_all(client))[0] == b"HTTP/1.1 200 OK"


def test_http_answers_head_without_content(web: Server) -> None:
    _, fields, content = parse_answer(exchange(web.target, b"HEAD / HTTP/1.1\r\n\r\n"))
    assert content == b""
    assert int(fields[b"content-length"]) > 0


def test_http_lets_a_client_that_expects_it_send(web: Server) -> None:
    with connect(web.target) as client:
        client.sendall(b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        expected = b"HTTP/1.1 100 Continue\r\n\r\n"
        interim = client.recv(len(expected), socket.MSG_WAITALL)
        client.sendall(b"12345")
        client.shutdown(socket.SHUT_WR)
        answer = read_all(client)
    assert interim == expected
    assert parse_answer(answer)[0] == b"HTTP/1.1 200 OK"


def test_http_refuses_an_endless_head(web: Server) -> None:
    answer = exchange(web.target, b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000)
    status, fields, content = parse_answer(answer)
    assert status == b"HTTP/1.1 431 Request Header Fields Too Large"
    assert int(fields[b"content-length"]) == len(content) == 0


def test_http_has_no_answer_to_half_a_request(web: Server) -> None:
    assert exchange(web.target, b"GET / HTTP/1.1\r\n") == b""


@installed("curl")
@pytest.mark.parametrize("arguments", [[], ["-d", "x=1"], ["-T", "big"], ["-I"]])
def test_curl_is_content(web: Server, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "big").write_bytes(b"x" * 3_000_000)
    tool = ["curl", "-q", "-sS", "--noproxy", "*", "-w", "%{http_code}", "-o", os.devnull]
    # Only as the first option does -q keep curl from reading a ~/.curlrc.
    # Under a sanitizer's runtime, which is for our modules, curl hangs before its first line.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [*tool, *arguments, web.url],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "200", "")


@installed("ab")
@pytest.mark.parametrize("threads", ["0", "8"])
def test_ab_has_all_its_requests_answered(threads: str) -> None:
    with serve("127.0.0.1:0", "http", "--threads", threads) as server:
        done = subprocess.run(
            ["ab", "-q", "-n", "20000", "-c", "64", server.url],
            capture_output=True,
            text=True,
            timeout=LIMIT * 4,
        )
    assert done.returncode == 0, done.stderr
    counts = dict(re.findall(r"^([A-Z][\w -]+):\s+(\d+)", done.stdout, re.M))
    assert counts["Complete requests"] == "20000"
    assert counts["Failed requests"] == "0"
    assert "Non-2xx responses" not in counts


# --- How it ends -------------------------------------------------------------------------------


@signals
@pytest.mark.parametrize("threads", ["0", "4"])
def test_sigterm_lets_the_client_finish_and_tells_so(threads: str) -> None:
    with (
        serve("127.0.0.1:0", "--threads", threads) as server,
        connect(server.target) as client,
    ):
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        server.process.send_signal(signal.SIGTERM)
        server.line_with("SIGTERM: draining for at most 5 s")
        client.sendall(b"b")
        assert client.recv(1) == b"b"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        output, errors = server.process.communicate(timeout=LIMIT)
    assert (server.process.returncode, errors) == (0, "")
    assert output.splitlines()[-1] == (
        "stopped by SIGTERM: 1 connection finished, 0 cut; 1 accepted, 1 handled"
    )


@signals
def test_sigterm_cuts_the_client_that_outstays_the_drain() -> None:
    with (
        serve("127.0.0.1:0", "--drain", "0.2", "--threads", "2") as server,
        connect(server.target) as client,
    ):
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        status, output, errors = server.end(signal.SIGTERM)
        assert read_all_or_reset(client) == b""
    assert (status, errors) == (0, "")
    assert output[-1].startswith("stopped by SIGTERM: 0 connections finished, 1 cut; 1 accepted")


@contextlib.contextmanager
def draining() -> Iterator[Server]:
    """Give a command that a SIGTERM has told to drain, and that a client keeps from ending."""
    with (
        serve("127.0.0.1:0", "--drain", "1000", "--threads", "2") as server,
        connect(server.target) as client,
    ):
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        server.process.send_signal(signal.SIGTERM)
        server.line_with("SIGTERM: draining for at most 1000 s")
        yield server


@signals
def test_a_second_sigterm_does_not_wait() -> None:
    with draining() as server:
        status, output, _ = server.end(signal.SIGTERM)
    assert status == 0
    assert "0 connections finished, 1 cut" in output[-1]


@signals
def test_what_ended_it_is_named_and_not_what_came_before() -> None:
    with draining() as server:
        status, output, errors = server.end(signal.SIGINT)
    assert (status, errors) == (130, "")
    assert output[-1].startswith("stopped by SIGINT; ")


# Runs the command with its arguments, with stdout closed or on a full disk.
REDIRECTED = [
    "sh",
    "-c",
    'how=$1; shift; case $how in closed) exec "$@" >&-;; full) exec "$@" >/dev/full;; esac',
    "-",
]
full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")


@posix_only("redirected by sh")
@full_disk
@pytest.mark.parametrize("how", ["closed", "full"])
def test_a_service_outlives_its_log(how: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [*REDIRECTED, how, *COMMAND, "serve", f"fd:{listener.fileno()}"]
        with subprocess.Popen(
            command, pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert exchange(listener) == b"ping"
                process.send_signal(signal.SIGTERM)
                errors = process.communicate(timeout=LIMIT)[1]
            finally:
                process.kill()
    assert process.returncode == 0
    line = f"fastlisten: stdout: {os.strerror(errno.ENOSPC)}; serving goes on\n"
    assert errors == ("" if how == "closed" else line)


@posix_only("redirected by sh")
@full_disk
def test_hosts_tells_when_it_cannot_write() -> None:
    hosts = [*COMMAND, "hosts", "127.0.0.1"]
    done = subprocess.run([*REDIRECTED, "full", *hosts], capture_output=True, text=True, timeout=LIMIT)
    is_one_line(done, 1, f"cannot write to stdout: {os.strerror(errno.ENOSPC)}")
    done = subprocess.run([*REDIRECTED, "closed", *hosts], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, "")


def read_all_or_reset(client: socket.socket) -> bytes:
    try:
        return read_all(client)
    except ConnectionResetError:
        return b""


@signals
@pytest.mark.parametrize("threads", ["0", "4"])
@pytest.mark.parametrize("busy", [False, True])
def test_ctrl_c_ends_with_130_and_no_traceback(threads: str, busy: bool) -> None:
    with serve("127.0.0.1:0", "--threads", threads) as server, contextlib.ExitStack() as clients:
        if busy:
            client = clients.enter_context(connect(server.target))
            client.sendall(b"a")
            assert client.recv(1) == b"a"
        status, output, errors = server.end(signal.SIGINT)
    assert (status, errors) == (130, "")
    assert output[-1].startswith("stopped by SIGINT; ")


# Presses Ctrl-C in a console of its own: the event goes to all processes of the console, this one included.
# In a process group of its own the command would have it ignored (CreateProcess, CREATE_NEW_PROCESS_GROUP).
PRESS = """
import ctypes, json, signal, socket, subprocess, sys
kernel = ctypes.WinDLL("kernel32", use_last_error=True)
kernel.FreeConsole()
if not kernel.AllocConsole():
    raise ctypes.WinError(ctypes.get_last_error())
command = [sys.executable, "-m", "fastlisten", "serve", "127.0.0.1:0", *sys.argv[1:]]
with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
    try:
        port = int(process.stdout.readline().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 20) as client:
            client.sendall(b"ping")
            assert client.recv(9) == b"ping"
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not kernel.GenerateConsoleCtrlEvent(signal.CTRL_C_EVENT, 0):
            raise ctypes.WinError(ctypes.get_last_error())
        output, errors = process.communicate(timeout=20)
    except BaseException:
        process.kill()
        raise
print(json.dumps([process.returncode, output, errors]))
"""


@pytest.mark.skipif(os.name != "nt", reason="Windows has consoles; the test above sends the signal")
@pytest.mark.parametrize("threads", ["0", "2"])
def test_ctrl_c_in_the_console(threads: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRESS, "--threads", threads], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (0, "")
    status, output, errors = json.loads(done.stdout)
    assert (status, errors) == (130, "")
    assert output.startswith("stopped by SIGINT; 1 accepted")


@signals
def test_ctrl_c_while_the_handler_is_imported(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import signal, sys\nprint('importing', flush=True)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "signal.sigwait([signal.SIGINT])\nraise KeyboardInterrupt\n"
    )
    with subprocess.Popen(
        [*COMMAND, "serve", "127.0.0.1:0", "slow:f"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, output, errors) == (130, "", "")


@signals
def test_a_reader_that_leaves_does_not_stop_the_service() -> None:
    """As in `fastlisten serve | head -1`."""
    with serve("127.0.0.1:0") as server:
        assert server.process.stdout is not None
        server.process.stdout.close()
        assert exchange(server.target) == b"ping"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""
        assert server.process.wait(LIMIT) == 0


# --- What it tells meanwhile -------------------------------------------------------------------


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
                with connect(target) as client:  # type: ignore[arg-type]
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


# --- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "required: COMMAND"),
        (["walk"], 2, "invalid choice: 'walk'"),
        (["serve", "127.0.0.1"], 2, "'127.0.0.1' is not an endpoint: the port is missing"),
        (["serve", "127.0.0.1:99999"], 2, "port must be 0-65535"),
        (["serve", "a\nb:80"], 2, r"'a\nb:80' is not an endpoint"),
        (["serve", "http"], 2, "http is a handler and needs an endpoint before it"),
        (["serve", "127.0.0.1:0", "nothing"], 2, "neither echo, http nor module:function"),
        (["serve", "127.0.0.1:0", "no_such_module:f"], 2, "No module named 'no_such_module'"),
        (["serve", "127.0.0.1:0", "json:no_such"], 2, "has no attribute 'no_such'"),
        (["serve", "127.0.0.1:0", "os:path"], 2, "handler 'os:path' is not callable"),
        (["serve", "127.0.0.1:0", "broken:f"], 2, "ZeroDivisionError: division by zero ("),
        (["serve", "127.0.0.1:0", "wrong:f"], 2, "SyntaxError"),
        (["serve", "--nonsense"], 2, "unrecognized arguments: --nonsense"),
        (["serve", "--backlog", "many"], 2, "--backlog: 'many' is not a number from 0 on"),
        (["serve", "--max-connections", "0"], 2, "'0' is not a number from 1 on"),
        (["serve", "--threads", "9,2"], 2, "'9,2' has its minimum above its maximum"),
        (["serve", "--threads", "1,2,3"], 2, "'1,2,3' is neither N nor MIN,MAX"),
        (["serve", "--threads", "-1"], 2, "--threads"),
        (["serve", "--drain", "soon"], 2, "'soon' is not a time in seconds"),
        (["serve", "--drain", "inf"], 2, "'inf' is not a time in seconds"),
        (["serve", "--mode", "rw"], 2, "'rw' is not an octal mode such as 600"),
        (["serve", "--mode", "7777"], 2, "'7777' is not an octal mode"),
        (["serve", "--busy", "\\x"], 2, "has a broken escape"),
        (["serve", "--exhausted", "cry"], 2, "invalid choice: 'cry'"),
        (["serve", "127.0.0.1:0", "--reuse-port"], 2, "cannot listen on 127.0.0.1:0: "),
        (["serve", "127.0.0.1:0", "--mode", "600"], 2, "cannot listen on 127.0.0.1:0: "),
        (["serve", "127.0.0.1:0", "--dualstack-ipv6"], 2, "cannot listen on 127.0.0.1:0: "),
        (["serve", f"{NOWHERE}:0"], 1, f"cannot listen on {NOWHERE}:0: "),
        pytest.param(
            ["serve", f"{NOBODYS}:0"],
            1,
            f"cannot listen on {NOBODYS}:0: ",
            marks=needs("addresses of others that cannot be bound"),
        ),
        (["serve", "fd:999"], 1, "cannot listen on fd:999: "),
        (["hosts", NOWHERE], 1, f"cannot look up {NOWHERE!r}: "),
        (["hosts", "a", "b"], 2, "unrecognized arguments: b"),
    ],
)
def test_a_mistake_is_one_clear_line(
    told: Told, arguments: list[str], status: int, text: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "wrong.py").write_text("def f(\n")
    is_one_line(told(*arguments), status, text)


def is_one_line(done: "subprocess.CompletedProcess[str]", status: int, text: str) -> None:
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("fastlisten: ")
    assert done.stderr.count("\n") == 1
    assert text in done.stderr


def test_the_process_passes_line_and_status_on() -> None:
    is_one_line(run("serve", "nowhere"), 2, "'nowhere' is not an endpoint")
    is_one_line(run("hosts", NOWHERE), 1, "cannot look up")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["serve", "11000"], "the port is missing; "),
        (["serve", "11000"], "; is :11000 meant?"),
        (["serve", "127.0.0.1"], "; is 127.0.0.1:11000 meant?"),
        (["serve", "--port", "80"], "unrecognized arguments: --port (see fastlisten serve --help)"),
        (["hosts", "a", "b"], "unrecognized arguments: b (see fastlisten hosts --help)"),
        (["serve", ":0", "--threads", "0,3"], "'0,3' has a minimum below 1"),
        (["serve", ":0", "--threads", "0,0"], "'0,0' has a minimum below 1"),
        (["serve", ":0", "--pending", "3"], "--pending needs --busy"),
        (["serve", ":0", "own.py:hello"], "a module is named without its .py: own:hello"),
        (["serve", ":0", "a/own.py:hello"], "a module is named without its .py: a.own:hello"),
        (["serve", "127.0.0.1:0", "--dualstack-ipv6"], "127.0.0.1:0: --dualstack-ipv6 "),
        (["serve", "127.0.0.1:0", "--mode", "600"], "--mode is for unix paths, not for 127.0.0.1:0"),
    ],
)
def test_a_mistake_is_met_with_what_may_have_been_meant(
    told: Told, arguments: list[str], text: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("def hello(connection): pass\n")
    is_one_line(told(*arguments), 2, text)


def test_an_address_without_a_name_is_no_unknown_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look_up(name: str) -> None:
        raise socket.herror(1, "Unknown host")

    monkeypatch.setattr(fastlisten, "get_host_entry", look_up)
    assert main(["hosts", "192.0.2.1"]) == 1
    line = "fastlisten: cannot look up '192.0.2.1': no name is known for this address\n"
    assert capsys.readouterr() == ("", line)


def test_a_port_that_needs_privileges_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bind(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fastlisten, "bind", bind)
    text = "Permission denied"
    for endpoint, end in (
        ("127.0.0.1:80", f"{text}: ports below 1024 need privileges"),
        ("[::1]:1024", text),
    ):
        assert main(["serve", endpoint]) == 1
        assert capsys.readouterr().err == f"fastlisten: cannot listen on {endpoint}: {end}\n"


@needs("unix sockets")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (os.mkdir, "a directory is there"),
        (lambda path: Path(path).touch(), "a file that is no socket is there"),
        (lambda path: os.symlink(f"{path} nowhere", path), os.strerror(errno.EADDRINUSE)),
    ],
    ids=["directory", "file", "link to nothing"],
)
def test_what_stands_at_a_unix_path_is_told(
    told: Told, tmp_path: Path, unix_path: str, make: Callable[[str], object], text: str
) -> None:
    path = f"{unix_path} x"
    make(path)
    is_one_line(told("serve", f"unix:{path}"), 1, f"cannot listen on unix:{path}: {text}\n")


@pytest.mark.parametrize(
    ("option", "constant"),
    [
        (["--reuse-port"], "SO_REUSEPORT"),
        (["--exclusive"], "SO_EXCLUSIVEADDRUSE"),
        (["--defer-accept", "1"], "TCP_DEFER_ACCEPT"),
    ],
)
def test_an_option_that_the_system_lacks_is_named(told: Told, option: list[str], constant: str) -> None:
    if hasattr(socket, constant):
        pytest.skip(f"this system has {constant}")
    is_one_line(told("serve", "127.0.0.1:1", *option), 2, constant)


def test_unix_sockets_that_the_system_lacks_are_named(told: Told) -> None:
    if hasattr(socket, "AF_UNIX"):
        pytest.skip("this system has AF_UNIX")
    is_one_line(told("serve", "unix:/x"), 2, "AF_UNIX")


def test_a_port_in_use_names_the_process_that_holds_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        for host in ("127.0.0.1", "localhost", ""):
            done = run("serve", f"{host}:{port}")
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith(f"fastlisten: cannot listen on {host}:{port}: ")
            assert done.stderr.count("\n") == 1
            if sys.platform == "linux":
                assert f"in use by {own_name()} (process {os.getpid()})" in done.stderr


@needs("unix sockets")
def test_a_unix_path_in_use_names_the_process_that_holds_it(
    unix_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"{unix_path} x"
    with socket.socket(socket.AF_UNIX) as holder:
        holder.bind(path)
        holder.listen()
        done = run("serve", f"unix:{path}")
        monkeypatch.setattr("fastlisten.__main__.holder_of", lambda _: None)  # another user's
        assert main(["serve", f"unix:{path}"]) == 1
        line = f"fastlisten: cannot listen on unix:{path}: {os.strerror(errno.EADDRINUSE)}\n"
        assert capsys.readouterr().err == line
    assert done.returncode == 1
    assert done.stderr.startswith(f"fastlisten: cannot listen on unix:{path}: ")
    if sys.platform == "linux":
        assert f"in use by {own_name()} (process {os.getpid()})" in done.stderr
    # A path that nobody holds any more is in use all the same, and no process is named.
    text = "a socket is there on which nobody listens any more: remove it"
    is_one_line(run("serve", f"unix:{path}"), 1, f"cannot listen on unix:{path}: {text}\n")


@needs("Linux")
@needs("the IPv6 loopback address")
def test_an_ipv6_port_in_use_names_the_process_that_holds_it() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as holder:
        done = run("serve", str(Endpoint(*holder.getsockname()[:2])))
    assert f"in use by {own_name()} (process {os.getpid()})" in done.stderr


def own_name() -> str:
    return Path("/proc/self/comm").read_text().strip()


# --- The rest ----------------------------------------------------------------------------------


def test_hosts_prints_the_host_entry() -> None:
    entry = fastlisten.get_host_entry("localhost")
    done = run("hosts", "localhost")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split(None, 1) for line in done.stdout.splitlines()]
    assert rows[0] == ["name", entry.name]
    assert [value for label, value in rows if label == "alias"] == list(entry.aliases)
    found = [ipaddress.ip_address(value) for label, value in rows if label == "address"]
    assert found == list(entry.addresses)


def test_hosts_without_a_name_is_about_this_machine() -> None:
    try:
        entry = fastlisten.get_host_entry()
    except OSError:
        assert run("hosts").returncode == 1
        return
    values = json.loads(run("hosts", "--json").stdout)
    assert values == {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "addresses": [str(address) for address in entry.addresses],
    }


def test_version_is_the_package_s() -> None:
    from importlib.metadata import version

    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"fastlisten {version('fastlisten')}\n")


@not_under_wine("the launcher .exe that pip makes starts nothing on Wine 8")
def test_the_installed_script_is_the_same_command() -> None:
    folder = Path(sys.executable).parent
    script = shutil.which("fastlisten", path=f"{folder}{os.pathsep}{folder / 'Scripts'}")
    if script is None:
        pytest.skip("fastlisten is importable but not installed")
    done = subprocess.run([script, "hosts", "--json", "127.0.0.1"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("hosts", "--json", "127.0.0.1").stdout


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["hosts", "--help"]])
def test_help_is_there(told: Told, arguments: list[str]) -> None:
    done = told(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: fastlisten" in done.stdout


def test_help_names_every_option_of_bind_and_serve(told: Told) -> None:
    text = told("serve", "--help").stdout
    names = [
        *inspect.signature(fastlisten.bind).parameters,
        *inspect.signature(fastlisten.Listener.serve).parameters,
    ]
    options = set(names) - {"endpoint", "self", "handler", "on_error"}
    assert len(options) == 14
    for name in options:
        assert f"--{name.replace('_', '-')} " in text.replace("\n", " ").replace("]", " ")
