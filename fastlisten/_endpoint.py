"""Endpoint, HostEntry and name resolution: where a service listens, before any socket exists."""

from __future__ import annotations

import ipaddress
import operator
import os
import socket
from collections.abc import Iterable
from functools import total_ordering
from typing import NamedTuple, NoReturn

__all__ = [
    "Endpoint",
    "HostEntry",
    "endpoint_of",
    "get_host_entry",
    "get_host_name",
    "resolve",
]

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
# What socket.bind takes, and for fd:N the number that socket.socket(fileno=...) takes.
SocketAddress = tuple[str, int] | tuple[str, int, int, int] | str | int

UNIX = "unix:"
DESCRIPTOR = "fd:"
SYSTEMD = "systemd:"
INETD = "inetd:"
NO_IP = (UNIX, DESCRIPTOR, SYSTEMD, INETD)  # how the text of an endpoint begins that has no port
FLOWINFO = "?flowinfo="

MAX_PORT = 0xFFFF
MAX_FLOWINFO = 0xFFFFF  # RFC 8200, section 3: 20 bits
MAX_SCOPE_ID = 0xFFFFFFFF  # RFC 3493, section 3.3: a 32-bit number
MAX_DESCRIPTOR = 0x7FFFFFFF_FFFFFFFF  # a SOCKET of Windows has 64 bits
MAX_NAME = 255  # characters of a name that systemd gives a descriptor; sd_notify(3), FDNAME

# RFC 6335, section 6: the last port of each range.
PORT_RANGES = ((1023, "system"), (49151, "registered"), (MAX_PORT, "dynamic"))

# Characters that no host or interface name holds. Leaving them out of names is what lets the text
# of an endpoint be read in one way only, and a URL or an e-mail address be refused. White space is
# not in names either.
NOT_IN_NAMES = frozenset("[]:/%@?#\\\x7f" + "".join(map(chr, range(0x20))))

EXPECTED = (
    "expected host:port, [IPv6 address]:port, :port, unix:/path, unix:@abstract-name, fd:number, systemd:, "
    "systemd:name or inetd:"
)


