"""Endpoint, its text, its addresses, and the resolver behind it."""

import copy
import ipaddress
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastlisten import Endpoint, HostEntry, bind, get_host_entry, get_host_name
from helpers import NOWHERE, has_ipv6, needs
from helpers.internals import endpoint_of, resolve

HAS_UNIX = hasattr(socket, "AF_UNIX")
# One interface of this machine, the loopback one where it can be told.
INTERFACE_NUMBER, INTERFACE = min(socket.if_nameindex())
NO_SUCH_INTERFACE = "nosuchinterface0"

ports = st.integers(0, 65535)
names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)
scopes = st.sampled_from(["", INTERFACE, NO_SUCH_INTERFACE, "1", "007", "0", "4294967295"])
ipv6 = st.builds(
    lambda address, scope: f"{address}%{scope}" if scope else str(address),
    st.ip_addresses(v=6),
    scopes,
)
hosts = st.one_of(
    st.sampled_from(["", "*", "<broadcast>", "unix", "fd", "localhost", "bücher.example"]),
    st.ip_addresses(v=4),
    st.ip_addresses(v=6),
    names,
)


def is_path(name: bytes) -> bool:
    """Tell whether os.fsdecode reads it: any bytes on POSIX, only UTF-8 on Windows (PEP 529)."""
    try:
        os.fsdecode(name)
    except UnicodeDecodeError:
        return False
    return True


