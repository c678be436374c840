"""Sockets that another program has opened: LISTEN_FDS of sd_listen_fds(3), and inetd's descriptor 0."""

import asyncio
import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import fastlisten
from fastlisten import Listener, _inherited, bind, inherited, socketserver
from helpers import LOOPBACK, Serving, connect, echo, exchange, needs, posix_only, reset, serving, wait_until
from helpers.programs import python, running
from helpers.server import is_open

pytestmark = posix_only("descriptors are inherited by number")

FIRST = 200  # in place of 3, which the tests' own process has a file at


class Passed:
    """Descriptors that were passed to this process, from FIRST on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: contextlib.ExitStack) -> None:
        self._monkeypatch = monkeypatch
        self._files = files
        monkeypatch.setattr(_inherited, "FIRST", FIRST)

    def __call__(self, *sockets: Any, names: str | None = None, **variables: str) -> None:
        """Pass duplicates of these; what nobody takes is closed at the end."""
        found = {"LISTEN_FDS": str(len(sockets)), "LISTEN_PID": str(os.getpid())}
        if names is not None:
            found["LISTEN_FDNAMES"] = names
        for name, value in (found | variables).items():
            self._monkeypatch.setenv(name, value)
        for number, sock in enumerate(sockets, FIRST):
            os.dup2(sock.fileno(), number, inheritable=True)
            self._files.callback(close_if_open, number)


def close_if_open(number: int) -> None:
    with contextlib.suppress(OSError):
        os.close(number)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Passed]:
    with contextlib.ExitStack() as files:
        yield Passed(monkeypatch, files)
        _inherited._passed.clear()


@pytest.fixture
def made() -> Iterator[socket.socket]:
    """Give a listening socket that somebody else has made."""
    with socket.create_server(LOOPBACK, backlog=7) as made:
        yield made


@pytest.fixture
def other() -> Iterator[socket.socket]:
    with socket.create_server(LOOPBACK) as other:
        yield other


# --- taking them ----------------------------------------------------------------------------------


def test_all_are_taken_in_their_order_and_the_variables_are_unset(
    passed: Passed, made: socket.socket, other: socket.socket
) -> None:
    passed(made, other, names="a:b")
    listeners = inherited()
    try:
        assert [type(listener).__mro__[1] for listener in listeners] == [Listener, Listener]
        assert [listener.getsockname() for listener in listeners] == [made.getsockname(), other.getsockname()]
        assert [listener.fileno() for listener in listeners] == [FIRST, FIRST + 1]
        assert not any(os.get_inheritable(listener.fileno()) for listener in listeners)
        assert not any(name.startswith("LISTEN_") for name in os.environ)
        assert inherited() == []
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize(("text", "names"), [("systemd:", None), ("systemd:web", "web"), ("systemd:", "web")])
def test_the_only_one_is_bound(passed: Passed, made: socket.socket, text: str, names: str | None) -> None:
    passed(made, names=names)
    with bind(text) as listener, serving(listener, echo):
        assert listener.getsockname() == made.getsockname()
        assert exchange(made, b"passed") == b"passed"


def test_each_is_bound_by_its_name(passed: Passed, made: socket.socket, other: socket.socket) -> None:
    passed(made, other, names="web:admin")
    with bind("systemd:admin") as admin:
        assert admin.getsockname() == other.getsockname()
        with bind("systemd:web") as web:
            assert web.getsockname() == made.getsockname()
        with pytest.raises(FileNotFoundError, match="each was taken before"):
            bind("systemd:web")


def test_who_was_not_taken_by_name_is_left_for_inherited(
    passed: Passed, made: socket.socket, other: socket.socket
) -> None:
    passed(made, other, names="web:admin")
    with bind("systemd:web"):
        [rest] = inherited()
        with rest:
            assert rest.getsockname() == other.getsockname()


def test_serve_takes_them_like_other_endpoints(passed: Passed, made: socket.socket) -> None:
    passed(made)
    with connect(made) as client:
        client.sendall(b"x")

        def handler(connection: Any) -> None:
            connection.sendall(connection.recv(1))
            raise SystemExit

        with pytest.raises(SystemExit):
            fastlisten.serve(handler, "systemd:")
        assert client.recv(1) == b"x"
    assert not is_open(FIRST)


def test_options_that_do_not_undo_anything_are_set(passed: Passed, made: socket.socket) -> None:
    passed(made)
    with bind("systemd:", keep_alive=True):
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.parametrize(
    "option", [{"backlog": 5}, {"reuse_port": True}, {"dualstack_ipv6": True}, {"mode": 0o600}]
)
@pytest.mark.parametrize("text", ["systemd:", "inetd:"])
def test_what_its_maker_has_decided_is_refused(option: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"{text}|reuse_port|mode"):
        bind(text, **option)


# --- nothing of its maker's is undone -------------------------------------------------------------


@needs("TCP_INFO of a listener")
def test_the_queue_stays_as_long_as_it_was_whoever_serves(passed: Passed, made: socket.socket) -> None:
    def limit() -> object:
        with Listener(fileno=os.dup(made.fileno())) as look:
            return look.stats().queue_limit

    passed(made)
    listener = bind("systemd:")
    listener.listen(50)
    assert limit() == 7

    class Server(socketserver.TCPServer):
        pass

    with Server(LOOPBACK, socketserver.BaseRequestHandler, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = listener
        server.server_activate()
        assert limit() == 7

    async def serve() -> None:
        passed(made)
        async with await fastlisten.aio.start_server(echo_async, sock=bind("systemd:")) as server:
            reader, writer = await asyncio.open_connection(*made.getsockname())
            writer.write(b"asyncio")
            assert await reader.read(100) == b"asyncio"
            writer.close()
            assert server.is_serving()
        assert limit() == 7

    from fastlisten import aio

    aio.run(serve())
    with connect(made) as client:  # nobody shut it down
        made.accept()[0].close()
        assert client.recv(1) == b""


async def echo_async(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read(100))
    writer.close()


def test_a_unix_path_is_not_unlinked(passed: Passed, unix_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(unix_path)
        made.listen()
        passed(made)
        with bind("systemd:") as listener, serving(listener, echo):
            assert str(listener.endpoint) == f"unix:{unix_path}"
            assert exchange(unix_path, b"path") == b"path"
        with connect(unix_path):
            made.accept()[0].close()


# --- what is wrong --------------------------------------------------------------------------------


def test_without_a_manager_there_is_none() -> None:
    assert inherited() == []
    with pytest.raises(FileNotFoundError, match="LISTEN_FDS is not set") as caught:
        bind("systemd:")
    assert caught.value.errno == errno.ENOENT


def test_those_of_another_process_stay(passed: Passed, made: socket.socket) -> None:
    passed(made, LISTEN_PID=str(os.getppid()))
    assert inherited() == []
    with pytest.raises(FileNotFoundError, match=f"for process {os.getppid()}, as LISTEN_PID says"):
        bind("systemd:")
    assert os.environ["LISTEN_FDS"] == "1"
    assert os.get_inheritable(FIRST)


@needs("Linux")
def test_those_of_an_earlier_process_of_this_number_stay(passed: Passed, made: socket.socket) -> None:
    own = _inherited._pidfd_inode()
    if own is None:
        pytest.skip("needs pidfd_open()")
    passed(made, LISTEN_PIDFDID=str(own + 1))
    assert inherited() == []
    passed(made, LISTEN_PIDFDID=str(own))
    [listener] = inherited()
    listener.close()
    assert "LISTEN_PIDFDID" not in os.environ


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"LISTEN_PID": "me"}, "LISTEN_PID must be a number, not 'me'"),
        ({"LISTEN_FDS": "two"}, "LISTEN_FDS must be a number, not 'two'"),
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS must be a number, not '-1'"),
        ({"LISTEN_FDS": "0"}, "LISTEN_FDS must be at least 1, not 0"),
        ({"LISTEN_FDS": "9" * 5000}, "LISTEN_FDS must be a number"),
        ({"LISTEN_PIDFDID": "x"}, "LISTEN_PIDFDID must be a number, not 'x'"),
        ({"LISTEN_FDNAMES": "a:b"}, "LISTEN_FDNAMES 'a:b' has 2 names for 1 descriptors"),
    ],
)
def test_variables_that_cannot_be_read(
    passed: Passed, made: socket.socket, variables: dict[str, str], text: str
) -> None:
    if "LISTEN_PIDFDID" in variables and _inherited._pidfd_inode() is None:
        pytest.skip("needs pidfd_open()")
    passed(made, **variables)
    for take in (inherited, lambda: bind("systemd:")):
        with pytest.raises(ValueError, match=text):
            take()
    assert is_open(FIRST)


def test_a_name_that_is_not_there_tells_those_that_are(
    passed: Passed, made: socket.socket, other: socket.socket
) -> None:
    passed(made, other, names="web:admin")
    with pytest.raises(FileNotFoundError, match="no socket 'wbe' was passed: there are 'web', 'admin'"):
        bind("systemd:wbe")


@pytest.mark.parametrize(("text", "names"), [("systemd:", "web:admin"), ("systemd:web", "web:web")])
def test_one_of_several_has_to_be_named(
    passed: Passed, made: socket.socket, other: socket.socket, text: str, names: str
) -> None:
    passed(made, other, names=names)
    with pytest.raises(ValueError, match=f"{text} means 2 sockets") as caught:
        bind(text)
    assert names.split(":")[1] in str(caught.value)


def test_a_closed_descriptor(passed: Passed, made: socket.socket) -> None:
    passed(made, LISTEN_FDS="2")
    for take in (inherited, lambda: bind("systemd:")):
        with pytest.raises(OSError, match=f"says 2, and descriptor {FIRST + 1} is closed") as caught:
            take()
        assert caught.value.errno == errno.EBADF


def kinds(kind: str, made: socket.socket, stack: contextlib.ExitStack) -> Any:
    """Return a file of this kind."""
    if kind == "datagram":
        return stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    if kind == "seqpacket":
        return stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    if kind == "connection":
        return stack.enter_context(socket.create_connection(made.getsockname()))
    if kind == "idle":
        return stack.enter_context(socket.socket())
    return stack.enter_context(open(os.devnull))


KINDS = [
    ("datagram", ValueError, "not a stream socket: descriptor 201 is SOCK_DGRAM"),
    pytest.param("seqpacket", ValueError, "201 is SOCK_SEQPACKET", marks=needs("Linux")),
    ("connection", OSError, "client's connection, not a listening socket: fastlisten.serve"),
    ("idle", OSError, "201 is neither set to listen nor connected"),
    ("file", OSError, f"{os.strerror(errno.ENOTSOCK)}: systemd:odd is descriptor 201"),
]


@pytest.mark.parametrize(("kind", "error", "text"), KINDS)
def test_what_is_no_listening_stream_socket(
    passed: Passed, made: socket.socket, kind: str, error: type[Exception], text: str
) -> None:
    with contextlib.ExitStack() as stack:
        passed(made, kinds(kind, made, stack), names="web:odd")
        for take in (inherited, lambda: bind("systemd:odd")):
            with pytest.raises(error, match=text):
                take()
        with bind("systemd:web") as listener:  # it is in nobody's way
            assert listener.getsockname() == made.getsockname()
        assert is_open(FIRST + 1)


# --- a client in place of a listening socket ------------------------------------------------------


def test_a_client_that_was_passed_is_served_and_that_is_all(passed: Passed, made: socket.socket) -> None:
    with connect(made) as client:
        accepted, _ = made.accept()
        with accepted:
            accepted.setblocking(False)
            passed(accepted, names="connection")
        peers = []

        def handler(connection: Any) -> None:
            peers.append(connection.peer)
            echo(connection)

        client.sendall(b"one")
        client.shutdown(socket.SHUT_WR)
        assert fastlisten.serve(handler, "systemd:", threads=2) == (0, 0)
        assert client.recv(100) == b"one"
        assert client.recv(100) == b""
        assert peers == [client.getsockname()]
    assert not is_open(FIRST)


def test_a_client_that_has_left_with_a_reset_is_handed_out(passed: Passed, made: socket.socket) -> None:
    client = connect(made)
    accepted, _ = made.accept()
    with accepted:
        reset(client)
        wait_until(lambda: has_no_peer(accepted))
        passed(accepted)
    heard = []

    def handler(connection: Any) -> None:
        heard.append(connection.peer)
        with contextlib.suppress(ConnectionResetError):
            heard.append(connection.recv(1))

    fastlisten.serve(handler, "systemd:")
    assert heard in ([None], [None, b""])


def has_no_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def test_what_the_handler_raises_goes_where_it_always_goes(
    passed: Passed, made: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[object] = []

    def handler(connection: Any) -> None:
        raise LookupError("no")

    for on_error in (None, lambda error, connection: seen.append((str(error), connection.closed))):
        with connect(made) as client:
            accepted, _ = made.accept()
            with accepted:
                passed(accepted)
            fastlisten.serve(handler, "systemd:", on_error=on_error)
            assert client.recv(1) == b""
    assert seen == [("no", False)]
    assert [record.getMessage().split("failed")[0][:14] for record in caplog.records] == ["the handler of"]


def test_a_client_over_tls(passed: Passed, made: socket.socket, tls: Any) -> None:
    server, trusting = tls
    with connect(made) as client:
        accepted, _ = made.accept()
        with accepted:
            passed(accepted)
        served = Serving(lambda: fastlisten.serve(echo, "systemd:", ssl=server))
        with trusting.wrap_socket(client, server_hostname="localhost") as over_tls:
            over_tls.sendall(b"secret")
            assert over_tls.recv(100) == b"secret"
            over_tls.unwrap().close()
        served.wait()


# --- descriptor 0 ---------------------------------------------------------------------------------

# Takes inetd's socket, which is a stream of the process, and tells on what was its stdout before.
INETD = """
import errno, json, os, socket, sys
told = os.dup(1)
numbers = [int(number) for number in sys.argv[1:]]
for stream in range(3):
    os.dup2(numbers[0], stream)