# Written out, as HostEntry is a tuple: importing dataclasses would cost as much as all of fastlisten.
@total_ordering
class Endpoint:
    """Where a service listens: an IP address or host name with a port, a unix path, a descriptor.

    host: an address or a name; "" or "*" for all IPv4 addresses ("::" for all IPv6 addresses);
        "unix:/path" and "unix:@name" for unix sockets, the second one in Linux's abstract
        namespace; "fd:3" for a listening socket that this process inherited, "systemd:" and
        "systemd:name" for one that systemd passed, "inetd:" for that of inetd. Addresses are kept
        in their shortest form. bytes are taken as text, ipaddress objects as their text.
    port: 0 to 65535; 0 lets the system choose. All but IP addresses and host names have port 0.
    flowinfo: of an IPv6 address, 0 to 1048575.
    scope_id: of an IPv6 address, the number of its interface, 0 for none. It becomes a part of
        host ("fe80::1%2"); an interface named there ("fe80::1%eth0") stays as written.

    Raises what socket.bind raises for the same mistake: TypeError for a port that is no integer
    and for a host that is no text or holds a null character, OverflowError for a number out of
    range, socket.gaierror for text that cannot be a host name. ValueError: flowinfo or scope_id
    without an IPv6 address, two different scopes, a port beside unix, fd, systemd or inetd, an empty
    unix path or one with a null character, a descriptor that is no number, a name that systemd gives
    no socket.

    Equal text means equal endpoints; they sort by host, then port. Nothing is looked up here
    except an interface whose name and number are both given.

    >>> Endpoint("::1", 11000)
    Endpoint('::1', 11000)
    >>> print(Endpoint("::1", 11000))
    [::1]:11000
    >>> Endpoint.parse("unix:/run/echo.sock").sockaddr
    '/run/echo.sock'
    """

    __slots__ = ("flowinfo", "host", "port")

    host: str
    port: int
    flowinfo: int

    def __init__(
        self,
        host: str | bytes | bytearray | IPAddress,
        port: int = 0,
        *,
        flowinfo: int = 0,
        scope_id: int = 0,
    ) -> None:
        # The order of these checks is socket.bind's: host, then port, flowinfo, scope_id.
        text = _host_text(host)
        port = _integer("port", port, MAX_PORT)
        flowinfo = _integer("flowinfo", flowinfo, MAX_FLOWINFO)
        scope_id = _integer("scope_id", scope_id, MAX_SCOPE_ID)
        if text.startswith(UNIX):
            _check_unix(text[len(UNIX) :])
        elif text.startswith(DESCRIPTOR):
            text = f"{DESCRIPTOR}{_descriptor(text[len(DESCRIPTOR) :])}"
        elif text.startswith(SYSTEMD):
            check_descriptor_name(text[len(SYSTEMD) :])
        elif text.startswith(INETD):
            _check_inetd(text[len(INETD) :])
        else:
            text = _with_scope(_normal_host(text), scope_id)
        if port and text.startswith(NO_IP):
            raise ValueError(f"{text!r} takes no port, got {port}")
        if (flowinfo or scope_id) and not _is_ipv6(text):
            raise ValueError(f"flowinfo and scope_id need an IPv6 address, got host {text!r}")
        object.__setattr__(self, "host", text)
        object.__setattr__(self, "port", port)
        object.__setattr__(self, "flowinfo", flowinfo)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"cannot set {name!r}: an Endpoint does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"cannot delete {name!r}: an Endpoint does not change")

    def _key(self) -> tuple[str, int, int]:
        return self.host, self.port, self.flowinfo

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Endpoint) else NotImplemented

    def __lt__(self, other: object) -> bool:
        return self._key() < other._key() if isinstance(other, Endpoint) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[object, ...]:
        return _unpickled, self._key()

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read an endpoint from text, the inverse of str().

        text: "127.0.0.1:11000", "[::1]:http", "[fe80::1%lo]:80", "localhost:80", ":11000" or
            "*:11000" (all IPv4 addresses), "unix:/run/a.sock", "unix:@abstract", "fd:3",
            "systemd:", "systemd:web", "inetd:". A port is a number or a name that
            socket.getservbyname knows for TCP. Everything after "unix:" belongs to the path. A
            host may stand in brackets: one that is called "unix", "fd", "systemd" or "inetd"
            needs them. "[::1]:80?flowinfo=5" carries an IPv6 flowinfo.

        Raises ValueError with the text and what was expected, TypeError when text is no str.
        """
        if not isinstance(text, str):
            raise TypeError(f"endpoint text must be str, not {type(text).__name__}")
        try:
            if text.startswith(NO_IP):
                return cls(text)
            host, port, flowinfo = _split(text)
            return cls(host, _port_number(port), flowinfo=_flowinfo_number(flowinfo))
        except socket.gaierror:
            reason = f"{host!r} is neither an address nor a host name"
        except (TypeError, ValueError, OverflowError) as error:
            reason = str(error)
        raise ValueError(f"{text!r} is not an endpoint: {reason}; {EXPECTED}") from None

    def __str__(self) -> str:
        if self.host.startswith(NO_IP):
            return self.host
        # Brackets keep a host that is called unix or fd apart from the forms of those names.
        brackets = ":" in self.host or f"{self.host}:" in NO_IP
        text = f"[{self.host}]:{self.port}" if brackets else f"{self.host}:{self.port}"
        return f"{text}{FLOWINFO}{self.flowinfo}" if self.flowinfo else text

    def __repr__(self) -> str:
        port = f", {self.port}" if self.port else ""
        flowinfo = f", flowinfo={self.flowinfo}" if self.flowinfo else ""
        return f"{type(self).__name__}({self.host!r}{port}{flowinfo})"

    @property
    def scope_id(self) -> int:
        """The number of the interface that an IPv6 address belongs to, 0 for none.

        Raises socket.gaierror, as socket.bind does, when the interface named in host is unknown.
        """
        if not _is_ipv6(self.host):
            return 0
        scope = self.host.partition("%")[2]
        return _scope_number(scope) if scope else 0

    @property
    def family(self) -> socket.AddressFamily:
        """AF_INET, AF_INET6 or AF_UNIX; AF_UNSPEC for a host name and for fd, systemd and inetd.

        Raises AttributeError, as socket.AF_UNIX does, where Python has no unix sockets.
        """
        if self.host.startswith(UNIX):
            return socket.AF_UNIX
        if self.host.startswith(NO_IP):
            return socket.AF_UNSPEC
        if _is_ipv6(self.host):
            return socket.AF_INET6
        return socket.AF_INET if not self.host or _is_ipv4(self.host) else socket.AF_UNSPEC

    @property
    def sockaddr(self) -> SocketAddress:
        """What socket.bind takes: (host, port), for IPv6 (host, port, flowinfo, scope_id), a path.

        An abstract name begins with a null character. fd endpoints give their number, which
        socket.socket(fileno=...) takes. Raises socket.gaierror when the scope is unknown, ValueError
        for systemd and inetd, which say it when they are bound: Listener.endpoint.
        """
        if self.host.startswith((SYSTEMD, INETD)):
            raise ValueError(f"{self} has no address before it is bound")
        if self.host.startswith(UNIX):
            path = self.host[len(UNIX) :]
            return f"\0{path[1:]}" if path.startswith("@") else path
        if self.host.startswith(DESCRIPTOR):
            return int(self.host[len(DESCRIPTOR) :])
        if _is_ipv6(self.host):
            return (self.host.partition("%")[0], self.port, self.flowinfo, self.scope_id)
        return (self.host, self.port)

    @property
    def port_range(self) -> str | None:
        """The range of RFC 6335 that the port is in: "system", "registered" or "dynamic".

        Port 0 is in the system range there, although the system replaces it when binding. None
        for endpoints that have no port.
        """
        if self.host.startswith(NO_IP):
            return None
        return next(name for last, name in PORT_RANGES if self.port <= last)


class HostEntry(NamedTuple):
    """What the system's resolver knows about a host.

    name: the host's official name.
    aliases: its other names.
    addresses: its addresses in the resolver's order, each one once.

    >>> entry = get_host_entry("127.0.0.1")
    >>> Endpoint(entry.addresses[0], 11000)
    Endpoint('127.0.0.1', 11000)
    """

    name: str
    aliases: tuple[str, ...]
    addresses: tuple[IPAddress, ...]


def _unpickled(host: str, port: int, flowinfo: int) -> Endpoint:
    return Endpoint(host, port, flowinfo=flowinfo)


def get_host_name() -> str:
    """Return this machine's name, as socket.gethostname does.

    >>> get_host_name() == socket.gethostname()
    True
    """
    return socket.gethostname()


def get_host_entry(host: str | IPAddress | None = None) -> HostEntry:
    """Ask the resolver for a host's names and addresses.

    host: a name or an address; None for this machine.

    Raises socket.gaierror for an unknown name and socket.herror for an address without a name,
    as socket.getaddrinfo and socket.gethostbyaddr do.

    >>> ipaddress.ip_address("127.0.0.1") in get_host_entry("localhost").addresses
    True
    """
    host = get_host_name() if host is None else str(host)
    if _is_ipv4(host) or _is_ipv6(host):
        name, aliases, _ = socket.gethostbyaddr(host)
        return HostEntry(name, _once(aliases, name), (ipaddress.ip_address(host),))
    found = socket.getaddrinfo(_encoded(host), None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
    name = found[0][3] or host
    try:
        aliases = socket.gethostbyname_ex(host)[1]
    except (socket.gaierror, UnicodeError):
        aliases = []  # only IPv6 addresses: the one call that tells aliases knows IPv4 only
    addresses = (ipaddress.ip_address(_from_sockaddr(answer[4]).host) for answer in found)
    return HostEntry(name, _once(aliases, name), tuple(dict.fromkeys(addresses)))


def resolve(endpoint: Endpoint, family: int = socket.AF_UNSPEC) -> list[Endpoint]:
    """Turn an endpoint with a host name into those that a socket can bind to.

    family: only addresses of this family; the empty host means "::" with AF_INET6.

    Returns at least one endpoint, in the resolver's order, each one once. Anything but a host
    name comes back as it is. Raises socket.gaierror as socket.bind does.
    """
    if endpoint.host.startswith(NO_IP):
        return [endpoint]
    known = endpoint.family
    if known != socket.AF_UNSPEC and family in (known, socket.AF_UNSPEC):
        return [endpoint]
    found = socket.getaddrinfo(
        _encoded(endpoint.host) or None,
        endpoint.port,
        family=family,
        type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE,
    )
    return list(dict.fromkeys(_from_sockaddr(answer[4]) for answer in found))


def endpoint_of(value: object) -> Endpoint:
    """Turn what bind() takes into an Endpoint.

    value: an Endpoint; text for Endpoint.parse; or an address of the standard library: a tuple of
        two (IPv4, IPv6 or a name) or of three or four (IPv6), a path as bytes, as os.PathLike or
        as text that begins with "/", an abstract name that begins with a null character. Text
        that is a relative path has to be written "unix:path".

    Raises what Endpoint and Endpoint.parse raise; TypeError for anything else; socket.gaierror for
    a host name in a tuple of four that has no IPv6 address.
    """
    if isinstance(value, Endpoint):
        return value
    if isinstance(value, tuple):
        return _of_tuple(value)
    if isinstance(value, str) and not value.startswith(("/", "\0")):
        return Endpoint.parse(value)
    if isinstance(value, (str, bytes, bytearray, os.PathLike)):
        path = os.fsdecode(bytes(value) if isinstance(value, bytearray) else value)
        if path.startswith("\0"):
            return Endpoint(f"{UNIX}@{path[1:]}")
        # A file whose name begins with @ is not an abstract name.
        return Endpoint(f"{UNIX}./{path}" if path.startswith("@") else f"{UNIX}{path}")
    raise TypeError(
        f"endpoint must be an Endpoint, text, an address tuple or a unix path, not {type(value).__name__}"
    )


def _of_tuple(address: tuple[object, ...]) -> Endpoint:
    if len(address) not in (2, 3, 4):
        raise TypeError("AF_INET address must be a pair (host, port)")
    host, port, flowinfo, scope_id = (*address, 0, 0)[:4]
    text = _host_text(host)
    if text == "*" or text.startswith(NO_IP):
        _refuse_name(text)  # in a tuple it is a host name, and none can look like that
    if len(address) > 2 and text == "":
        text = "::"
    elif len(address) > 2 and not _is_ipv6(text):
        # More than two parts say IPv6, which a name alone cannot.
        [first, *_] = resolve(Endpoint(text, port), socket.AF_INET6)  # type: ignore[arg-type]
        text = first.host
    return Endpoint(text, port, flowinfo=flowinfo, scope_id=scope_id)  # type: ignore[arg-type]


def _from_sockaddr(address: tuple[str | int, ...] | tuple[int, bytes]) -> Endpoint:
    """Turn an address that the system gave, names resolved, into an Endpoint."""
    return _of_tuple(address)


def _host_text(host: object) -> str:
    """Return host as text; the TypeErrors are socket.bind's."""
    if isinstance(host, (ipaddress.IPv4Address, ipaddress.IPv6Address)):
        return str(host)
    if isinstance(host, (bytes, bytearray)):
        host = os.fsdecode(bytes(host))
    if not isinstance(host, str):
        raise TypeError(f"str, bytes or bytearray expected, not {type(host).__name__}")
    if host.startswith(UNIX):
        return host  # the file system's rules, not the resolver's
    if "\0" in host:
        raise TypeError("host name must not contain null character")
    _encoded(host)
    return host


