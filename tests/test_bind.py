"""bind(), create_server() and adoption: each option on the socket, who owns a path and a descriptor."""

import errno
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastlisten
from fastlisten import Endpoint, Listener, bind, create_server
from helpers import (
    LIMIT,
    LOOPBACK,
    NOBODYS,
    NOWHERE,
    connect,
    echo,
    exchange,
    needs,
    own_loopback,
    posix_only,
    read_all,
    serving,
    under_wine,
)
from helpers.programs import running

LOOPBACK6 = ("::1", 0)

# Audit hooks cannot be taken away again, so there is one, and it works only while a list is here.
_made: list[object] | None = None


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _made is not None and event == "socket.__new__":
        _made.append(arguments[0])


sys.addaudithook(_watch)


@pytest.fixture
def made() -> Iterator[list[object]]:
    """Give the list of all sockets that are opened from now on."""
    global _made
    _made = []
    yield _made
    _made = None


def error_of(call: Callable[[], object]) -> OSError:
    """Return the OSError that `call` raises."""
    try:
        call()
    except OSError as error:
        return error
    raise AssertionError(f"{call} has raised nothing")


def assert_same_error(ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """Check that both raise the same class with the same arguments."""
    told, expected = error_of(ours), error_of(theirs)
    assert (type(told), told.args) == (type(expected), expected.args)


def option(sock: socket.socket, level: str, name: str) -> int:
    return sock.getsockopt(getattr(socket, level), getattr(socket, name))


def accepted(listener: Listener) -> tuple[socket.socket, socket.socket]:
    """Return a client and the accepted side of its connection."""
    client = connect(listener)
    return client, listener.accept()[0]


# --- where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", [LOOPBACK, "127.0.0.1:0", Endpoint("127.0.0.1"), "localhost:0", ("localhost", 0)]
)
def test_bind_takes_an_endpoint_its_text_and_a_plain_address(where: Any) -> None:
    with bind(where) as listener:
        assert isinstance(listener, socket.socket)
        assert listener.type == socket.SOCK_STREAM
        assert listener.getsockname()[1] > 0
        assert listener.endpoint == Endpoint(*listener.getsockname()[:2])
        assert listener.gettimeout() is None
        assert not listener.get_inheritable()
        client, server = accepted(listener)
        with client, server:
            assert client.getsockname() == server.getpeername()


@needs("the IPv6 loopback address")
def test_bind_takes_ipv6() -> None:
    with bind("[::1]:0") as listener:
        assert listener.family == socket.AF_INET6
        assert option(listener, "IPPROTO_IPV6", "IPV6_V6ONLY") == 1
        assert str(listener.endpoint) == f"[::1]:{listener.getsockname()[1]}"
        with serving(listener, echo):
            assert exchange(listener, b"six") == b"six"


@needs("the IPv6 loopback address")
def test_a_dual_stack_listener_takes_ipv4_clients() -> None:
    # The IPv4 loopback address as IPv6 writes it: dual stack without binding all addresses.
    with bind("[::ffff:127.0.0.1]:0", dualstack_ipv6=True) as listener:
        assert option(listener, "IPPROTO_IPV6", "IPV6_V6ONLY") == 0
        with connect(("127.0.0.1", listener.getsockname()[1])), listener.accept()[0] as server:
            assert server.getpeername()[0] == "::ffff:127.0.0.1"


@needs("the IPv6 loopback address")
def test_dual_stack_is_off_unless_asked_for() -> None:
    with socket.socket(socket.AF_INET6) as plain:
        plain.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        assert_same_error(lambda: bind("[::ffff:127.0.0.1]:0"), lambda: plain.bind(("::ffff:127.0.0.1", 0)))


def test_a_port_in_use_is_the_error_of_bind() -> None:
    with bind(LOOPBACK) as first, socket.socket() as plain:
        taken = first.getsockname()
        assert_same_error(lambda: bind(taken), lambda: plain.bind(taken))


@needs("addresses of others that cannot be bound")
def test_an_address_of_another_machine_is_the_error_of_bind() -> None:
    nobodys = (NOBODYS, 0)
    with socket.socket() as plain:
        assert_same_error(lambda: bind(nobodys), lambda: plain.bind(nobodys))


