"""What differs between systems: each difference by its name, on the system that has it."""

import contextlib
import errno
import os
import signal
import socket
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastlisten
from fastlisten._core.state import queue
from helpers import connect, echo, exchange, needs, serving, wait_until
from helpers.command import COMMAND
from helpers.programs import run

WINDOWS = os.name == "nt"
on_windows = pytest.mark.skipif(not WINDOWS, reason="what Windows does")
on_posix = pytest.mark.skipif(WINDOWS, reason="what POSIX does")

# bind()'s options that not every system has, and what they are called there.
OPTIONAL = [
    ("reuse_port", True, "SO_REUSEPORT"),
    ("exclusive", True, "SO_EXCLUSIVEADDRUSE"),
    ("defer_accept", 1, "TCP_DEFER_ACCEPT"),
    ("fast_open", 5, "TCP_FASTOPEN"),
]

opened: list[object] | None = None


def note_socket(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.__new__" and opened is not None:
        opened.append(arguments)


sys.addaudithook(note_socket)  # audit hooks cannot be removed: this one listens only when asked


@contextlib.contextmanager
def no_socket_opens() -> Iterator[None]:
    global opened
    opened = []
    try:
        yield
        assert opened == []
    finally:
        opened = None


def blocks(sock: socket.socket) -> bool:
    """Tell whether the descriptor itself is in blocking mode; Python's timeout may say otherwise."""
    if not WINDOWS:
        return os.get_blocking(sock.fileno())
    # Winsock lets nobody ask. A blocking socket runs into its time limit, another one returns.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 20)  # type: ignore[attr-defined,unused-ignore]
    raw = socket.socket(fileno=sock.fileno())  # whose recv() makes one call when it has no timeout
    try:
        raw.recv(1)
    except OSError as error:
        code = error.winerror  # type: ignore[attr-defined,unused-ignore]
        assert code in (10060, 10035)  # WSAETIMEDOUT, WSAEWOULDBLOCK
        return bool(code == 10060)
    finally:
        raw.detach()
    raise AssertionError("nothing was sent")


def inheritable(fd: int) -> bool:
    return os.get_handle_inheritable(fd) if WINDOWS else os.get_inheritable(fd)  # type: ignore[attr-defined,unused-ignore]


def accepted(listener: fastlisten.Listener, how: str) -> socket.socket:
    """Accept one client of a listener in one of the ways that there are."""
    if how == "accept":
        return listener.accept()[0]
    if how == "accept_many":
        return listener.accept_many()[0].socket()
    taken: list[socket.socket] = []

    def take(connection: fastlisten.Connection) -> None:
        taken.append(connection.socket())
        listener.stop()

    listener.serve(take, threads=2 if how == "threads" else 0, busy="reset" if how == "busy" else None)
    return taken[0]


WAYS = ["accept", "accept_many", "serve", "threads", "busy"]


@pytest.mark.parametrize("how", WAYS)
def test_what_is_accepted_blocks_whatever_the_listener_does(how: str) -> None:
    """Linux hands no mode down, BSD and Winsock do; the standard library always sets it."""
    with fastlisten.bind("127.0.0.1:0") as listener:
        listener.settimeout(5)  # the descriptor is non-blocking, and accept waits
        with connect(listener), accepted(listener, how) as sock:
            assert sock.gettimeout() is None
            assert blocks(sock)


@pytest.mark.parametrize("how", WAYS)
def test_what_is_accepted_has_the_default_timeout(how: str) -> None:
    with fastlisten.bind("127.0.0.1:0") as listener, connect(listener):
        socket.setdefaulttimeout(5)
        try:
            sock = accepted(listener, how)
        finally:
            socket.setdefaulttimeout(None)
        with sock:
            assert sock.gettimeout() == 5
            assert not blocks(sock)


@pytest.mark.parametrize("how", WAYS)
def test_what_is_accepted_is_not_inherited(how: str) -> None:
    with fastlisten.bind("127.0.0.1:0") as listener, connect(listener):
        with accepted(listener, how) as sock:
            assert not inheritable(sock.fileno())
        assert not inheritable(listener.fileno())


def test_the_wake_up_is_not_inherited() -> None:
    with fastlisten.bind("127.0.0.1:0") as listener:
        assert not inheritable(listener._state.open_waker())


@pytest.mark.parametrize(("option", "value", "constant"), OPTIONAL)
def test_an_option_the_system_lacks_is_refused_before_a_socket_opens(
    option: str, value: object, constant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, constant, raising=False)
    options: dict[str, Any] = {option: value}
    expected = f"{option}: {constant} not supported on this platform"
    with no_socket_opens(), pytest.raises(ValueError, match=expected):
        fastlisten.bind(("127.0.0.1", 11000), **options)
    with no_socket_opens(), pytest.raises(ValueError, match=expected):
        fastlisten.serve(echo, ("127.0.0.1", 11000), **options)


LACKING = ({"SO_REUSEPORT", "TCP_DEFER_ACCEPT", "AF_UNIX"} if WINDOWS else {"SO_EXCLUSIVEADDRUSE"}) | (
    set() if sys.platform == "linux" else {"TCP_DEFER_ACCEPT"}
)


@pytest.mark.parametrize("name", [constant for *_, constant in OPTIONAL] + ["AF_UNIX"])
def test_the_system_lacks_what_the_documentation_says(name: str) -> None:
    assert hasattr(socket, name) == (name not in LACKING)


@on_windows
def test_windows_has_no_unix_sockets_and_the_error_is_the_standard_library_s() -> None:
    with pytest.raises(AttributeError) as expected:
        socket.AF_UNIX  # noqa: B018
    for path in ("unix:C:/a.sock", "unix:@abstract"):
        with no_socket_opens(), pytest.raises(AttributeError) as caught:
            fastlisten.bind(path)
        assert str(caught.value) == str(expected.value)


@on_windows
def test_windows_has_no_reuse_port_and_the_error_is_the_standard_library_s() -> None:
    with pytest.raises(ValueError, match="SO_REUSEPORT") as expected:
        socket.create_server(("127.0.0.1", 0), reuse_port=True)
    with pytest.raises(ValueError, match="SO_REUSEPORT") as caught:
        fastlisten.create_server(("127.0.0.1", 0), reuse_port=True)
    assert str(caught.value) == str(expected.value)


@pytest.mark.skipif(hasattr(os, "fork"), reason="this system can fork")
def test_without_fork_no_other_program_is_a_worker() -> None:
    done = run([*COMMAND, "workers", "--bind", "127.0.0.1:0", "--", sys.executable], status=2)
    assert "programs as workers are not supported on this platform: serve --workers" in done.stderr


@on_windows
def test_windows_has_no_sendmsg_and_the_error_is_the_standard_library_s() -> None:
    with fastlisten.bind(("127.0.0.1", 0)) as listener, connect(listener) as client:
        [connection] = listener.accept_many()
        with connection:
            for end in (client, connection):
                with pytest.raises(AttributeError, match="'sendmsg'"):
                    end.sendmsg([b"x"])


@on_windows
def test_reuse_address_is_never_set_on_windows() -> None:
    """There it lets another process steal the port."""
    for listener in (
        fastlisten.bind(("127.0.0.1", 0)),
        fastlisten.create_server(("127.0.0.1", 0)),
    ):
        with listener:
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0


@on_posix
def test_reuse_address_is_set_on_posix() -> None:
    for listener in (
        fastlisten.bind(("127.0.0.1", 0)),
        fastlisten.create_server(("127.0.0.1", 0)),
    ):
        with listener:
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) != 0