def _encoded(host: str) -> bytes:
    """Return what the resolver is asked for, encoded as socket.bind does it.

    socket.getaddrinfo would run ASCII names through IDNA as well, and raise UnicodeError for the
    ones, like "a..b", that socket.bind leaves to the resolver.
    """
    if host.isascii():
        return host.encode("ascii")
    try:
        return host.encode("idna")
    except UnicodeError:
        raise TypeError("encoding of hostname failed") from None


def _integer(name: str, value: object, most: int) -> int:
    """Return value as an int from 0 to most; the errors are socket.bind's."""
    number = int(operator.index(value))  # type: ignore[arg-type]  # TypeError as wanted
    if not 0 <= number <= most:
        end = "." if name in ("port", "flowinfo") else ""
        raise OverflowError(f"bind(): {name} must be 0-{most}{end}")
    return number


def _normal_host(host: str) -> str:
    """Return a host that is no unix path in the one spelling that Endpoint keeps."""
    if host in ("", "*"):
        return ""
    if host == "<broadcast>":
        return "255.255.255.255"  # as socket.bind reads it
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _is_name(host):
            _refuse_name(host)
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        return _normal_scope(host, str(address), address.scope_id)
    return str(address)


def _normal_scope(host: str, address: str, scope: str) -> str:
    """Return an IPv6 address with its scope: a number without leading zeros, none for 0."""
    if not _is_name(scope):
        _refuse_name(host)
    if not _is_number(scope):
        return address
    address = address.partition("%")[0]
    number = _bounded("scope_id", scope, MAX_SCOPE_ID)
    return f"{address}%{number}" if number else address