# --- options --------------------------------------------------------------------------------------


def test_the_port_can_be_bound_again_while_old_connections_linger() -> None:
    with bind((own_loopback(), 0)) as listener:
        address = listener.getsockname()
        expected = os.name != "nt"  # there it would let another process steal the port
        assert bool(option(listener, "SOL_SOCKET", "SO_REUSEADDR")) is expected
        client, server = accepted(listener)
        server.close()  # our side ends first, so TIME_WAIT is ours: RFC 9293, 3.6
        assert read_all(client) == b""
        client.close()
    with bind(address) as again:
        assert again.getsockname() == address


@needs("TCP_INFO of a listener")
@pytest.mark.parametrize("backlog", [0, 1, 5, 100])
def test_backlog_is_the_limit_of_the_kernel_s_queue(backlog: int) -> None:
    with bind(LOOPBACK, backlog=backlog) as listener:
        assert listener.stats().queue_limit == backlog


@needs("TCP_INFO of a listener")
def test_the_default_backlog_is_that_of_create_server() -> None:
    with bind(LOOPBACK) as ours, create_server(LOOPBACK) as theirs:
        assert ours.stats().queue_limit == theirs.stats().queue_limit == min(socket.SOMAXCONN, 128)


@needs("SO_REUSEPORT")
def test_reuse_port_shares_a_port_among_those_who_ask() -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind(LOOPBACK)
        address = probe.getsockname()
        with bind(address, reuse_port=True) as one, bind(address, reuse_port=True) as two:
            assert option(one, "SOL_SOCKET", "SO_REUSEPORT") == 1
            assert one.getsockname() == two.getsockname() == address
            with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
                bind(address)


@needs("SO_REUSEPORT")
def test_create_server_shares_port_0_as_the_standard_library_does() -> None:
    with create_server(LOOPBACK, reuse_port=True) as listener:
        assert option(listener, "SOL_SOCKET", "SO_REUSEPORT") == 1


@pytest.mark.parametrize(
    ("argument", "level", "name"),
    [
        ({"no_delay": True}, "IPPROTO_TCP", "TCP_NODELAY"),
        ({"keep_alive": True}, "SOL_SOCKET", "SO_KEEPALIVE"),
    ],
)
def test_options_that_accepted_connections_inherit(argument: dict[str, bool], level: str, name: str) -> None:
    seen = []
    with bind(LOOPBACK) as plain, bind(LOOPBACK, **argument) as listener:
        for each in (plain, listener):
            client, server = accepted(each)
            with client, server:
                seen.append(bool(option(server, level, name)))
    assert seen == [False, True]


@needs("Linux")
def test_defer_accept_waits_for_the_first_bytes() -> None:
    with bind(LOOPBACK, defer_accept=3) as listener, connect(listener) as client:
        assert option(listener, "IPPROTO_TCP", "TCP_DEFER_ACCEPT") >= 3  # the kernel rounds up
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        client.sendall(b"x")
        listener.settimeout(5)
        with listener.accept()[0] as server:
            assert server.recv(1, socket.MSG_DONTWAIT) == b"x"


@needs("Linux")
def test_fast_open_is_set_on_the_socket() -> None:
    with bind(LOOPBACK, fast_open=16) as listener:
        assert option(listener, "IPPROTO_TCP", "TCP_FASTOPEN") == 16


@pytest.mark.skipif(os.name != "nt", reason="SO_EXCLUSIVEADDRUSE is a Windows option")
def test_exclusive_is_set_on_the_socket() -> None:
    with bind(LOOPBACK, exclusive=True) as listener:
        assert option(listener, "SOL_SOCKET", "SO_EXCLUSIVEADDRUSE")


@pytest.mark.parametrize(
    ("keyword", "value", "constant"),
    [
        ("reuse_port", True, "SO_REUSEPORT"),
        ("exclusive", True, "SO_EXCLUSIVEADDRUSE"),
        ("defer_accept", 1, "TCP_DEFER_ACCEPT"),
        ("fast_open", 1, "TCP_FASTOPEN"),
    ],
)
def test_an_option_that_the_system_lacks_is_refused_by_name(
    keyword: str, value: object, constant: str, made: list[object]
) -> None:
    options: dict[str, Any] = {keyword: value}
    if hasattr(socket, constant):
        if under_wine() and constant == "TCP_FASTOPEN":
            pytest.skip("Wine has the constant of TCP_FASTOPEN and not the option")
        with socket.socket() as probe:
            probe.bind((own_loopback(), 0))  # for a port that nobody else is given meanwhile
            address = probe.getsockname()
        with bind(address, **options) as listener:
            assert listener.getsockname() == address
        return
    with pytest.raises(ValueError, match=f"{keyword}: {constant} not supported on this platform"):
        bind(("127.0.0.1", 11000), **options)
    assert made == []