@on_windows
def test_exclusive_keeps_others_from_the_port() -> None:
    option: int = socket.SO_EXCLUSIVEADDRUSE  # type: ignore[attr-defined,unused-ignore]
    with fastlisten.bind(("127.0.0.1", 0), exclusive=True) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, option) != 0
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(PermissionError):
                thief.bind(listener.getsockname())


def details(error: OSError) -> tuple[object, ...]:
    return type(error), error.args[:2], error.errno, getattr(error, "winerror", None)


def raised(function: Any, *arguments: Any) -> OSError:
    with pytest.raises(OSError) as caught:  # noqa: PT011   # its details get compared
        function(*arguments)
    return caught.value


def test_errors_are_translated_as_the_standard_library_does() -> None:
    """On Windows that gives `winerror`, from CPython's own table; nowhere is there one of ours."""
    with fastlisten.bind(("127.0.0.1", 0)) as listener, socket.socket() as plain:
        taken = listener.getsockname()
        assert details(raised(fastlisten.bind, taken)) == details(raised(plain.bind, taken))
        for sock in (listener, plain):
            sock.setblocking(False)
        with socket.create_server(("127.0.0.1", 0)) as model:
            model.setblocking(False)
            expected = details(raised(model.accept))
            assert expected[0] is BlockingIOError
            assert details(raised(listener.accept)) == expected
            assert details(raised(listener.accept_many)) == expected
        expected = details(raised(model.accept))
    for call in (listener.accept, listener.accept_many, lambda: listener.serve(echo)):
        assert details(raised(call)) == expected
    if WINDOWS:
        assert expected[3] == 10038  # WSAENOTSOCK
    else:
        assert expected[2] == errno.EBADF


