"""serve(proxy=): whose connection it is, by a trusted proxy's PROXY header; and who is closed."""

import contextlib
import ipaddress
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastlisten import Listener, Proxy, ProxyHeader, bind
from helpers import (
    LIMIT,
    LOOPBACK,
    connect,
    echo,
    exchange,
    needs,
    not_under_wine,
    posix_only,
    read_all,
    reset,
    serving,
    wait_until,
)
from helpers.certificates import Pair, client_context, server_context
from helpers.faults import Faults
from helpers.programs import python
from helpers.proxy_headers import AUTHORITY, NOOP, UNIQUE_ID, inet, tlv, unix, v1, v2
from helpers.serve import modes

if os.name == "posix":
    import fcntl
    import termios

LOCAL = Proxy(["127.0.0.0/8", "::1", *(["unix:"] if os.name == "posix" else [])], timeout=LIMIT)
SOMEBODY = "203.0.113.0/24"  # RFC 5737: nobody has these


class Seen:
    """A handler that echoes, and keeps what it was told of each client."""

    def __init__(self) -> None:
        self.peers: list[Any] = []
        self.headers: list[ProxyHeader | None] = []

    def __call__(self, connection: Any) -> None:
        self.peers.append(connection.peer)
        self.headers.append(connection.proxy)
        echo(connection)


@pytest.fixture
def seen() -> Seen:
    return Seen()


HEADERS: dict[str, tuple[bytes, Any]] = {
    "v1": (v1(), ("192.0.2.1", 1000)),
    "v1 IPv6": (v1("2001:db8::1"), ("2001:db8::1", 1000, 0, 0)),
    "v2": (v2(inet()), ("192.0.2.1", 1000)),
    "v2 IPv6": (v2(inet("2001:db8::1"), 0x21), ("2001:db8::1", 1000, 0, 0)),
    "v2 with a checksum": (v2(inet() + tlv(AUTHORITY, b"example.org"), checksum=True), ("192.0.2.1", 1000)),
    "v2 of 4096 bytes": (v2(inet() + tlv(NOOP, bytes(4096 - 31))), ("192.0.2.1", 1000)),
}
if hasattr(socket, "AF_UNIX"):
    HEADERS["v2 unix"] = v2(unix(), 0x31), "/client"
headers = pytest.mark.parametrize(("header", "peer"), HEADERS.values(), ids=HEADERS.keys())


@modes
def test_the_client_is_whom_the_header_names(listener: Listener, seen: Seen, mode: dict[str, Any]) -> None:
    with serving(listener, seen, proxy=LOCAL, **mode):
        assert exchange(listener, v1() + b"hello") == b"hello"
        assert exchange(listener, v2(inet() + tlv(UNIQUE_ID, b"7")) + b"you") == b"you"
    assert seen.peers == [("192.0.2.1", 1000)] * 2
    first, second = seen.headers
    assert first is not None
    assert second is not None
    assert (first.version, first.destination, first.tlvs) == (1, ("192.0.2.2", 80), ())
    assert (second.version, second.unique_id) == (2, b"7")


@posix_only("whether something was sent on, it does not tell")
@headers
def test_in_one_piece_and_byte_by_byte(listener: Listener, seen: Seen, header: bytes, peer: Any) -> None:
    """Nothing of what follows is lost, and nothing of the header is left."""
    with serving(listener, seen, proxy=LOCAL):
        assert exchange(listener, header + b"in one piece") == b"in one piece"
        with connect(listener) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            steps = range(len(header)) if len(header) < 200 else range(0, len(header), 97)
            for at, end in zip(steps, [*steps[1:], len(header)], strict=True):
                client.sendall(header[at:end])
                wait_until(lambda: not unread(client))
            client.sendall(b"and then")
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"and then"
    assert seen.peers == [peer, peer]
    assert seen.headers[0] == seen.headers[1]
    assert seen.headers[0] is not None
    assert seen.headers[0].length == len(header)


def unread(client: socket.socket) -> bool:
    """Tell whether the kernel still has something of this client's that its peer has not acknowledged."""
    return any(fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)))  # tcp(7): SIOCOUTQ


