"""The command under a service manager: what it tells, and the sockets that it is passed."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastlisten import Listener
from helpers import LIMIT, connect, exchange, needs, own_loopback, posix_only, wait_until
from helpers.command import COMMAND, serve
from helpers.managers import Manager, manager
from helpers.probes import inetd
from helpers.programs import ROOT, line_of, plain_environment, run, running, sanitizers

pytestmark = [needs("unix sockets"), posix_only("there are no datagrams between unix sockets")]


@pytest.fixture
def at_path(unix_path: str) -> Iterator[Manager]:
    with manager(unix_path) as at_path:
        yield at_path


# --- what is told ---------------------------------------------------------------------------------


def test_the_command_says_that_it_listens_and_that_it_drains(at_path: Manager) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": at_path.address, "WATCHDOG_USEC": "100000"}
    with serve("127.0.0.1:0", env=environment) as server:
        ready, status = at_path.message()
        assert (ready, status) == ("READY=1", f"STATUS=listening on {server.endpoint}")
        assert at_path.message() == ["WATCHDOG=1"]
        assert exchange(server.target) == b"ping"
        with connect(server.target) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            server.process.send_signal(signal.SIGTERM)
            assert at_path.message_with("STOPPING=1")[1:] == ["STATUS=draining for at most 5 s"]
            server.line_with("draining")
        _, errors = server.process.communicate(timeout=LIMIT)
        assert (server.process.returncode, errors) == (0, "")


def test_ctrl_c_is_the_end_too(at_path: Manager) -> None:
    with serve("127.0.0.1:0", env={**os.environ, "NOTIFY_SOCKET": at_path.address}) as server:
        at_path.message_with(f"STATUS=listening on {server.endpoint}")
        status, _, errors = server.end(signal.SIGINT)
        assert (status, errors) == (130, "")
        assert at_path.message() == ["STOPPING=1"]


@pytest.mark.parametrize(
    ("address", "reason"),
    [("vsock:2:1", "NOTIFY_SOCKET must be"), ("/no/such/socket", os.strerror(2))],
)
def test_a_manager_that_cannot_be_told_ends_no_service(address: str, reason: str) -> None:
    with serve("127.0.0.1:0", env={**os.environ, "NOTIFY_SOCKET": address}) as server:
        assert exchange(server.target) == b"ping"
        status, _, errors = server.end(signal.SIGTERM)
    assert status == 0
    assert errors.startswith(f"fastlisten: the service manager is not told: {reason}")
    assert errors.count("\n") == 1


def test_nothing_is_told_of_what_cannot_be_bound(at_path: Manager, listener: Listener) -> None:
    command = [*COMMAND, "serve", str(listener.endpoint)]
    environment = {**os.environ, "NOTIFY_SOCKET": at_path.address}
    run(command, environment=environment, status=1)
    assert at_path.tells_nothing()


# --- systemd's sockets ----------------------------------------------------------------------------

systemd = needs("systemd-socket-activate (Debian's package systemd)")


@contextlib.contextmanager
def activated(
    *options: str, command: list[str], listening: int = 1, **environment: str
) -> Iterator["subprocess.Popen[str]"]:
    """Run a command under systemd-socket-activate, which starts it for the first client, in its own place.

    It passes on little of the environment, and logs on stderr.
    """
    passed_on = {"PYTHONPATH": plain_environment()["PYTHONPATH"], **sanitizers(), **environment}
    variables = [f"--setenv={name}={value}" for name, value in passed_on.items()]
    with running(["systemd-socket-activate", *options, *variables, *command]) as process:
        assert process.stderr is not None
        while listening:
            line = process.stderr.readline()
            assert line, "it has ended"
            listening -= line.startswith("Listening on ")
        yield process


def sockets_of(pid: int) -> dict[str, list[int]]:
    """Return the sockets of a process and their descriptors; proc_pid_fd(5)."""
    found: dict[str, list[int]] = {}
    for number in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):
        with contextlib.suppress(OSError):  # it was closed meanwhile
            link = os.readlink(f"/proc/{pid}/fd/{number}")
            if link.startswith("socket:"):
                found.setdefault(link, []).append(number)
    return found


@systemd
@pytest.mark.parametrize("inet", [True, False])
def test_the_socket_of_systemd_is_served(inet: bool, unix_path: str, unix_paths: Path) -> None:
    target: Any = unix_path
    address, endpoint = unix_path, f"unix:{unix_path}"
    if inet:
        with socket.create_server((own_loopback(), 0)) as probe:
            target = probe.getsockname()
        endpoint = address = "{}:{}".format(*target)
    with (
        manager(str(unix_paths / "notify")) as told,
        activated(
            f"--listen={address}", command=[*COMMAND, "serve", "systemd:"], NOTIFY_SOCKET=told.address
        ) as process,
    ):
        assert exchange(target, b"first") == b"first"
        assert told.message() == ["READY=1", f"STATUS=listening on {endpoint}"]
        assert line_of(process) == f"listening on {endpoint}"
        with connect(target) as client:
            client.sendall(b"second")
            assert client.recv(100) == b"second"
            assert [3] in sockets_of(process.pid).values()
            process.send_signal(signal.SIGTERM)
            assert told.message()[0] == "STOPPING=1"
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        assert process.wait(LIMIT) == 0
    assert inet or os.path.exists(unix_path)


@systemd
def test_the_socket_of_systemd_by_its_name(unix_paths: Path) -> None:
    web, admin = str(unix_paths / "web"), str(unix_paths / "admin")
    options = [f"--listen={web}", f"--listen={admin}", "--fdname=web:admin"]
    with activated(*options, command=[*COMMAND, "serve", "systemd:admin"], listening=2) as process:
        assert exchange(admin, b"admin") == b"admin"
        assert line_of(process) == f"listening on unix:{admin}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0


@systemd
@pytest.mark.parametrize(
    ("options", "endpoint", "status", "text"),
    [
        ((), "systemd:web", 1, "no socket 'web' was passed: there are 'unknown'"),
        (("--fdname=api",), "systemd:web", 1, "no socket 'web' was passed: there are 'api'"),
        (("--listen={}2",), "systemd:", 2, "means 2 sockets, and one is taken by its name"),
        (("--seqpacket",), "systemd:", 2, "is not a stream socket: descriptor 3 is SOCK_SEQPACKET"),
        ((), "inetd:", 1, f"cannot listen on inetd:: {os.strerror(88)}: inetd: is descriptor 0"),
    ],
)
def test_a_socket_that_does_not_fit(
    options: tuple[str, ...], endpoint: str, status: int, text: str, unix_path: str
) -> None:
    given = [f"--listen={unix_path}", *(option.format(unix_path) for option in options)]
    listening = sum(option.startswith("--listen") for option in given)
    kind = socket.SOCK_SEQPACKET if "--seqpacket" in options else socket.SOCK_STREAM
    command = [*COMMAND, "serve", endpoint]
    with activated(*given, command=command, listening=listening) as process:
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.connect(unix_path)
            assert process.wait(LIMIT) == status
        assert process.stderr is not None
        told = process.stderr.read()
        assert told.splitlines()[-1].startswith("fastlisten: cannot listen on ")
        assert text in told


@systemd
@pytest.mark.parametrize("form", ["systemd:", "inetd:"])
def test_one_client_of_systemd_is_served(form: str, unix_path: str) -> None:
    given = ["--accept", f"--listen={unix_path}", *(["--inetd"] if form == "inetd:" else [])]
    with activated(*given, command=[*COMMAND, "serve", form]):
        for word in (b"one", b"two"):
            assert exchange(unix_path, word) == word


@systemd
def test_options_for_listening_do_not_fit_one_client(unix_path: str) -> None:
    command = [*COMMAND, "serve", "--backlog", "5", "systemd:"]
    with activated("--accept", f"--listen={unix_path}", command=command) as process:
        assert exchange(unix_path, b"") == b""
        assert process.stderr is not None
        while not (line := process.stderr.readline()).startswith("fastlisten: "):
            assert line
        assert "--backlog is for listening, and systemd: is a client's connection" in line


# --- inetd's sockets ------------------------------------------------------------------------------

# Says which process it is, then what it hears.
HANDLER = """
import os
def handler(connection):
    connection.sendall(b"%d\\n" % os.getpid())
    print("never to a client", flush=True)
    while data := connection.recv(100):
        connection.sendall(data)