# Any path is text, as os.fsdecode writes it.
file_names = st.binary(min_size=1, max_size=60).filter(is_path)
paths = file_names.filter(lambda path: b"\0" not in path).map(os.fsdecode)
abstract = file_names.map(lambda name: "@" + os.fsdecode(name))
endpoints = st.one_of(
    st.builds(Endpoint, hosts, ports),
    st.builds(Endpoint, ipv6, ports, flowinfo=st.integers(0, 0xFFFFF)),
    st.builds(Endpoint, st.ip_addresses(v=6), ports, scope_id=st.integers(0, 0xFFFFFFFF)),
    st.builds(lambda path: Endpoint("unix:" + path), st.one_of(paths, abstract).filter(lambda p: p != "@")),
    st.builds(lambda number: Endpoint(f"fd:{number}"), st.integers(0, 2**63 - 1)),
    st.builds(
        lambda name: Endpoint(f"systemd:{name}"),
        st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters=":"), max_size=255),
    ),
    st.just(Endpoint("inetd:")),
)
PIECES = [
    *("[", "]", ":", "%", "@", "/", "?flowinfo=", "::1", "127.0.0.1", "localhost"),
    *("unix:", "fd:", "systemd:", "inetd:"),
    *("http", "80", "9" * 5000, " ", "\0", "\udc80", "\ud800", "é", "٣"),
]
# Text made of the pieces that the grammar is made of gets further than any text.
pieces = st.lists(
    st.one_of(
        st.sampled_from(PIECES),
        st.text(max_size=3),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize(
    ("text", "host", "port", "sockaddr"),
    [
        ("127.0.0.1:11000", "127.0.0.1", 11000, ("127.0.0.1", 11000)),
        ("[::1]:11000", "::1", 11000, ("::1", 11000, 0, 0)),
        ("[0:0::0:1]:00080", "::1", 80, ("::1", 80, 0, 0)),
        (":11000", "", 11000, ("", 11000)),
        ("*:11000", "", 11000, ("", 11000)),
        ("localhost:0", "localhost", 0, ("localhost", 0)),
        ("[localhost]:0", "localhost", 0, ("localhost", 0)),
        ("[unix]:1", "unix", 1, ("unix", 1)),
        ("[::1]:5?flowinfo=7", "::1", 5, ("::1", 5, 7, 0)),
        ("[fe80::1%7]:80", "fe80::1%7", 80, ("fe80::1", 80, 0, 7)),
        ("[fe80::1%007]:80", "fe80::1%7", 80, ("fe80::1", 80, 0, 7)),
        ("[fe80::1%0]:80", "fe80::1", 80, ("fe80::1", 80, 0, 0)),
        ("unix:/run/a: b.sock ", "unix:/run/a: b.sock ", 0, "/run/a: b.sock "),
        ("unix:relative", "unix:relative", 0, "relative"),
        ("unix:@abstract", "unix:@abstract", 0, "\0abstract"),
        ("unix:@a\0b", "unix:@a\0b", 0, "\0a\0b"),
        ("fd:3", "fd:3", 0, 3),
        ("fd:007", "fd:7", 0, 7),
        ("[systemd]:80", "systemd", 80, ("systemd", 80)),
        ("[inetd]:80", "inetd", 80, ("inetd", 80)),
    ],
)
def test_parse_reads_every_form(text: str, host: str, port: int, sockaddr: object) -> None:
    endpoint = Endpoint.parse(text)
    assert (endpoint.host, endpoint.port, endpoint.sockaddr) == (host, port, sockaddr)
    assert Endpoint.parse(str(endpoint)) == endpoint


@needs("names of services")
@pytest.mark.parametrize("host", ["localhost", "[::1]", "127.0.0.1", ""])
def test_parse_asks_the_system_for_service_names(host: str) -> None:
    endpoint = Endpoint.parse(f"{host}:http")
    assert endpoint == Endpoint.parse(f"{host}:80")
    assert endpoint.port == socket.getservbyname("http", "tcp")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the port is missing"),
        ("localhost", "the port is missing"),
        ("localhost:", "the port is missing"),
        ("[::1]", "the port is missing"),
        ("[::1]80", "the port is missing"),
        ("[::1:80", "the closing bracket is missing"),
        ("[]:80", "the brackets are empty"),
        ("::1:80", "an IPv6 address needs brackets"),
        ("a:b:80", "an IPv6 address needs brackets"),
        ("http://localhost:80", "an IPv6 address needs brackets"),
        ("[::g]:80", "'::g' is neither an address nor a host name"),
        ("[::1%]:80", "'::1%' is neither"),
        ("[::1%a b]:80", "'::1%a b' is neither"),
        ("[fe80::1%4294967296]:80", "scope_id must be 0-4294967295"),
        ("127.0.0.1%lo:80", "is neither an address nor a host name"),
        (" 127.0.0.1:80", "is neither an address nor a host name"),
        ("user@host:80", "is neither an address nor a host name"),
        ("a\0b:80", "null character"),
        ("\ud800:80", "encoding of hostname failed"),
        ("localhost:65536", "port must be 0-65535"),
        ("localhost:" + "9" * 5000, "port must be 0-65535"),
        ("localhost:-1", "'-1' is neither a port number nor a TCP service"),
        ("localhost:+80", "neither a port number nor a TCP service"),
        ("localhost:٨٠", "neither a port number nor a TCP service"),
        ("localhost:no-such-service", "neither a port number nor a TCP service"),
        ("localhost:80/", "neither a port number nor a TCP service"),
        ("localhost:80?flowinfo=1", "flowinfo and scope_id need an IPv6 address"),
        ("[::1]:80?flowinfo=x", "flowinfo must be a number, not 'x'"),
        ("[::1]:80?flowinfo=1048576", "flowinfo must be 0-1048575"),
        ("unix:", "the unix path is empty"),
        ("unix:@", "the unix path is empty"),
        ("unix:/a\0b", "null character"),
        ("fd:", "the descriptor must be a number, not ''"),
        ("fd:-1", "the descriptor must be a number, not '-1'"),
        ("fd:stdin", "the descriptor must be a number, not 'stdin'"),
        ("fd:9223372036854775808", "descriptor must be 0-9223372036854775807"),
        ("systemd:a:b", "'a:b' names no descriptor: at most 255 ASCII characters, no colon"),
        ("systemd:\n", "names no descriptor"),
        ("systemd:" + "a" * 256, "names no descriptor"),
        ("inetd:80", "nothing follows 'inetd:', got '80'"),
    ],
)
def test_parse_shows_the_text_and_what_was_expected(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="is not an endpoint") as caught:
        Endpoint.parse(text)
    message = str(caught.value)
    assert repr(text) in message
    assert reason in message
    assert "expected host:port, [IPv6 address]:port, :port, unix:/path" in message


@pytest.mark.parametrize("value", [None, 80, b"127.0.0.1:80", ("127.0.0.1", 80)])
def test_parse_takes_text_only(value: object) -> None:
    with pytest.raises(TypeError, match=f"must be str, not {type(value).__name__}"):
        Endpoint.parse(value)  # type: ignore[arg-type]