OWN = {
    "LOCAL": v2(b"", 0, 0x20),
    "UNKNOWN": b"PROXY UNKNOWN\r\n",
    "UNSPEC": v2(b"", 0),
    "UDP": v2(inet(), 0x12),
}


@pytest.mark.parametrize("header", OWN.values(), ids=OWN.keys())
def test_a_proxy_that_speaks_for_itself(listener: Listener, seen: Seen, header: bytes) -> None:
    with serving(listener, seen, proxy=LOCAL), connect(listener) as client:
        address = client.getsockname()
        client.sendall(header + b"health")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"health"
    assert seen.peers == [address]
    assert seen.headers[0] is not None
    assert seen.headers[0].source is None


def test_what_a_connection_says(listener: Listener) -> None:
    """The peer's name in the kernel stays the proxy's; the header outlives the connection."""
    kept: list[Any] = []

    def handler(connection: Any) -> None:
        kept.append((connection, connection.getpeername(), repr(connection)))
        echo(connection)

    with serving(listener, handler, proxy=LOCAL), connect(listener) as client:
        proxy = client.getsockname()
        client.sendall(v1())
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
    ((connection, name, text),) = kept
    assert name == proxy
    assert "peer=('192.0.2.1', 1000)" in text
    assert connection.peer == ("192.0.2.1", 1000)
    assert connection.proxy == connection.proxy
    assert connection.proxy.source == ("192.0.2.1", 1000)


def test_without_a_proxy_there_is_no_header(listener: Listener, seen: Seen) -> None:
    with serving(listener, seen):
        assert exchange(listener, v1()) == v1()
    assert seen.headers == [None]


# --- who is trusted


@modes
def test_nobody_else_may_come(listener: Listener, seen: Seen, mode: dict[str, Any]) -> None:
    with serving(listener, seen, proxy=Proxy([SOMEBODY]), **mode):
        with connect(listener) as client, contextlib.suppress(ConnectionError):
            client.sendall(v1() + b"let me in")
            assert read_all(client) == b""
        wait_until(lambda: listener.stats().refused_for == {"untrusted": 1})
    assert seen.peers == []


@modes
def test_others_are_served_without_a_header(listener: Listener, seen: Seen, mode: dict[str, Any]) -> None:
    """A header of theirs is data like any other: who could spoof an address is not heard."""
    with (
        serving(listener, seen, proxy=Proxy([SOMEBODY], required=False), **mode),
        connect(listener) as client,
    ):
        address = client.getsockname()
        client.sendall(v1())
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == v1()
    assert seen.peers == [address]
    assert seen.headers == [None]


@pytest.mark.parametrize("network", ["127.0.0.1", "127.0.0.0/9", "0.0.0.0/0", "::ffff:127.0.0.0/104"])
@pytest.mark.parametrize("family", ["IPv4", "both"])
def test_networks_that_hold_the_proxy(seen: Seen, network: str, family: str) -> None:
    if family == "both" and not socket.has_dualstack_ipv6():
        pytest.skip("needs listeners for both families")
    endpoint = LOOPBACK if family == "IPv4" else "[::]:0"
    both = {"dualstack_ipv6": family == "both"}
    with bind(endpoint, **both) as listener, serving(listener, seen, proxy=Proxy([SOMEBODY, network])):
        port = listener.getsockname()[1]
        assert exchange(("127.0.0.1", port), v1() + b"hello") == b"hello"
    assert seen.peers == [("192.0.2.1", 1000)]


@pytest.mark.parametrize(
    "network", ["127.0.0.2", "127.0.0.0/32", "126.0.0.0/8", "127.128.0.0/9", "::/0", "unix:"]
)
def test_networks_that_do_not(listener: Listener, seen: Seen, network: str) -> None:
    if network == "unix:" and not hasattr(socket, "AF_UNIX"):
        pytest.skip("needs unix sockets")
    with serving(listener, seen, proxy=Proxy([network], required=False)):
        assert exchange(listener, v1()) == v1()
    assert seen.headers == [None]