os.close(numbers[0])
import fastlisten
descriptors = len(os.listdir("/dev/fd"))
try:
    listener = fastlisten.bind("inetd:")
except Exception as error:
    answer = [type(error).__name__, str(error)]
else:
    print("to nobody", flush=True)
    print("to nobody", file=sys.stderr, flush=True)
    answer = [listener.getsockname()[1], listener.fileno() > 2, os.get_inheritable(listener.fileno()),
              [os.path.sameopenfile(stream, listener.fileno()) for stream in range(3)],
              [os.get_inheritable(stream) for stream in range(3)],
              len(os.listdir("/dev/fd")) - descriptors]
    try:
        fastlisten.bind("inetd:")
    except OSError as error:
        answer.append(error.errno == errno.ENOTSOCK)
    listener.close()
os.write(told, json.dumps(answer).encode() + b"\\n")
"""


def on_descriptor_0(sock: socket.socket) -> Any:
    """Run INETD with this socket as its three streams, as inetd does."""
    import json

    with running(INETD, str(sock.fileno()), pass_fds=[sock.fileno()]) as process:
        assert process.stdout is not None
        answer = json.loads(process.stdout.readline())
        assert process.wait(10) == 0
    return answer


def test_inetd_s_socket_is_moved_and_the_streams_lead_nowhere(made: socket.socket) -> None:
    answer = on_descriptor_0(made)
    assert answer == [made.getsockname()[1], True, False, [False] * 3, [True] * 3, 1, True]


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("datagram", "ValueError", "inetd: is not a stream socket: descriptor 0 is SOCK_DGRAM"),
        ("connection", "OSError", "inetd: is a client's connection"),
        ("idle", "OSError", "inetd: is not listening"),
        ("file", "OSError", f"{os.strerror(errno.ENOTSOCK)}: inetd: is descriptor 0"),
    ],
)
def test_what_inetd_gives_and_bind_does_not_take(
    made: socket.socket, kind: str, name: str, text: str
) -> None:
    with contextlib.ExitStack() as stack:
        found, told = on_descriptor_0(kinds(kind, made, stack))
        assert found == name
        assert text in told


# --- children -------------------------------------------------------------------------------------

CHILD = """
import json, os, socket, sys
made = socket.create_server(("127.0.0.1", 0))
number = made.detach()
if number == 3:
    os.set_inheritable(3, True)
else:
    os.dup2(number, 3)
    os.close(number)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
import fastlisten
pid = os.fork()
if pid == 0:  # they are not the child's
    os._exit(10 if fastlisten.inherited() == [] else 11)
first = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
[listener] = fastlisten.inherited()
import subprocess
program = "import os; print('LISTEN_FDS' in os.environ)"
second = subprocess.check_output([sys.executable, "-c", program], text=True, close_fds=False).strip()
print(json.dumps([first, second, listener.fileno()]))
listener.close()
"""


@needs("fork")
def test_they_are_not_a_child_s() -> None:
    assert python(CHILD) == [10, "False", 3]


def test_nothing_of_it_is_imported_by_the_package() -> None:
    program = "import sys, fastlisten; print(int('fastlisten._inherited' in sys.modules))"
    assert python(program) == 0
    assert "fastlisten._inherited" in sys.modules