@given(endpoints)
@example(Endpoint("unix", 80))
@example(Endpoint("fd", 3))
@example(Endpoint("unix:/a ]:[b\n%?"))
@example(Endpoint("unix:@a:b"))
@example(Endpoint(f"fe80::1%{INTERFACE}", 80, flowinfo=1))
def test_str_parses_back_to_an_equal_value(endpoint: Endpoint) -> None:
    again = Endpoint.parse(str(endpoint))
    assert again == endpoint
    assert hash(again) == hash(endpoint)
    assert str(again) == str(endpoint)
    # So does repr, as Python's own text for a value should.
    assert eval(repr(endpoint)) == endpoint


@given(st.one_of(st.text(), pieces))
@example("[::1%" + "1" * 5000 + "]:1")
@example("a..b:1")
def test_parse_raises_nothing_but_valueerror(text: str) -> None:
    try:
        endpoint = Endpoint.parse(text)
    except ValueError:
        return  # its message has a test of its own
    assert Endpoint.parse(str(endpoint)) == endpoint


def bind_error(family: int, address: object) -> Exception:
    """Return what the running interpreter's socket.bind says to address."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(address)  # type: ignore[arg-type]
        except Exception as error:
            return error
    raise AssertionError(f"socket.bind took {address!r}")


@pytest.mark.parametrize(
    "address",
    [
        ("127.0.0.1", "80"),
        ("127.0.0.1", None),
        ("127.0.0.1", 80.0),
        ("127.0.0.1", -1),
        ("127.0.0.1", 65536),
        ("127.0.0.1", 2**70),
        ("127.0.0.1", -(2**70)),
        (None, 0),
        (None, "80"),
        (5, 0),
        ("a\0b", 0),
        (b"a\0b", 0),
        ("\ud800", 0),
        ("a b", 0),
        ("a:b", 0),
        ("[127.0.0.1]", 0),
        ("127.0.0.1%1", 0),
    ],
)
def test_mistakes_raise_what_bind_raises(address: tuple[str, int]) -> None:
    expected = bind_error(socket.AF_INET, address)
    with pytest.raises(type(expected)) as caught:
        Endpoint(*address)
    assert type(caught.value) is type(expected)
    assert str(caught.value) == str(expected)
    with pytest.raises(type(expected)) as caught:
        endpoint_of(address)
    assert str(caught.value) == str(expected)


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
@pytest.mark.parametrize(
    ("address", "same_text"),
    [
        (("::1", 0, -1, 0), True),
        (("::1", 0, 2**20, 0), True),
        (("::1", 0, "0", 0), True),
        (("::1", 0, 0, "0"), True),
        (("::1", 0, 0, None), True),
        (("::g", 0, 0, 0), True),
        ((f"fe80::1%{NO_SUCH_INTERFACE}", 0, 0, 0), False),
    ],
)
def test_ipv6_mistakes_raise_what_bind_raises(address: tuple[object, ...], same_text: bool) -> None:
    expected = bind_error(socket.AF_INET6, address)
    with pytest.raises(type(expected)) as caught:
        assert endpoint_of(address).sockaddr
    assert type(caught.value) is type(expected)
    if same_text:
        assert str(caught.value) == str(expected)


def test_ports_are_whatever_counts_as_an_integer() -> None:
    class Eighty:
        def __index__(self) -> int:
            return 80

    assert Endpoint("a", Eighty()).port == 80  # type: ignore[arg-type]
    assert repr(Endpoint("a", True)) == "Endpoint('a', 1)"  # socket.bind takes True for 1 too


@pytest.mark.parametrize("number", [-1, 2**32, 2**70])
def test_a_scope_out_of_range_is_not_cut_off(number: int) -> None:
    with pytest.raises(OverflowError, match="scope_id must be 0-4294967295"):
        Endpoint("fe80::1", scope_id=number)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "", "unix:/a", "fd:3", "inetd:"])
@pytest.mark.parametrize("option", ["flowinfo", "scope_id"])
def test_only_ipv6_has_flowinfo_and_scope(host: str, option: str) -> None:
    with pytest.raises(ValueError, match="need an IPv6 address"):
        Endpoint(host, **{option: 1})


@pytest.mark.parametrize("host", ["unix:/a", "unix:@a", "fd:3", "systemd:", "systemd:a", "inetd:"])
def test_unix_and_descriptor_take_no_port(host: str) -> None:
    with pytest.raises(ValueError, match="takes no port, got 80"):
        Endpoint(host, 80)


@pytest.mark.parametrize(
    ("host", "kept"),
    [
        (ipaddress.ip_address("127.0.0.1"), "127.0.0.1"),
        (ipaddress.ip_address("::1"), "::1"),
        (ipaddress.ip_address("fe80::1%3"), "fe80::1%3"),
        ("FE80::0001", "fe80::1"),
        ("*", ""),
        ("<broadcast>", "255.255.255.255"),
        (b"127.0.0.1", "127.0.0.1"),
        (bytearray(b"localhost"), "localhost"),
        ("127.1", "127.1"),  # the resolver reads it, as for socket.bind
    ],
)
def test_host_is_text_in_one_spelling(host: str, kept: str) -> None:
    assert Endpoint(host).host == kept


def test_endpoints_are_values() -> None:
    one, same, other = Endpoint("::1", 80), Endpoint("0::1", 80), Endpoint("::1", 81)
    assert one == same
    assert one != other
    assert len({one, same, other}) == 2
    assert sorted([other, one]) == [one, other]
    assert one != ("::1", 80)
    with pytest.raises(AttributeError):
        one.port = 81
    with pytest.raises((AttributeError, TypeError)):
        one.name = "x"
    assert not hasattr(one, "__dict__")
    assert pickle.loads(pickle.dumps(one)) == copy.copy(one) == one


def test_scope_text_and_number_agree() -> None:
    by_number = Endpoint("fe80::1", 80, scope_id=INTERFACE_NUMBER)
    assert by_number.host == f"fe80::1%{INTERFACE_NUMBER}"
    assert by_number.scope_id == INTERFACE_NUMBER
    by_name = Endpoint(f"fe80::1%{INTERFACE}", 80)
    assert by_name.scope_id == INTERFACE_NUMBER
    assert str(by_name) == f"[fe80::1%{INTERFACE}]:80"
    assert by_name.sockaddr == by_number.sockaddr == ("fe80::1", 80, 0, INTERFACE_NUMBER)
    assert Endpoint(by_name.host, 80, scope_id=INTERFACE_NUMBER) == by_name
    with pytest.raises(ValueError, match="name different interfaces"):
        Endpoint(by_name.host, scope_id=INTERFACE_NUMBER + 1)


def test_an_unknown_interface_is_bind_s_error_when_it_is_needed() -> None:
    endpoint = Endpoint.parse(f"[fe80::1%{NO_SUCH_INTERFACE}]:80")
    assert Endpoint.parse(str(endpoint)) == endpoint
    with pytest.raises(socket.gaierror, match=NO_SUCH_INTERFACE) as caught:
        assert endpoint.sockaddr
    assert caught.value.errno == socket.EAI_NONAME


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("127.0.0.1:0", socket.AF_INET),
        (":0", socket.AF_INET),
        ("[::]:0", socket.AF_INET6),
        (f"[fe80::1%{NO_SUCH_INTERFACE}]:0", socket.AF_INET6),
        ("localhost:0", socket.AF_UNSPEC),
        ("127.1:0", socket.AF_UNSPEC),
        ("fd:3", socket.AF_UNSPEC),
        ("systemd:web", socket.AF_UNSPEC),
        ("inetd:", socket.AF_UNSPEC),
    ],
)
def test_family_follows_from_the_form(text: str, family: int) -> None:
    assert Endpoint.parse(text).family == family


def test_unix_family_is_missing_as_it_is_from_socket() -> None:
    endpoint = Endpoint.parse("unix:/run/a.sock")
    if HAS_UNIX:
        assert endpoint.family == socket.AF_UNIX
    else:
        with pytest.raises(AttributeError, match="AF_UNIX"):
            assert endpoint.family


@pytest.mark.parametrize(
    ("port", "name"),
    [
        (0, "system"),
        (1023, "system"),
        (1024, "registered"),
        (49151, "registered"),
        (49152, "dynamic"),
        (65535, "dynamic"),
    ],
)
def test_port_ranges_are_those_of_rfc_6335(port: int, name: str) -> None:
    assert Endpoint("localhost", port).port_range == name


@pytest.mark.parametrize("text", ["unix:/a", "unix:@a", "fd:3", "systemd:", "systemd:a", "inetd:"])
def test_there_is_no_range_without_a_port(text: str) -> None:
    assert Endpoint.parse(text).port_range is None


@pytest.mark.parametrize("text", ["127.0.0.1:0", ":0", "127.1:0", "localhost:0", "[::1]:0"])
def test_what_resolve_gives_can_be_bound_to(text: str) -> None:
    if text.startswith("[") and not has_ipv6():
        pytest.skip("no IPv6 loopback on this machine")
    for endpoint in resolve(Endpoint.parse(text)):
        with socket.socket(endpoint.family, socket.SOCK_STREAM) as probe:
            address: Any = endpoint.sockaddr
            probe.bind(address)
            bound = endpoint_of(probe.getsockname())
        assert bound.family == endpoint.family
        assert bound.port > 0
        assert Endpoint.parse(str(bound)) == bound


def test_resolve_leaves_everything_but_names_alone() -> None:
    for text in ("127.0.0.1:1", "[::1]:1", ":1", "unix:/a", "fd:3", "systemd:", "inetd:"):
        endpoint = Endpoint.parse(text)
        assert resolve(endpoint) == [endpoint]


def test_resolve_keeps_the_resolver_s_order() -> None:
    found = socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
    expected = list(dict.fromkeys(answer[4][0] for answer in found))
    assert [endpoint.host for endpoint in resolve(Endpoint("localhost", 80))] == expected


def test_resolve_narrows_to_a_family() -> None:
    assert resolve(Endpoint("", 1), socket.AF_INET6) == [Endpoint("::", 1)]
    assert resolve(Endpoint("", 1), socket.AF_INET) == [Endpoint("", 1)]
    assert resolve(Endpoint("localhost", 1), socket.AF_INET) == [Endpoint("127.0.0.1", 1)]
    for host, family in (("::1", socket.AF_INET), ("127.0.0.1", socket.AF_INET6)):
        expected = bind_error(family, (host, 0))
        with pytest.raises(type(expected)) as caught:
            resolve(Endpoint(host), family)
        assert str(caught.value) == str(expected)


@pytest.mark.parametrize("host", [NOWHERE, "a..b", "x" * 300])
def test_resolve_raises_what_bind_raises(host: str) -> None:
    expected = bind_error(socket.AF_INET, (host, 0))
    with pytest.raises(type(expected)) as caught:
        resolve(Endpoint(host), socket.AF_INET)
    assert type(caught.value) is type(expected)
    assert str(caught.value) == str(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Endpoint("::1", 80), "[::1]:80"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("unix:a", "unix:a"),
        (("127.0.0.1", 80), "127.0.0.1:80"),
        ((b"127.0.0.1", 80), "127.0.0.1:80"),
        (("", 80), ":80"),
        (("", 80, 0, 0), "[::]:80"),
        (("::1", 80), "[::1]:80"),
        (("::1", 80, 5), "[::1]:80?flowinfo=5"),
        (("fe80::1", 80, 5, 6), "[fe80::1%6]:80?flowinfo=5"),
        (("fe80::1%6", 80, 0, 6), "[fe80::1%6]:80"),
        (b"/run/a.sock", "unix:/run/a.sock"),
        (bytearray(b"a.sock"), "unix:a.sock"),
        ("/run/a.sock", "unix:/run/a.sock"),
        (b"@a", "unix:./@a"),
        (b"\0a\0b", "unix:@a\0b"),
        ("\0a", "unix:@a"),
    ],
)
def test_endpoint_of_takes_what_the_standard_library_takes(value: object, text: str) -> None:
    assert str(endpoint_of(value)) == text


def test_endpoint_of_takes_pathlike_objects(unix_path: str) -> None:
    class Path:
        def __fspath__(self) -> str:
            return unix_path

    assert endpoint_of(Path()).sockaddr == unix_path


@pytest.mark.parametrize("value", [None, 5, ["127.0.0.1", 80], (), ("a",), ("a", 1, 2, 3, 4)])
def test_endpoint_of_refuses_what_is_no_address(value: object) -> None:
    with pytest.raises(TypeError):
        endpoint_of(value)


@pytest.mark.parametrize("host", ["*", "unix:/a", "fd:3", "systemd:a", "inetd:"])
def test_a_tuple_holds_a_host_and_nothing_else(host: str) -> None:
    with pytest.raises(socket.gaierror) as caught:
        endpoint_of((host, 0))
    assert str(caught.value) == str(bind_error(socket.AF_INET, (host, 0)))


def test_a_name_in_four_parts_is_an_ipv6_name() -> None:
    try:
        found = socket.getaddrinfo("localhost", 80, socket.AF_INET6, socket.SOCK_STREAM)
    except socket.gaierror:
        with pytest.raises(socket.gaierror):
            endpoint_of(("localhost", 80, 0, 0))
    else:
        assert endpoint_of(("localhost", 80, 0, 0)).host == found[0][4][0]


def test_get_host_name_is_the_system_s() -> None:
    assert get_host_name() == socket.gethostname()


def test_host_entry_of_this_machine_leads_to_an_endpoint() -> None:
    try:
        expected = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        with pytest.raises(socket.gaierror):
            get_host_entry()
        return
    entry = get_host_entry()
    assert entry == get_host_entry(get_host_name())
    assert [str(address) for address in entry.addresses] == list(
        dict.fromkeys(answer[4][0] for answer in expected)
    )
    assert Endpoint(entry.addresses[0], 11000).port == 11000


def test_host_entry_of_a_name() -> None:
    entry = get_host_entry("localhost")
    assert ipaddress.ip_address("127.0.0.1") in entry.addresses
    assert entry.name
    assert entry.name not in entry.aliases
    assert len(set(entry.addresses)) == len(entry.addresses)
    assert isinstance(entry.aliases, tuple)
    assert hash(entry) == hash(HostEntry(entry.name, entry.aliases, entry.addresses))
    with pytest.raises(AttributeError):
        entry.name = "x"  # type: ignore[misc]


def test_host_entry_of_an_address() -> None:
    address = ipaddress.ip_address("127.0.0.1")
    try:
        name, aliases, _ = socket.gethostbyaddr(str(address))
    except socket.herror:
        pytest.skip("127.0.0.1 has no name on this machine")
    entry = get_host_entry(address)
    assert entry.name == name
    assert entry.addresses == (address,)
    assert set(entry.aliases) == set(aliases) - {name}


def test_host_entry_of_an_unknown_name_is_the_resolver_s_error() -> None:
    # Windows takes the empty name for this machine, as its documentation of getaddrinfo says.
    empty = [""] if os.name == "posix" else []
    for host in (NOWHERE, "a..b", *empty):
        with pytest.raises(socket.gaierror):
            get_host_entry(host)


def test_host_entry_keeps_scopes_order_and_each_address_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The resolver is replaced: no test machine has an /etc/hosts with all of these."""

    def getaddrinfo(*arguments: object, **options: object) -> list[tuple[object, ...]]:
        stream = (socket.SOCK_STREAM, 0)
        return [
            (socket.AF_INET6, *stream, "box.example", ("fe80::2%7", 0, 0, 7)),
            (socket.AF_INET6, *stream, "", ("fe80::2", 0, 0, 8)),
            (socket.AF_INET, *stream, "", ("192.0.2.1", 0)),
            (socket.AF_INET6, *stream, "", ("fe80::2%7", 0, 0, 7)),
        ]

    def gethostbyname_ex(host: str) -> tuple[str, list[str], list[str]]:
        return "box.example", ["box", "box.example", "box"], ["192.0.2.1"]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "gethostbyname_ex", gethostbyname_ex)
    assert get_host_entry("box") == HostEntry(
        "box.example",
        ("box",),
        tuple(map(ipaddress.ip_address, ["fe80::2%7", "fe80::2%8", "192.0.2.1"])),
    )