@needs("the IPv6 loopback address")
@pytest.mark.parametrize("network", ["::1", "::/127", "::/0"])
def test_networks_of_ipv6(seen: Seen, network: str) -> None:
    with bind("[::1]:0") as listener, serving(listener, seen, proxy=Proxy([network])):
        assert exchange(listener, v1() + b"hello") == b"hello"
    assert seen.peers == [("192.0.2.1", 1000)]


@needs("unix sockets")
def test_proxies_on_unix_sockets(seen: Seen, unix_path: str) -> None:
    with bind(f"unix:{unix_path}") as listener:
        with serving(listener, seen, proxy=Proxy(["unix:"])):
            assert exchange(listener, v1() + b"hello") == b"hello"
        with serving(listener, seen, proxy=Proxy([SOMEBODY], required=False)):
            assert exchange(listener, v1()) == v1()
    assert seen.peers == [("192.0.2.1", 1000), ""]


# --- what goes wrong


@modes
def test_a_mute_proxy_is_closed_and_holds_nobody_up(
    listener: Listener, seen: Seen, mode: dict[str, Any]
) -> None:
    with serving(listener, seen, proxy=Proxy(["127.0.0.1"], timeout=0.5), **mode):
        with connect(listener) as mute, connect(listener) as half:
            half.sendall(v1()[:10])
            wait_until(lambda: listener.stats().waiting == 2)
            assert exchange(listener, v1() + b"hello") == b"hello"
            assert read_all(mute) == b""
            assert read_all(half) == b""
        wait_until(lambda: listener.stats().active == 0)
    assert listener.stats().refused_for == {"no PROXY header": 2}


@modes
def test_what_is_no_header(listener: Listener, seen: Seen, mode: dict[str, Any]) -> None:
    wrong = [b"GET / HTTP/1.1\r\n\r\n", v1().lower(), v2(inet()[:-1]), v2(inet(), checksum=True)[:-1] + b"?"]
    with serving(listener, seen, proxy=LOCAL, **mode):
        for header in wrong:
            with connect(listener) as client, contextlib.suppress(ConnectionError):
                client.sendall(header)
                assert read_all(client) == b""
        wait_until(lambda: listener.stats().refused == len(wrong))
        assert exchange(listener, v1() + b"hello") == b"hello"
    assert listener.stats().refused_for == {"invalid PROXY header": len(wrong)}
    assert seen.peers == [("192.0.2.1", 1000)]


@not_under_wine("a client that was reset may be lost before it is accepted")
@modes
def test_a_proxy_that_leaves(listener: Listener, seen: Seen, mode: dict[str, Any]) -> None:
    with serving(listener, seen, proxy=LOCAL, **mode):
        for begun in (b"", v1()[:10]):
            with connect(listener) as client:
                client.sendall(begun)
            with connect(listener) as client:
                client.sendall(begun)
                reset(client)
        wait_until(lambda: listener.stats().refused == 4)
    assert listener.stats().refused_for == {"left": 4}


@modes
def test_a_stop_drops_who_has_half_a_header(listener: Listener, seen: Seen, mode: dict[str, Any]) -> None:
    with serving(listener, seen, proxy=LOCAL, **mode) as served, connect(listener) as client:
        client.sendall(v1()[:10])
        wait_until(lambda: listener.stats().waiting == 1)
        listener.stop()
        served.wait()
        with contextlib.suppress(ConnectionError):  # what nobody has received resets it
            assert read_all(client) == b""
    stats = listener.stats()
    assert (stats.accepted, stats.dropped, stats.waiting) == (1, 1, 0)


@modes
def test_a_drain_waits_for_headers(listener: Listener, seen: Seen, mode: dict[str, Any]) -> None:
    """A proxy connects and sends its header a moment later: a restart between the two loses nobody."""
    with serving(listener, seen, proxy=LOCAL, **mode) as served, connect(listener) as accepted:
        wait_until(lambda: listener.stats().waiting == 1)
        listener.pause()
        with connect(listener) as queued, connect(listener) as late:
            queued.sendall(v1())
            wait_until(lambda: listener.stats().queue_depth in (2, None))
            listener.stop(drain=LIMIT)
            for client, header in ((queued, b""), (late, v1()), (accepted, v1())):
                client.sendall(header + b"heard")
                client.shutdown(socket.SHUT_WR)
                assert read_all(client) == b"heard"
        served.wait()
    stats = listener.stats()
    assert (stats.handled, stats.dropped) == (3, 0)