def test_errors_of_a_connection_are_translated_too() -> None:
    with fastlisten.bind(("127.0.0.1", 0)) as listener, connect(listener) as client:
        [connection] = listener.accept_many()
        connection.setblocking(False)
        client.setblocking(False)
        expected = details(raised(client.recv, 1))
        assert details(raised(connection.recv, 1)) == expected
        connection.close()
        client.close()
        expected = details(raised(client.recv, 1))
        for call in (connection.recv, connection.shutdown):
            assert details(raised(call, 1)) == expected
        assert details(raised(connection.sendall, b"x")) == expected


@on_windows
def test_a_handle_has_64_bits() -> None:
    assert queue(2**40 + 4) == (None, None)  # no OverflowError, and the system tells nothing


@pytest.mark.parametrize("threads", [0, 2])
def test_control_c_ends_an_idle_serve(threads: int) -> None:
    """Winsock's poll is not interrupted by signals: the interpreter has to ring our wake-up."""
    with fastlisten.bind("127.0.0.1:0") as listener:

        def press() -> None:
            assert exchange(listener) == b"ping"
            wait_until(lambda: listener.stats().active == 0)
            signal.raise_signal(signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                listener.serve(echo, threads=threads)
        finally:
            presser.join()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_timeout_set_while_serving_does_not_block_the_loop(threads: int) -> None:
    with fastlisten.bind("127.0.0.1:0") as listener:
        with serving(listener, echo, threads=threads) as served:
            assert exchange(listener) == b"ping"
            listener.settimeout(None)
            assert exchange(listener) == b"ping"
            listener.stop()
            served.wait()
        assert listener.gettimeout() is None


@needs("a free-threaded interpreter")
def test_the_gil_stays_off() -> None:
    """An extension that does not declare itself safe makes the import turn it on, with a warning."""
    code = "import sys, fastlisten; sys.exit(sys._is_gil_enabled())"
    run(code)
    assert sysconfig.get_config_var("Py_GIL_DISABLED")


@pytest.mark.parametrize(
    ("pretend", "message"),
    [
        ("import platform; platform.python_implementation = lambda: 'PyPy'", "fastlisten needs CPython"),
        ("import struct; struct.calcsize = lambda _: 4", "fastlisten needs a 64-bit Python"),
    ],
    ids=["PyPy", "32 bits"],
)
def test_the_build_refuses_what_was_never_run_and_says_so(pretend: str, message: str) -> None:
    setup = Path(__file__).parent.parent / "setup.py"
    code = f"{pretend}; import runpy; runpy.run_path({str(setup)!r})"
    done = run(code, status=1)
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