"""


@pytest.fixture
def served_by_inetd(unix_paths: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the path at which inetd has the command started, in this way: wait or nowait."""
    import pwd  # not on Windows

    path, settings = unix_paths / "s", unix_paths / "inetd.conf"
    (unix_paths / "handlers.py").write_text(HANDLER)
    user = pwd.getpwuid(os.getuid()).pw_name
    program = inetd()
    assert program is not None
    words = [str(path), "stream", "unix", request.param, user, sys.executable, *COMMAND]
    settings.write_text(" ".join([*words, "serve", "inetd:", "handlers:handler"]) + "\n")
    environment = plain_environment()
    environment["PYTHONPATH"] += f":{unix_paths}"
    with running([program, "-i", "-E", str(settings)], environment=environment) as process:
        wait_until(lambda: listens(str(path)))
        yield str(path)
        process.terminate()
        process.wait(LIMIT)


def listens(path: str) -> bool:
    """Tell whether somebody listens at a path, without a connection; proc_net(5), and SO_ACCEPTCON."""
    with open("/proc/net/unix") as sockets:
        lines = [line.split() for line in sockets]
    return any(line[3] == "00010000" and line[7:] == [path] for line in lines)


def talk(path: str) -> int:
    """Have one exchange and return the process that has served it."""
    pid, said = exchange(path, b"hello").split(b"\n")
    assert said == b"hello"
    return int(pid)