@modes
def test_the_end_of_a_drain_drops_who_has_sent_no_header(
    listener: Listener, seen: Seen, mode: dict[str, Any]
) -> None:
    with serving(listener, seen, proxy=LOCAL, **mode) as served, connect(listener) as mute:
        wait_until(lambda: listener.stats().waiting == 1)
        listener.stop(drain=0.2)
        served.wait()
        assert read_all(mute) == b""
    assert (listener.stats().handled, listener.stats().dropped) == (0, 1)


# --- with other options


@modes
def test_the_client_s_own_bytes_are_waited_for_after_the_header(
    listener: Listener, seen: Seen, mode: dict[str, Any]
) -> None:
    with serving(listener, seen, proxy=LOCAL, first_bytes=0.5, **mode):
        with connect(listener) as silent, connect(listener) as late:
            silent.sendall(v2(inet()))
            late.sendall(v1())
            wait_until(lambda: listener.stats().waiting == 2)
            late.sendall(b"late")
            late.shutdown(socket.SHUT_WR)
            assert read_all(late) == b"late"
            assert read_all(silent) == b""
        assert exchange(listener, v1() + b"at once") == b"at once"
        wait_until(lambda: listener.stats().active == 0)
    assert listener.stats().refused_for == {"silent": 1}
    assert len(seen.peers) == 2


def test_who_is_refused_takes_its_header_along(listener: Listener) -> None:
    with (
        serving(listener, echo, proxy=LOCAL, busy=b"busy", pending=0),
        connect(listener) as first,
        connect(listener) as second,
    ):
        first.sendall(v1() + b"hello")
        assert first.recv(5) == b"hello"
        second.sendall(v1())
        assert read_all(second) == b"busy"
        first.shutdown(socket.SHUT_WR)
    assert listener.stats().refused_for == {"busy": 1}


@needs("the openssl command")
def test_before_tls(listener: Listener, seen: Seen, pair: Pair) -> None:
    with (
        serving(listener, seen, proxy=LOCAL, first_bytes=LIMIT, ssl=server_context(pair)),
        connect(listener) as plain,
    ):
        plain.sendall(v2(inet()))
        with client_context(pair).wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(b"secret")
            assert client.recv(6) == b"secret"
            with contextlib.suppress(ssl.SSLError, OSError):
                client.unwrap()
    assert seen.peers == [("192.0.2.1", 1000)]
    assert seen.headers[0] is not None


def test_detached_the_socket_has_what_follows(listener: Listener) -> None:
    found: list[bytes] = []

    def handler(connection: Any) -> None:
        with connection.socket() as sock:
            found.append(read_all(sock))

    with serving(listener, handler, proxy=LOCAL):
        assert exchange(listener, v1() + b"payload") == b""
    assert found == [b"payload"]


@pytest.mark.parametrize("mode", [{}, {"threads": 2}, {"busy": "reset", "pending": 100}], ids=str)
def test_without_a_poller(faults: Faults, mode: dict[str, Any]) -> None:
    program = f"""
import fastlisten
from helpers import LIMIT, connect, exchange, read_all, serving, wait_until
from helpers.proxy_headers import v1
from helpers.serve import answer
proxy = fastlisten.Proxy(["127.0.0.1"], timeout=LIMIT)
with fastlisten.bind("127.0.0.1:0") as listener, connect(listener) as client, connect(listener) as mute:
    with serving(listener, answer, proxy=proxy, **{mode!r}):
        client.sendall(v1()[:20])
        wait_until(lambda: listener.stats().waiting == 2)
        assert exchange(listener, v1() + b"ping") == b"ping"
        client.sendall(v1()[20:] + b"late")
        assert read_all(client) == b"late"
        mute.close()
        wait_until(lambda: listener.stats().active == 0)
print("true")
"""
    assert faults.python(program, poller=[("EMFILE", 1)]) is True


