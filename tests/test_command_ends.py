"""How the command ends: signals, Ctrl-C, a closed stdout."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import LIMIT, connect, exchange, nobody_listens, posix_only, read_all, wait_until
from helpers.command import COMMAND, Server, is_one_line, serve, signals


@signals
@pytest.mark.parametrize(("name", "threads"), [("SIGTERM", "0"), ("SIGTERM", "4"), ("SIGHUP", "4")])
def test_a_signal_lets_the_client_finish_and_tells_so(name: str, threads: str) -> None:
    with (
        serve("127.0.0.1:0", "--threads", threads) as server,
        connect(server.target) as client,
    ):
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        server.process.send_signal(getattr(signal, name))
        server.line_with(f"{name}: draining for at most 5 s")
        client.sendall(b"b")
        assert client.recv(1) == b"b"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        output, errors = server.process.communicate(timeout=LIMIT)
    assert (server.process.returncode, errors) == (0, "")
    assert output.splitlines()[-1] == (
        f"stopped by {name}: 1 connection finished, 0 cut; 1 accepted, 1 handled"
    )


@signals
def test_nohup_keeps_a_hangup_from_it() -> None:
    nohup = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *COMMAND, "serve", "127.0.0.1:0"]
    with subprocess.Popen(nohup, stdout=subprocess.PIPE, text=True) as process:
        server = Server(process, as_json=False)
        process.send_signal(signal.SIGHUP)
        assert exchange(server.target) == b"ping"
        assert server.end(signal.SIGTERM)[0] == 0


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
def test_who_comes_while_it_drains_is_refused() -> None:
    with draining() as server:
        wait_until(lambda: nobody_listens(server.target))
        status, output, errors = server.end(signal.SIGTERM)
    assert (status, errors) == (0, "")
    assert "0 connections finished, 1 cut" in output[-1]


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
