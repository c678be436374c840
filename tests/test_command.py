"""The command line serves, answers and says what it is."""

import ipaddress
import json
import os
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fastlisten
from fastlisten import Endpoint
from helpers import LIMIT, connect, exchange, needs, not_under_wine, posix_only, read_all
from helpers.command import LISTENING, run, serve


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
        with connect(server.target) as one, connect(server.target) as other:
            one.sendall(b"y")  # before that it does not count
            other.sendall(b"z")
            told = select.select([one, other], [], [], LIMIT)[0]  # which is seen first is the poller's affair
            assert len(told) == 1
            assert read_all(told[0]) == "HTTP/1.1 503 Service Unavailable\r\n\r\né".encode()


def test_a_handler_that_raises_is_logged_and_counted() -> None:
    with serve("127.0.0.1:0", "json:loads", "--json", "--first-bytes", "0") as server:
        assert exchange(server.target, b"") == b""
        stats = json.loads(server.line())
        assert (stats["event"], stats["handler_errors"], stats["accepted"]) == ("stats", 1, 1)
        server.process.kill()
        errors = server.process.communicate(timeout=LIMIT)[1]
        assert "ERROR fastlisten:" in errors
        assert "TypeError" in errors


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