FORK = """
import os, warnings, fastlisten
from helpers import LIMIT, connect, read_all, serving, wait_until
from helpers.proxy_headers import v1
from helpers.serve import answer
warnings.simplefilter("ignore", DeprecationWarning)
proxy = fastlisten.Proxy(["127.0.0.1"], timeout=LIMIT)
with fastlisten.bind("127.0.0.1:0") as listener:
    with serving(listener, answer, proxy=proxy, threads=2), connect(listener) as client:
        client.sendall(v1()[:10])
        wait_until(lambda: listener.stats().waiting == 1)
        child = os.fork()
        if child == 0:
            stats = listener.stats()
            os._exit(0 if (stats.waiting, stats.dropped) == (0, 1) else 1)
        assert os.waitpid(child, 0)[1] == 0
        client.sendall(v1()[10:] + b"late")
        assert read_all(client) == b"late"
print("true")
"""


@needs("fork", "Linux")
def test_a_fork_in_the_middle_of_a_header() -> None:
    assert python(FORK) is True


def test_many_proxied_clients(listener: Listener) -> None:
    """Each handler has its own client's address."""
    wrong: list[Any] = []

    def handler(connection: Any) -> None:
        data = connection.recv(100)
        if connection.peer[1] != int(data):
            wrong.append((connection.peer, data))
        connection.sendall(data)

    def some(number: int) -> None:
        for n in range(50):
            port = 1 + 50 * number + n
            header = v1(port=port) if n % 2 else v2(inet(port=port) + tlv(NOOP, bytes(n)))
            with connect(listener) as client:
                at = n % len(header)
                client.sendall(header[:at])
                client.sendall(header[at:] + b"%d" % port)
                assert read_all(client) == b"%d" % port

    with serving(listener, handler, proxy=LOCAL, threads=3, first_bytes=LIMIT), ThreadPoolExecutor(4) as pool:
        list(pool.map(some, range(4)))
    assert wrong == []
    assert listener.stats().handled == 200


# --- options


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("10.0.0.0/8",), TypeError, "several networks, not str"),
        (([],), ValueError, "names no proxy"),
        ((["10.0.0.1/8"],), ValueError, "has host bits set"),
        ((["10.0.0.0/33"],), ValueError, "10.0.0.0/33"),
        ((["proxy.example.org"],), ValueError, "proxy.example.org"),
        ((["fe80::1%1"],), ValueError, "scope"),
        ((["10.0.0.1"], True, 0), ValueError, "timeout must be above 0"),
        ((["10.0.0.1"], True, "5"), TypeError, "timeout must be a number"),
    ],
)
def test_a_proxy_that_cannot_be_meant(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Proxy(*arguments)


def test_what_a_proxy_is() -> None:
    given = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_address("2001:db8::7")]
    proxy = Proxy(given, required=False, timeout=3)
    assert (proxy.trusted, proxy.required, proxy.timeout) == (("10.0.0.0/8", "2001:db8::7"), False, 3.0)
    with pytest.raises(AttributeError):
        proxy.required = True  # type: ignore[misc]


@needs("unix sockets")
def test_a_single_client_of_inetd_has_no_header() -> None:
    program = """
import os, socket, fastlisten
ours, theirs = socket.socketpair()
os.dup2(theirs.fileno(), 0)
try:
    fastlisten.serve(print, "inetd:", proxy=fastlisten.Proxy(["unix:"]))
except ValueError as error:
    assert "proxy is for listening sockets" in str(error)
    ours.close(), theirs.close()
    print("true")
"""
    assert python(program) is True


def test_an_option_that_is_no_proxy(listener: Listener) -> None:
    with pytest.raises(TypeError, match="proxy must be a Proxy or None, not list"):
        listener.serve(echo, proxy=["10.0.0.0/8"])  # type: ignore[arg-type]