@needs("unix sockets")
def test_a_listener_tells_its_unix_path_whatever_it_looks_like(
    unix_paths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(unix_paths)
    for text in ("unix:a.sock", "unix:a:80", "unix:./@a", f"unix:{unix_paths}/b"):
        with bind(text) as listener:
            assert str(listener.endpoint) == text
    assert os.listdir(unix_paths) == []


@needs("Linux")
def test_a_listener_tells_its_abstract_name() -> None:
    text = f"unix:@fastlisten test {os.getpid()}"
    with bind(text) as listener:
        assert str(listener.endpoint) == text


@needs("the IPv6 loopback address")
def test_dual_stack_reads_all_addresses_as_those_of_ipv6() -> None:
    with bind(":0", dualstack_ipv6=True) as listener:
        assert listener.endpoint.host == "::"
    with pytest.raises(ValueError, match="requires AF_INET6"):
        bind("127.0.0.1:0", dualstack_ipv6=True)


@pytest.mark.parametrize("text", ["systemd:", "systemd:web", "inetd:"])
def test_a_socket_that_is_passed_has_its_address_when_it_is_bound(text: str) -> None:
    endpoint = Endpoint.parse(text)
    assert (str(endpoint), endpoint.host, endpoint.port) == (text, text, 0)
    assert Endpoint.parse(str(endpoint)) == endpoint
    with pytest.raises(ValueError, match=f"{text} has no address before it is bound"):
        _ = endpoint.sockaddr
