"""The arguments of the command: help, and mistakes in one clear line."""

import errno
import functools
import inspect
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastlisten
from fastlisten import Endpoint
from fastlisten.cli import main
from helpers import LIMIT, LOOPBACK, NOBODYS, NOWHERE, connect, needs, posix_only, under_wine
from helpers.command import COMMAND, is_one_line, run

Told = Callable[..., "subprocess.CompletedProcess[str]"]


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
    options = set(names) - {"endpoint", "self", "handler", "on_error", "ssl", "watchdog", "admission"}
    assert len(options) == 18
    for name in options:
        assert f"--{name.replace('_', '-')} " in text.replace("\n", " ").replace("]", " ")


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
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
        (["serve", "--thread", "4"], 2, "unrecognized arguments: --thread"),
        (["serve", "--backlog", "many"], 2, "--backlog: 'many' is not a number from 0 on"),
        (["serve", "--backlog", "9" * 11], 2, f"--backlog: '{'9' * 11}' is too large: the most is 999999999"),
        (["serve", ":0", "os:getpid"], 2, "handler 'os:getpid' cannot be called with a connection and no"),
        (["serve", ":0", "own:two"], 2, "nothing else: missing a required argument: 'address'"),
        (["serve", "--max-connections", "0"], 2, "'0' is not a number from 1 on"),
        (["serve", "--workers", "x"], 2, "'x' is not a number from 1 on, nor auto"),
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
    (tmp_path / "own.py").write_text("def two(connection, address): pass\n")
    is_one_line(told(*arguments), status, text)


def test_without_arguments_there_is_help(told: Told) -> None:
    done = told()
    assert (done.returncode, done.stdout) == (2, "")
    assert "serve     listen at an endpoint" in done.stderr


def test_help_of_serve_has_examples(told: Told) -> None:
    assert "\n  fastlisten serve :8080 http --workers auto " in told("serve", "--help").stdout


@needs("Linux")
@pytest.mark.parametrize("arguments", [["--version"], ["serve", "--help"], ["hosts", "127.0.0.1"]])
def test_what_cannot_be_written_is_no_success(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT
        )
    line = "fastlisten: cannot write to stdout: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_the_process_passes_line_and_status_on() -> None:
    is_one_line(run("serve", "nowhere"), 2, "'nowhere' is not an endpoint")
    is_one_line(run("hosts", NOWHERE), 1, "cannot look up")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["serve", "11000"], "the port is missing; "),
        (["serve", "11000"], "; is :11000 meant?"),
        (["serve", "127.0.0.1"], "; is 127.0.0.1:11000 meant?"),
        (["serve", "fe80::1:80"], "; is [fe80::1]:80 meant?"),
        (["serve", "::1"], "; is [::1]:11000 meant?"),
        (["serve", "ech"], "; is the handler echo meant? it follows an endpoint: 127.0.0.1:11000 echo"),
        (["serve", "unix:"], "systemd:name or inetd:\n"),
        (["serve", ":0", "--busy", "reset"], "--busy needs --pending"),
        (["serve", "--port", "80"], "unrecognized arguments: --port (see fastlisten serve --help)"),
        (["hosts", "a", "b"], "unrecognized arguments: b (see fastlisten hosts --help)"),
        (["serve", ":0", "--threads", "0,3"], "'0,3' has a minimum below 1"),
        (["serve", ":0", "--threads", "0,0"], "'0,0' has a minimum below 1"),
        (["serve", ":0", "--pending", "3"], "--pending needs --busy"),
        (["serve", ":0", "--proxy-timeout", "3"], "--proxy-timeout needs --proxy"),
        (["serve", ":0", "--proxy-optional"], "--proxy-optional needs --proxy"),
        (["serve", ":0", "--proxy", "10.0.0.1/8"], "--proxy: 10.0.0.1/8 has host bits set"),
        (["serve", ":0", "--proxy", "::1", "--proxy-timeout", "0"], "--proxy-timeout must be above 0"),
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
        monkeypatch.setattr("fastlisten.cli.failures.holder_of", lambda _: None)  # another user's
        assert main(["serve", f"unix:{path}"]) == 1
        line = f"fastlisten: cannot listen on unix:{path}: {os.strerror(errno.EADDRINUSE)}\n"
        assert capsys.readouterr().err == line
    assert done.returncode == 1
    assert done.stderr.startswith(f"fastlisten: cannot listen on unix:{path}: ")
    if sys.platform == "linux":
        assert f"in use by {own_name()} (process {os.getpid()})" in done.stderr
    # A path that nobody holds any more is in use all the same, and no process is named.
    text = "a socket is there on which nobody listens any more: remove it, or use --replace-stale"
    is_one_line(run("serve", f"unix:{path}"), 1, f"cannot listen on unix:{path}: {text}\n")


@needs("Linux")
@needs("the IPv6 loopback address")
def test_an_ipv6_port_in_use_names_the_process_that_holds_it() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as holder:
        done = run("serve", str(Endpoint(*holder.getsockname()[:2])))
    assert f"in use by {own_name()} (process {os.getpid()})" in done.stderr


def own_name() -> str:
    return Path("/proc/self/comm").read_text().strip()


@needs("Linux")
@needs("the IPv6 loopback address")
def test_a_link_local_address_without_its_interface_is_told(told: Told) -> None:
    text = r"a link-local address needs its interface, as in \[fe80::1%\w+\]:80\n"
    done = told("serve", "[fe80::1]:80")
    assert done.returncode == 1
    assert re.fullmatch(rf"fastlisten: cannot listen on \[fe80::1\]:80: {text}", done.stderr)


@posix_only("descriptors that are inherited")
def test_a_descriptor_of_a_connection_is_told() -> None:
    with socket.create_server(LOOPBACK) as listener, connect(listener.getsockname()):
        accepted = listener.accept()[0]
        with accepted:
            text = f"cannot listen on fd:{accepted.fileno()}: it is a connection, not a listening socket"
            done = run("serve", f"fd:{accepted.fileno()}", pass_fds=[accepted.fileno()])
            is_one_line(done, 1, text)


@needs("unix sockets")
def test_a_path_that_is_too_long_is_told_with_the_limit(told: Told) -> None:
    most = 107 if sys.platform == "linux" else 103
    is_one_line(told("serve", f"unix:/{'x' * 199}"), 1, f": 200 bytes, of at most {most}\n")