@needs("inetd (Debian's package openbsd-inetd), and root for it")
@pytest.mark.parametrize("served_by_inetd", ["nowait"], indirect=True)
def test_inetd_starts_a_process_for_each_client(served_by_inetd: str) -> None:
    processes = {talk(served_by_inetd) for _ in range(3)}
    assert len(processes) == 3
    wait_until(lambda: not any(map(is_running, processes)))


@needs("inetd (Debian's package openbsd-inetd), and root for it")
@pytest.mark.parametrize("served_by_inetd", ["wait"], indirect=True)
def test_inetd_hands_its_listening_socket_over(served_by_inetd: str) -> None:
    [pid] = {talk(served_by_inetd) for _ in range(3)}
    try:
        assert [len(numbers) for numbers in sockets_of(pid).values()].count(3) == 0  # 0, 1 and 2 were one
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_running(pid))
    again = talk(served_by_inetd)  # inetd has its socket back, and the path is there
    assert again != pid
    os.kill(again, signal.SIGTERM)
    wait_until(lambda: not is_running(again))


def is_running(pid: int) -> bool:
    """Tell whether a process is there that is not a zombie; proc_pid_stat(5)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it has ended before, or while it was read
        return False


# --- the units of SYSTEMD.md ----------------------------------------------------------------------

INSTALLED = "/opt/echo/bin/fastlisten"


def units() -> dict[str, str]:
    """Return the texts of the units, by their files' names."""
    document = ROOT / "SYSTEMD.md"
    if not document.exists():
        pytest.skip("needs the sources, and the package is installed")
    text = document.read_text(encoding="utf-8")
    return dict(re.findall(r"`/etc/systemd/system/(\S+)`:\n\n```ini\n(.*?)```", text, re.DOTALL))


def setting(unit: str, name: str) -> str:
    found = re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs the systemd-analyze command")
def test_the_units_are_right(tmp_path: Path) -> None:
    found = units()
    assert sorted(found) == ["echo.service", "echo.socket"]
    command = tmp_path / "fastlisten"  # it has to be there, and be a program
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    for name, text in found.items():
        (tmp_path / name).write_text(text.replace(INSTALLED, str(command)))
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    verified = run(
        ["systemd-analyze", "verify", *(str(tmp_path / name) for name in found)], environment=environment
    )
    told = [line for line in verified.stderr.splitlines() if "echo" in line or str(tmp_path) in line]
    assert told == []


@systemd
def test_the_units_serve(unix_path: str) -> None:
    found = units()
    assert INSTALLED in setting(found["echo.service"], "ExecStart")
    _, *arguments = shlex.split(setting(found["echo.service"], "ExecStart"))
    assert setting(found["echo.service"], "Type") == "notify"
    with socket.create_server((own_loopback(), 0)) as probe:
        target = probe.getsockname()
    options = [
        "--listen={}:{}".format(*target),
        f"--fdname={setting(found['echo.socket'], 'FileDescriptorName')}",
    ]
    with (
        manager(unix_path) as told,
        activated(
            *options,
            command=[*COMMAND, *arguments],
            NOTIFY_SOCKET=told.address,
            WATCHDOG_USEC=str(200_000),
        ) as process,
    ):
        assert exchange(target, b"units") == b"units"
        assert told.message() == ["READY=1", "STATUS=listening on {}:{}".format(*target)]
        assert told.message() == ["WATCHDOG=1"]
        process.send_signal(signal.SIGTERM)
        told.message_with("STOPPING=1")
        assert process.wait(LIMIT) == 0