@pytest.mark.parametrize(
    ("where", "options", "error", "text"),
    [
        pytest.param(LOOPBACK, {"reuse_port": True}, ValueError, "port 0", marks=needs("SO_REUSEPORT")),
        (LOOPBACK, {"mode": 0o600}, ValueError, "mode is for unix paths"),
        ("unix:@name", {"mode": 0o600}, ValueError, "mode is for unix paths"),
        ("unix:/path", {"no_delay": True}, ValueError, "no_delay is for TCP"),
        ("unix:/path", {"defer_accept": 1}, ValueError, "defer_accept is for TCP"),
        (LOOPBACK, {"fast_open": -1}, ValueError, "fast_open must be at least 0, not -1"),
        (LOOPBACK, {"fast_open": "1"}, TypeError, "fast_open must be an int, not str"),
        ("fd:0", {"dualstack_ipv6": True}, ValueError, "bound already"),
        (LOOPBACK, {"dualstack_ipv6": True}, ValueError, "dualstack_ipv6"),
        ("127.0.0.1", {}, ValueError, "expected"),
        (("127.0.0.1", "80"), {}, TypeError, "int"),
        (("127.0.0.1", 70000), {}, OverflowError, "0-65535"),
        (None, {}, TypeError, "None|address"),
        (f"{NOWHERE}:0", {}, socket.gaierror, "known|found|failed"),
    ],
)
def test_what_cannot_be_is_refused_before_a_socket_opens(
    where: Any, options: dict[str, Any], error: type[Exception], text: str, made: list[object]
) -> None:
    with pytest.raises(error, match=text):
        bind(where, **options)
    # has_dualstack_ipv6() probes with a socket of its own
    assert [sock for sock in made if isinstance(sock, Listener)] == []


@pytest.mark.parametrize(("backlog", "error"), [("5", TypeError), (1.5, TypeError), (2**40, OverflowError)])
def test_a_bad_backlog_leaves_nothing_open(
    backlog: Any, error: type[Exception], made: list[socket.socket]
) -> None:
    with pytest.raises(error):
        bind(LOOPBACK, backlog=backlog)
    assert [sock.fileno() for sock in made if isinstance(sock, Listener)] == [-1]


# --- unix sockets ---------------------------------------------------------------------------------


@needs("unix sockets")
@pytest.mark.parametrize("form", [lambda p: f"unix:{p}", str, os.fsencode, Path])
def test_a_unix_path_lives_as_long_as_its_listener(form: Any, unix_path: str) -> None:
    with bind(form(unix_path) if form is not str else Endpoint(f"unix:{unix_path}")) as listener:
        assert stat.S_ISSOCK(os.stat(unix_path).st_mode)
        assert str(listener.endpoint) == f"unix:{unix_path}"
        with serving(listener, echo):
            assert exchange(unix_path, b"path") == b"path"
    assert not os.path.exists(unix_path)