def _with_scope(host: str, scope_id: int) -> str:
    """Return host with the scope that is given as a number, when it has none of its own."""
    if not scope_id or not _is_ipv6(host):
        return host
    scope = host.partition("%")[2]
    if not scope:
        return f"{host}%{scope_id}"
    if _scope_number(scope) != scope_id:
        raise ValueError(f"host {host!r} and scope_id {scope_id} name different interfaces")
    return host


def _scope_number(scope: str) -> int:
    if _is_number(scope):
        return int(scope)
    try:
        return socket.if_nametoindex(scope)
    except (OSError, ValueError):
        # socket.bind asks getaddrinfo, which says the same of an interface as of a host.
        raise socket.gaierror(socket.EAI_NONAME, f"no interface named {scope!r}") from None


def _is_name(text: str) -> bool:
    """Whether a host or an interface may be called so; without re, which is slow to import."""
    return bool(text) and NOT_IN_NAMES.isdisjoint(text) and not any(map(str.isspace, text))


def _refuse_name(host: str) -> NoReturn:
    """Raise socket.gaierror for text that no resolver knows, in the system's own words."""
    # Wine's reads [127.0.0.1] as an address; a lone bracket is none anywhere. No server is asked.
    for name in (_encoded(host), b"["):
        socket.getaddrinfo(name, None, flags=socket.AI_NUMERICHOST)
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def _check_unix(path: str) -> None:
    if path in ("", "@"):
        raise ValueError("the unix path is empty")
    if "\0" in path and not path.startswith("@"):
        raise ValueError("the unix path holds a null character")  # bind would cut it off there
    os.fsencode(path)  # UnicodeEncodeError, a ValueError, as from socket.bind


def _descriptor(text: str) -> int:
    if not _is_number(text):
        raise ValueError(f"the descriptor must be a number, not {text!r}")
    return _bounded("descriptor", text, MAX_DESCRIPTOR)


def check_descriptor_name(name: str) -> None:
    """ValueError for what systemd names no descriptor; sd_notify(3), FDNAME."""
    if len(name) > MAX_NAME or not (name.isascii() and name.isprintable()) or ":" in name:
        raise ValueError(f"{name!r} names no descriptor: at most {MAX_NAME} ASCII characters, no colon")


def _check_inetd(rest: str) -> None:
    if rest:
        raise ValueError(f"nothing follows {INETD!r}, got {rest!r}")


def _bounded(name: str, digits: str, most: int) -> int:
    """Return a number written in digits; the length comes first, as int() refuses long ones."""
    digits = digits.lstrip("0") or "0"
    if len(digits) > len(str(most)) or int(digits) > most:
        raise OverflowError(f"{name} must be 0-{most}")
    return int(digits)


def _split(text: str) -> tuple[str, str, str]:
    """Split the text of an IP endpoint into host, port and flowinfo, all as text."""
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed:
            raise ValueError("the closing bracket is missing")
        if not host:
            raise ValueError("the brackets are empty")
        if not rest.startswith(":"):
            raise ValueError("the port is missing")
        port = rest[1:]
    else:
        host, colon, port = text.rpartition(":")
        if not colon:
            raise ValueError("the port is missing")
        if ":" in host:
            raise ValueError("a host has no colon, and an IPv6 address needs brackets")
    port, _, flowinfo = port.partition(FLOWINFO)
    return host, port, flowinfo


def _port_number(text: str) -> int:
    if not text:
        raise ValueError("the port is missing")
    if _is_number(text):
        return _bounded("port", text, MAX_PORT)
    try:
        return socket.getservbyname(text, "tcp")
    except (OSError, ValueError):
        raise ValueError(f"{text!r} is neither a port number nor a TCP service") from None


def _flowinfo_number(text: str) -> int:
    if not text:
        return 0
    if not _is_number(text):
        raise ValueError(f"flowinfo must be a number, not {text!r}")
    return _bounded("flowinfo", text, MAX_FLOWINFO)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _once(names: Iterable[str], name: str) -> tuple[str, ...]:
    """Return the names other than name, each one once, in their order."""
    return tuple(other for other in dict.fromkeys(names) if other != name)