@needs("unix sockets")
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777, None])
def test_the_mode_of_a_unix_path(mode: int | None, unix_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there from the path's first moment: no chmod sets it later."""
    for name in ("chmod", "fchmod", "lchmod"):
        monkeypatch.delattr(os, name, raising=False)
    umask = os.umask(0o027)
    try:
        with bind(f"unix:{unix_path}", mode=mode):
            expected = 0o777 & ~0o027 if mode is None else mode
            assert stat.S_IMODE(os.stat(unix_path).st_mode) == expected
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(umask)


@needs("unix sockets")
def test_a_path_that_another_has_taken_over_stays(unix_path: str) -> None:
    with bind(f"unix:{unix_path}"):
        os.unlink(unix_path)
        other = bind(f"unix:{unix_path}")
    with other, serving(other, echo):
        assert exchange(unix_path, b"other") == b"other"
    assert not os.path.exists(unix_path)


@needs("unix sockets")
def test_a_file_in_the_path_s_place_stays(unix_path: str) -> None:
    with bind(f"unix:{unix_path}"):
        os.unlink(unix_path)
        Path(unix_path).write_text("a file")
    assert Path(unix_path).read_text() == "a file"


@needs("unix sockets")
def test_a_path_that_is_gone_is_no_error(unix_path: str) -> None:
    listener = bind(f"unix:{unix_path}")
    os.unlink(unix_path)
    listener.close()
    listener.close()
    assert listener.fileno() == -1


@needs("unix sockets")
def test_a_detached_listener_leaves_its_path(unix_path: str) -> None:
    listener = bind(f"unix:{unix_path}")
    with socket.socket(fileno=listener.detach()) as plain:
        assert plain.getsockname() == unix_path
    assert stat.S_ISSOCK(os.stat(unix_path).st_mode)


@needs("unix sockets")
def test_create_server_leaves_its_path_as_the_standard_library_does(unix_path: str) -> None:
    with create_server(unix_path, family=socket.AF_UNIX) as listener:
        assert listener.getsockname() == unix_path
    assert stat.S_ISSOCK(os.stat(unix_path).st_mode)


@needs("unix sockets")
def test_a_stale_path_is_in_use(unix_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(unix_path)
    with socket.socket(socket.AF_UNIX) as plain:
        assert_same_error(lambda: bind(f"unix:{unix_path}"), lambda: plain.bind(unix_path))
    assert error_of(lambda: bind(f"unix:{unix_path}")).errno == errno.EADDRINUSE
    assert os.path.exists(unix_path)


@needs("unix sockets")
def test_a_path_that_nobody_listens_on_is_replaced_for_who_asks(unix_path: str) -> None:
    """A server that is killed leaves its path, and a supervisor starts it again and again."""
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(unix_path)
    with bind(f"unix:{unix_path}", replace_stale=True) as listener, serving(listener, echo):
        assert exchange(unix_path, b"hello") == b"hello"
    assert not os.path.exists(unix_path)
    bind(f"unix:{unix_path}", replace_stale=True).close()  # nothing is there


@needs("unix sockets")
@pytest.mark.parametrize("what", ["a listener", "its queue is full", "a datagram socket", "a file", "a link"])
def test_nothing_else_is_replaced(unix_path: str, what: str) -> None:
    kind = socket.SOCK_DGRAM if what == "a datagram socket" else socket.SOCK_STREAM
    with socket.socket(socket.AF_UNIX, kind) as other, socket.socket(socket.AF_UNIX) as client:
        if what == "a file":
            Path(unix_path).touch()
        elif what == "a link":
            other.bind(f"{unix_path}.stale")
            os.symlink(f"{unix_path}.stale", unix_path)
        else:
            other.bind(unix_path)
            if kind == socket.SOCK_STREAM:
                other.listen(0)
            if what == "its queue is full":
                client.connect(unix_path)
        before = os.lstat(unix_path).st_ino
        assert error_of(lambda: bind(f"unix:{unix_path}", replace_stale=True)).errno == errno.EADDRINUSE
        assert os.lstat(unix_path).st_ino == before


@needs("unix sockets")
def test_two_that_start_at_once_do_not_replace_each_other(unix_path: str) -> None:
    """Between bind() and listen() a socket looks like one that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(unix_path)
    start = threading.Barrier(4)
    made: list[Listener] = []
    errors: list[int | None] = []

    def run() -> None:
        start.wait(LIMIT)
        try:
            made.append(bind(f"unix:{unix_path}", replace_stale=True))
        except OSError as error:
            errors.append(error.errno)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    (listener,) = made
    assert errors == [errno.EADDRINUSE] * 3
    with listener, serving(listener, echo):
        assert exchange(unix_path, b"hello") == b"hello"


@needs("unix sockets")
def test_who_holds_the_directory_s_lock_keeps_no_server_down(unix_path: str) -> None:
    fcntl = pytest.importorskip("fcntl")
    directory = os.open(os.path.dirname(unix_path), os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        bind(f"unix:{unix_path}", replace_stale=True).close()
    finally:
        os.close(directory)


@needs("unix sockets")
def test_a_listen_that_fails_takes_the_path_away_again(unix_path: str) -> None:
    with pytest.raises(TypeError):
        bind(f"unix:{unix_path}", backlog=b"5")  # type: ignore[arg-type]
    assert not os.path.exists(unix_path)


@needs("unix sockets")
def test_an_overlong_path_is_the_error_of_bind(unix_path: str) -> None:
    path = unix_path + "x" * 200
    with socket.socket(socket.AF_UNIX) as plain:
        assert_same_error(lambda: bind(f"unix:{path}"), lambda: plain.bind(path))


@needs("unix sockets", "fork")
def test_a_forked_child_s_close_leaves_the_path(unix_path: str) -> None:
    with bind(f"unix:{unix_path}") as listener:
        child = os.fork()
        if child == 0:
            listener.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with serving(listener, echo):
            assert exchange(unix_path, b"still") == b"still"
    assert not os.path.exists(unix_path)


@needs("Linux")
def test_an_abstract_name_is_no_file(unix_path: str) -> None:
    name = unix_path.strip("/")
    with bind(f"unix:@{name}") as listener:
        assert listener.getsockname() == b"\0" + name.encode()
        assert str(listener.endpoint) == f"unix:@{name}"
        assert not os.path.exists(unix_path)
        with serving(listener, echo):
            assert exchange(b"\0" + name.encode(), b"abstract") == b"abstract"


@pytest.mark.skipif(hasattr(socket, "AF_UNIX"), reason="this Python has unix sockets")
def test_without_unix_sockets_a_path_is_refused() -> None:
    with pytest.raises(AttributeError, match="AF_UNIX"):
        bind("unix:/path")


# --- adoption -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adopt", [lambda n: bind(f"fd:{n}"), lambda n: Listener(fileno=n)])
def test_an_inherited_listener_is_adopted(adopt: Any) -> None:
    plain = socket.create_server(LOOPBACK)
    address, number = plain.getsockname(), plain.detach()
    with adopt(number) as listener:
        assert listener.fileno() == number
        assert listener.getsockname() == address
        assert (listener.family, listener.type) == (socket.AF_INET, socket.SOCK_STREAM)
        with serving(listener, echo):
            assert exchange(address, b"adopted") == b"adopted"


def test_an_adopted_socket_that_is_only_bound_is_set_to_listen() -> None:
    plain = socket.socket()
    plain.bind(LOOPBACK)
    with bind(f"fd:{plain.detach()}") as listener, serving(listener, echo):
        assert exchange(listener, b"now it does") == b"now it does"


@needs("TCP_INFO of a listener")
def test_adoption_sets_what_is_asked_for_and_nothing_else() -> None:
    plain = socket.create_server(LOOPBACK, backlog=7)
    with bind(f"fd:{plain.detach()}") as listener:
        assert listener.stats().queue_limit == 7
        with bind(f"fd:{listener.detach()}", backlog=9, keep_alive=True) as again:
            assert again.stats().queue_limit == 9
            assert option(again, "SOL_SOCKET", "SO_KEEPALIVE") == 1


def test_a_descriptor_that_cannot_be_adopted_stays_the_caller_s() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as datagram:
        datagram.bind(LOOPBACK)
        with pytest.raises(ValueError, match=f"fd:{datagram.fileno()} is not a stream socket"):
            bind(f"fd:{datagram.fileno()}")
        assert datagram.getsockname()[1]


@posix_only("a file's descriptor is no socket's handle there")
def test_a_file_that_is_no_socket_stays_the_caller_s() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match=os.strerror(errno.ENOTSOCK)):
            bind(f"fd:{reader}")
        assert os.write(writer, b"x") == len(os.read(reader, 1))
    finally:
        os.close(reader)
        os.close(writer)


def test_a_closed_descriptor_is_the_error_of_socket() -> None:
    with socket.socket() as sock:
        number = sock.fileno()
    assert_same_error(lambda: bind(f"fd:{number}"), lambda: socket.socket(fileno=number))


INHERITS = """
import fastlisten, sys
listener = fastlisten.bind(sys.argv[1])
def handler(connection):
    connection.sendall(connection.recv(100).upper())
    listener.stop()
listener.serve(handler)
listener.close()
"""


@posix_only("descriptors are inherited by number")
def test_a_process_serves_the_listener_that_it_inherits() -> None:
    with bind(LOOPBACK) as listener:
        number = listener.fileno()
        with running(INHERITS, f"fd:{number}", options=["-X", "dev"], pass_fds=[number]) as child:
            assert exchange(listener, b"child") == b"CHILD"
            assert child.wait(10) == 0
        with serving(listener, echo):  # the child's end is not ours
            assert exchange(listener, b"parent") == b"parent"


# --- create_server --------------------------------------------------------------------------------

SETTINGS = [
    ("SOL_SOCKET", "SO_REUSEADDR"),
    ("SOL_SOCKET", "SO_REUSEPORT"),
    ("SOL_SOCKET", "SO_EXCLUSIVEADDRUSE"),
    ("SOL_SOCKET", "SO_KEEPALIVE"),
    ("SOL_SOCKET", "SO_LINGER"),
    ("SOL_SOCKET", "SO_RCVBUF"),
    ("SOL_SOCKET", "SO_SNDBUF"),
    ("IPPROTO_TCP", "TCP_NODELAY"),
    ("IPPROTO_TCP", "TCP_DEFER_ACCEPT"),
    ("IPPROTO_TCP", "TCP_FASTOPEN"),
    ("IPPROTO_IPV6", "IPV6_V6ONLY"),
]


def settings(sock: socket.socket) -> dict[str, object]:
    """Return everything that can be asked of a listening socket, but its number and port."""
    found: dict[str, object] = {
        "family": sock.family,
        "type": sock.type,
        "proto": sock.proto,
        "timeout": sock.gettimeout(),
        "inheritable": sock.get_inheritable(),
        "host": sock.getsockname()[0],
    }
    for level, name in SETTINGS:
        if name == "TCP_FASTOPEN" and under_wine():
            continue  # it has the constant and not the option
        if hasattr(socket, name) and (level != "IPPROTO_IPV6" or sock.family == socket.AF_INET6):
            found[name] = option(sock, level, name)
    return found


@pytest.mark.parametrize(
    ("address", "options"),
    [
        (LOOPBACK, {}),
        (LOOPBACK, {"backlog": 0}),
        pytest.param(LOOPBACK, {"reuse_port": True}, marks=needs("SO_REUSEPORT")),
        pytest.param(LOOPBACK6, {"family": socket.AF_INET6}, marks=needs("the IPv6 loopback address")),
        pytest.param(
            LOOPBACK6,
            {"family": socket.AF_INET6, "dualstack_ipv6": True},
            marks=needs("the IPv6 loopback address"),
        ),
    ],
)
def test_create_server_sets_what_the_standard_library_sets(address: Any, options: dict[str, Any]) -> None:
    with socket.create_server(address, **options) as theirs, create_server(address, **options) as ours:
        assert isinstance(ours, Listener)
        assert settings(ours) == settings(theirs)
        assert ours.getsockname()[2:] == theirs.getsockname()[2:]


@pytest.mark.parametrize("default", [None, 2.5])
def test_the_default_timeout_is_kept_as_the_standard_library_does(default: float | None) -> None:
    socket.setdefaulttimeout(default)
    try:
        with socket.create_server(LOOPBACK) as theirs, create_server(LOOPBACK) as ours:
            assert ours.gettimeout() == theirs.gettimeout() == default
    finally:
        socket.setdefaulttimeout(None)


# --- serve() with endpoints -----------------------------------------------------------------------


def test_serve_closes_what_it_has_bound_when_a_later_endpoint_fails(made: list[Any]) -> None:
    with bind(LOOPBACK) as taken, bind(LOOPBACK) as mine:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            fastlisten.serve(echo, mine, "127.0.0.1:0", taken.endpoint)
        assert caught.value.errno == errno.EADDRINUSE
        assert mine.fileno() != -1  # a Listener that was handed in stays open
        assert [sock.fileno() for sock in made[2:] if isinstance(sock, Listener)] == [-1, -1]


def test_serve_wants_an_endpoint() -> None:
    with pytest.raises(TypeError, match="at least one endpoint"):
        fastlisten.serve(echo)
